import numpy as np
import pytest

from optkit.recipe import Gate
from optkit.targets.base import Environment
from optkit.validation.accuracy import Accuracy
from optkit.validation.gate import Verdict, judge, judge_accuracy, judge_speed, worst
from optkit.validation.latency import Latency
from optkit.validation.statistics import Interval, paired_proportions

from .conftest import contest_of


def _accuracy(drop: Interval) -> Accuracy:
    return Accuracy("top1", True, drop.n, {"base": 0.9, "new": 0.9 - drop.estimate}, {"base": drop})


def _latency(estimate: float, low: float, high: float, rounds: int = 20, reliable: bool = True) -> Latency:
    speedup = Interval(estimate, low, high, "", rounds, reliable=reliable)
    return Latency({}, {"base": speedup}, {}, 1, "", (None, None))


@pytest.mark.parametrize(
    ("lost", "gained", "n", "status"),
    [
        (2, 3, 10_000, "passed"),
        (300, 100, 10_000, "missed"),
        (2, 1, 200, "inconclusive"),
        (0, 0, 100, "inconclusive"),
        (0, 0, 765, "passed"),
    ],
)
def test_accuracy_has_three_answers(lost, gained, n, status):
    drop = paired_proportions(lost, gained, n, 0.95)
    assert judge_accuracy(contest_of(np.copy), _accuracy(drop), Gate(max_drop=0.5)).status == status


def test_inconclusive_names_the_samples_and_the_drop_that_would_decide():
    drop = paired_proportions(0, 0, 100, 0.95)
    verdict = judge_accuracy(contest_of(np.copy), _accuracy(drop), Gate(max_drop=0.5))
    assert "About 765 samples like these would decide it (there were 100)." in verdict.reasons[1]
    assert "gate.max_drop 3.70 would pass with these." in verdict.reasons[1]
    assert judge_accuracy(contest_of(np.copy), _accuracy(drop), Gate(max_drop=3.70)).status == "passed"
    assert judge_accuracy(contest_of(np.copy), _accuracy(drop), Gate(max_drop=3.69)).status == "inconclusive"


def test_reasons_hold_the_numbers():
    verdict = judge_accuracy(contest_of(np.copy), _accuracy(paired_proportions(300, 100, 10_000, 0.95)), Gate())
    assert verdict.reasons == (
        "top1 is 90.00 (base) and 88.00 (new) on 10000 samples: a drop of 2.00 points, with 95 % confidence from "
        "1.62 to 2.40; only 0.5 is allowed.",
    )


def test_nan_is_a_miss_with_its_own_words():
    broken = "new gives NaN in output 'y' for validation sample 3, where base gives a number"
    verdict = judge_accuracy(contest_of(np.copy), Accuracy("top1", True, 16, broken=broken), Gate(max_drop=100))
    assert verdict == Verdict("missed", (broken + ".",))


@pytest.mark.parametrize(
    ("low", "high", "status"), [(1.3, 1.6, "passed"), (1.0, 1.19, "missed"), (1.1, 1.5, "inconclusive")]
)
def test_speed_has_three_answers(low, high, status):
    verdict = judge_speed(contest_of(np.copy), _latency((low + high) / 2, low, high), 1.2, 0.95)
    assert verdict.status == status


def test_speed_says_how_many_rounds_would_decide():
    verdict = judge_speed(contest_of(np.copy), _latency(1.3, 1.1, 1.5), 1.2, 0.95)
    assert "about 80 rounds like these would" in verdict.reasons[0]
    few = judge_speed(contest_of(np.copy), _latency(3, 2.9, 3.1, rounds=2, reliable=False), 1.2, 0.95)
    assert few.status == "inconclusive"
    assert "at least 6 are needed" in few.reasons[0]


def test_the_speed_of_an_engine_that_did_not_run_is_not_judged():
    contest = contest_of(np.copy, why_not="there is no GPU")
    passed = _accuracy(paired_proportions(0, 0, 10_000, 0.95))
    verdict = judge(contest, passed, _latency(9, 8, 10), Gate(min_speedup=1.2))
    assert verdict.status == "inconclusive"
    assert "did not run here" in verdict.reasons[1]
    assert judge(contest, passed, _latency(9, 8, 10), Gate()).status == "passed"


def test_the_worst_answer_wins_and_every_reason_stays():
    passed, missed, unsure = (Verdict(s, (s,)) for s in ("passed", "missed", "inconclusive"))  # type: ignore[arg-type]
    assert worst([passed, unsure]).status == "inconclusive"
    assert worst([unsure, missed, passed]) == Verdict("missed", ("inconclusive", "missed", "passed"))
    assert worst([passed, passed]).status == "passed"


def test_a_speedup_over_another_device_is_not_judged():
    contest = contest_of(np.copy)
    contest.candidate.runner.environment = Environment("NVIDIA H100", "TensorRT")
    verdict = judge_speed(contest, _latency(4.0, 3.9, 4.1), 1.0, 0.95)
    assert verdict.status == "inconclusive" and "another device" in verdict.reasons[0]
