import numpy as np
import pytest

from optkit.models import DimRange, Signature, TensorSpec
from optkit.recipe import LatencySettings
from optkit.validation import Contest, Entrant
from optkit.validation.latency import MOST_CALLS, latency_document, measure_latency, speed_verdict
from optkit.validation.statistics import Interval

from .conftest import QUICK, SIGNATURE, Function, contest_of


class Logged(Function):
    """Writes down whose turn it was."""

    def __init__(self, name, log, seconds=1e-3):
        super().__init__(np.copy, seconds)
        self._name, self._log = name, log

    def time(self, feeds, rounds):
        self._log.append(self._name)
        return super().time(feeds, rounds)


def test_rounds_are_interleaved_in_alternating_order(samples, context):
    log: list[str] = []
    a, b, c = (Entrant(name, Logged(name, log)) for name in "abc")
    measure_latency(Contest((a, b), c, "a"), samples, context, QUICK, 0.95)
    assert "".join(log[-12:]) == "abccbaabccba"


def test_a_turn_lasts_as_long_as_it_should_and_warms_the_caches_first(samples, context):
    fast, slow = Function(np.copy, 1e-3), Function(np.copy, 0.4)
    settings = LatencySettings(rounds=6, seconds=0.2, warmup=0)
    found = measure_latency(
        Contest((Entrant("slow", slow),), Entrant("fast", fast), "slow"), samples, context, settings, 0.95
    )
    assert [len(turn) for turn in found.timings["fast"].rounds] == [200] * 6
    assert [len(turn) for turn in found.timings["slow"].rounds] == [1] * 6
    assert fast.turns[-2:] == [20, 200]
    assert slow.turns[-2:] == [1, 1]
    assert found.speedups["slow"].estimate == pytest.approx(400)


def test_very_fast_calls_are_capped(samples, context):
    found = measure_latency(
        Contest((Entrant("a", Function(np.copy, 1e-8)),), Entrant("b", Function(np.copy, 1e-8)), "a"),
        samples, context, QUICK, 0.95,
    )  # fmt: skip
    assert {len(turn) for turn in found.timings["a"].rounds} == {MOST_CALLS}


def test_warm_up_goes_on_until_two_windows_agree(samples, context, caplog):
    class Cooling(Function):
        def time(self, feeds, rounds):
            super().time(feeds, rounds)
            self._seconds = max(self._seconds * 0.7, 1e-3)
            return np.full(rounds, self._seconds)

    settings = LatencySettings(rounds=6, seconds=0.01, warmup=0.05)
    cooling = Cooling(np.copy, 0.01)
    measure_latency(
        Contest((Entrant("a", Function(np.copy)),), Entrant("b", cooling), "a"), samples, context, settings, 0.95
    )
    # 10 calls of 1 ms make a turn of 10 ms: the estimate of the first, slow calls was not kept
    assert cooling.turns[-1] == 10
    assert "had not settled" not in caplog.text


def test_percentiles_come_only_with_enough_samples(samples, context):
    found = measure_latency(
        contest_of(np.copy), samples, context, LatencySettings(rounds=10, seconds=0.005, warmup=0), 0.95
    )
    timed = latency_document(found, QUICK)["runners"]["new"]
    assert timed["calls"] == 50
    assert timed["p50_ms"] == timed["p90_ms"] == pytest.approx(1)
    assert timed["p95_ms"] is timed["p99_ms"] is None


def test_document_keeps_raw_samples_throughput_and_settings(samples, context):
    found = measure_latency(contest_of(np.copy), samples, context, QUICK, 0.95)
    document = latency_document(found, QUICK)
    timed = document["runners"]["base"]
    assert timed["samples_us"] == [[1000.0]] * 6
    assert timed["throughput_per_s"] == pytest.approx(1000)
    assert (timed["device"], timed["runtime"], timed["settings"]) == ("nowhere", "Python", {"threads": 1})
    assert document["ratios"]["base"]["verdict"] == "no difference shown"
    assert document["feeds"] == "validation samples"
    assert document["batch"] == 1


def test_sizes_are_the_opt_ones_and_throughput_counts_the_batch(samples, context):
    signature = Signature(SIGNATURE.inputs, SIGNATURE.outputs, {"batch": DimRange(1, 8, 16)})
    entrants = [Entrant(name, Function(np.copy, 1e-3, signature)) for name in ("a", "b")]
    document = latency_document(
        measure_latency(Contest((entrants[0],), entrants[1], "a"), samples, context, QUICK, 0.95), QUICK
    )
    assert document["batch"] == 8
    assert document["sizes"] == {"batch": 8}
    assert document["runners"]["a"]["throughput_per_s"] == pytest.approx(8000)


def test_samples_of_another_size_are_replaced_by_random_values(samples, context):
    signature = Signature(
        (TensorSpec("x", "float32", ("batch", "width")),), SIGNATURE.outputs, {"width": DimRange(1, 5, 9)}
    )
    entrants = [Entrant(name, Function(np.copy, 1e-3, signature)) for name in ("a", "b")]
    found = measure_latency(Contest((entrants[0],), entrants[1], "a"), samples, context, QUICK, 0.95)
    assert found.feeds == "random values"


def test_unsteady_rounds_are_warned_of(samples, context, caplog):
    class Unsteady(Function):
        def time(self, feeds, rounds):
            super().time(feeds, rounds)
            return np.full(rounds, 1e-3 * (1 + len(self.turns) % 2))

    measure_latency(
        Contest((Entrant("a", Function(np.copy)),), Entrant("b", Unsteady(np.copy)), "a"), samples, context, QUICK, 0.95
    )
    assert "b: the median latency varied by" in caplog.text
    assert "a: the median latency varied" not in caplog.text


@pytest.mark.parametrize(
    ("low", "high", "reliable", "verdict"),
    [
        (1.01, 1.2, True, "faster"),
        (0.8, 0.99, True, "slower"),
        (0.99, 1.2, True, "no difference shown"),
        (1.5, 2.0, False, "no difference shown"),
    ],
)
def test_faster_only_if_the_interval_excludes_one(low, high, reliable, verdict):
    assert speed_verdict(Interval(1, low, high, "", 10, reliable=reliable)) == verdict
