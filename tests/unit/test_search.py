"""The search for the layers that cost the accuracy: how it walks, and that it mends a model that INT8 ruins."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import optkit
from optkit import search
from optkit.errors import GateError
from optkit.quantize.placement import name_nodes
from optkit.recipe import Recipe
from optkit.report.text import render
from optkit.search import GLANCE, fewest
from optkit.targets.base import TENSORRT, Dialect
from optkit.targets.onnxruntime import OnnxRuntimeTarget

RUINED = "MatMul_2"
PLAIN = {"smooth": False, "calibrate": {"method": "max"}}
RNG = np.random.default_rng(3)
START = RNG.bit_generator.state


@pytest.fixture(autouse=True)
def same_numbers():
    """Every test draws the same numbers, whichever ran before it."""
    RNG.bit_generator.state = START


@pytest.mark.parametrize("most", [1, 2, 3, 7, 8, 20])
def test_fewest_finds_every_threshold_from_every_guess(most):
    for threshold, guess in itertools.product(range(1, most + 1), range(most + 3)):
        tried = []

        def passes(count, tried=tried, threshold=threshold):
            tried.append(count)
            return count >= threshold

        assert fewest(most, passes, guess) == threshold
        assert tried[0] == min(max(guess, 1), most)
        assert len(tried) == len(set(tried)) <= 2 * abs(threshold - tried[0]).bit_length() + 2


def test_fewest_tries_nothing_that_is_known_to_fail():
    for known, threshold in itertools.combinations(range(21), 2):
        tried = []
        assert fewest(20, lambda count: tried.append(count) or count >= threshold, known + 1, known) == threshold  # noqa: B023
        assert min(tried) > known
    assert fewest(3, lambda count: pytest.fail("nothing is left"), 4, 3) is None


@pytest.mark.parametrize("most", [0, 1, 5])
@pytest.mark.parametrize("guess", [1, 3, 9])
def test_fewest_gives_up_where_nothing_passes(most, guess):
    tried = []
    assert fewest(most, lambda count: tried.append(count), guess) is None
    assert len(tried) == len(set(tried)) and tried[-1:] == [most][: most > 0]


def weight():
    return (RNG.standard_normal((32, 32)) / 32**0.5).astype("f")


def chained(net, *ruined):
    """Four products. A ruined one has one large weight in each column, for an input that is small."""
    arrays = {f"w{i}": weight() for i in range(4)}
    for place in ruined:
        arrays[f"w{place - 1}"][:, 0] /= 500
        arrays[f"w{place}"][0] *= 500
    model = net(
        """g (float[batch,32] x) => (float[batch,32] y) {
            a = MatMul(x, w0)  b = Tanh(a)  c = MatMul(b, w1)  d = Tanh(c)  e = MatMul(d, w2)  f = Tanh(e)
            y = MatMul(f, w3)
        }""",
        **arrays,
    )
    name_nodes(model)
    return model


@pytest.fixture
def chain(net):
    """With the second product ruined."""
    return chained(net, 1)


@pytest.fixture
def recipe(tmp_path):
    """INT8 of the chain, judged by how often its largest output is the float model's."""
    np.savez(tmp_path / "rows.npz", x=RNG.standard_normal((1200, 32)).astype("f"))
    (tmp_path / "data.yaml").write_text(
        "source: {kind: npz, path: rows.npz}\nsplits: {calibration: {count: 128}}\ninputs: {x: x}\nmetric: agreement\n"
    )

    def make(step=PLAIN, **gate):
        return Recipe.load("int8").updated(
            passes=[{"use": "quantize_int8", **step}, {"use": "build_engine"}],
            data=str(tmp_path / "data.yaml"),
            validation={"stage_samples": 4, "latency": {"rounds": 2, "seconds": 0.001, "warmup": 0.0}},
            gate=gate,
            threads=1,
        )

    return make


def test_the_layer_that_int8_ruins_goes_back_to_float(chain, recipe, tmp_path):
    bundle = optkit.compile(chain, recipe(max_drop=5), tmp_path / "out")
    search = bundle.report["search"]
    assert search["excluded"] == [RUINED] == search["order"][:1]
    assert [point["in_float"] for point in search["points"]] == [0, 1]
    full, mended = search["points"]
    assert full["accuracy"] == "missed" and mended["accuracy"] == "passed"
    assert full["int8_macs"] == 1.0 and mended["int8_macs"] == 0.75
    assert mended["drop_points"] == bundle.report["accuracy"]["drop_points"] < full["drop_points"]
    assert "1 of 4 INT8 layers went back to float" in bundle.summary
    speeds = [point["ratios"]["FP32 twin"] for point in search["points"]]
    shown = bundle.summary.partition("what each choice gave\n")[2].splitlines()
    assert [f"{speed:.2f}" in line.split() for speed, line in zip(speeds, shown[1:3], strict=True)] == [True, True]
    assert shown[3] == "  speed: how many times as fast as the FP32 twin, timed in the same rounds"
    (step, _) = bundle.recipe.passes
    assert step.exclude == (RUINED,)  # a plain list, which compiles to the same bundle again


@pytest.fixture
def depthwise(net, tmp_path, monkeypatch):
    """A depthwise convolution, the one that reads it, which INT8 ruins, and another one or not.

    ONNX Runtime stands in for TensorRT, whose policy has the depthwise one in INT8 only beside the other.
    """
    monkeypatch.setattr(OnnxRuntimeTarget, "dialect", property(lambda self: Dialect(int8=TENSORRT)))

    def make(others):
        arrays = {name: RNG.standard_normal((32, 32, 1, 1)).astype("f") / 6 for name in ("v", "u")}
        arrays["w"] = RNG.standard_normal((32, 1, 3, 3)).astype("f") / 3
        arrays["v"][:, 0] *= 500
        arrays["w"][0] /= 500
        more = "q = Conv(t, u) r = Tanh(q)" if others else "r = Identity(t)"
        model = net(
            f"""g (float[batch,32,4,4] x) => (float[batch,32] y) {{
                d = Conv <group = 32, pads = [1,1,1,1]> (x, w) p = Conv(d, v) t = Tanh(p) {more}
                a = GlobalAveragePool(r) y = Flatten(a)
            }}""",
            **arrays,
        )
        name_nodes(model)
        np.savez(tmp_path / "rows.npz", x=RNG.standard_normal((1200, 32, 4, 4)).astype("f"))
        return model

    return make


def test_what_makes_no_sense_in_int8_alone_goes_back_too_and_is_counted(depthwise, recipe, tmp_path):
    wanted = recipe(PLAIN, max_drop=5, slow_int8="report")
    bundle = optkit.compile(depthwise(others=1), wanted, tmp_path / "out")
    last = bundle.report["search"]["points"][-1]
    assert bundle.report["search"]["excluded"] == ["Conv_1"]
    assert (last["in_float"], last["in_int8"]) == (2, 1)
    assert last["int8_macs"] == pytest.approx(1024 / (1024 + 1024 + 288), abs=0.01)
    assert "2 of 3 INT8 layers went back to float" in bundle.summary


def test_a_search_ends_where_nothing_would_be_left_in_int8(depthwise, recipe, tmp_path):
    with pytest.raises(GateError) as caught:
        optkit.compile(depthwise(others=0), recipe(PLAIN, max_drop=3), tmp_path / "out")
    assert caught.value.bundle.report["search"]["chosen"] is None
    assert "not even with only Conv_1, Conv_0 in INT8" in " ".join(caught.value.bundle.summary.split())


def test_the_recipe_that_was_found_makes_the_same_model(chain, recipe, tmp_path):
    found = optkit.compile(chain, recipe(max_drop=5), tmp_path / "found")
    again = optkit.compile(chain, found.recipe, tmp_path / "again")
    assert "search" not in again.report
    assert (again.path / "model.onnx").read_bytes() == (found.path / "model.onnx").read_bytes()


def test_so_does_one_with_smoothing_of_a_layer_that_goes_back(net, recipe, tmp_path):
    uneven = np.geomspace(1, 100, 32, dtype="f")
    tails = net(
        """g (float[batch,32] x) => (float[batch,32] y) {
            a = MatMul(x, w0)  b = Pow(a, seven)  c = Mul(b, uneven)  y = MatMul(c, w1)
        }""",
        w0=weight(),
        w1=weight() / uneven[:, None],
        seven=np.float32(7),
        uneven=uneven,
    )
    step = {"activations": "static", "round": "nearest"}
    found = optkit.compile(tails, recipe(step, max_drop=10), tmp_path / "found")
    assert found.report["search"]["excluded"] == ["MatMul_3"]
    again = optkit.compile(tails, found.recipe, tmp_path / "again")
    assert (again.path / "model.onnx").read_bytes() == (found.path / "model.onnx").read_bytes()


def test_a_choice_that_does_not_hold_by_its_own_recipe_is_not_chosen(chain, recipe, tmp_path, monkeypatch):
    compiled = search._Rest.compiled

    def worse(rest, count):
        attempt = compiled(rest, count)
        if count == 1:
            attempt.report.document["accuracy"]["status"] = "inconclusive"
        return attempt

    monkeypatch.setattr(search._Rest, "compiled", worse)
    bundle = optkit.compile(chain, recipe(max_drop=5), tmp_path / "out")
    points = {point["in_float"]: point["accuracy"] for point in bundle.report["search"]["points"]}
    assert points == {0: "missed", 1: "inconclusive", 2: "passed"}
    assert len(bundle.recipe.int8[1].exclude) == 2


def test_a_budget_that_no_choice_keeps_is_missed_and_says_so(net, recipe, tmp_path):
    wide = weight()
    wide[0] *= 500
    scale = np.ones(32, "f")
    scale[0] /= 500
    alone = net(
        "g (float[batch,32] x) => (float[batch,32] y) { a = Mul(x, s)  b = Tanh(a)  y = MatMul(b, w) }", s=scale, w=wide
    )
    with pytest.raises(GateError, match=r"keeps the drop within 5: not even with only MatMul_2 in INT8") as caught:
        optkit.compile(alone, recipe(max_drop=5), tmp_path / "out")
    search = caught.value.bundle.report["search"]
    assert search["chosen"] is None and [point["accuracy"] for point in search["points"]] == ["missed"]


def test_a_budget_that_the_samples_cannot_show_is_told_from_one_that_is_missed(chain, recipe, tmp_path):
    with pytest.raises(GateError, match=r"1072 samples are too few to rule it out: with only MatMul_\d") as caught:
        optkit.compile(chain, recipe(max_drop=0.4), tmp_path / "out")
    report = caught.value.bundle.report
    assert report["search"]["chosen"] is None and report["search"]["excluded"] == []
    full, fewest_in_int8 = report["search"]["points"][0], report["search"]["points"][-1]
    assert (full["in_int8"], full["accuracy"]) == (4, "missed")
    assert (fewest_in_int8["in_int8"], fewest_in_int8["accuracy"]) == (1, "inconclusive")
    assert "chosen" not in render(report).split("Stages")[0].split("what each choice gave")[1]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir() and "out" in path.name] == ["out.rejected"]


def test_noise_says_where_to_begin_and_first_samples_condemn_what_is_hopeless(net, recipe, tmp_path, caplog):
    caplog.set_level("INFO", "optkit.search")
    search = optkit.compile(chained(net, 1, 3), recipe(max_drop=5), tmp_path / "out").report["search"]
    assert search["chosen"] == 2 and set(search["excluded"]) == {RUINED, "MatMul_6"}
    points = {point["in_float"]: point for point in search["points"]}
    assert (points[0]["samples"], points[1]["samples"], points[2]["samples"]) == (1072, GLANCE, 1072)
    assert points[1]["accuracy"] == "missed"
    told = [record.getMessage() for record in caplog.records if record.name == "optkit.search"]
    assert told[0] == "accuracy is missed: looking for the layers that cost it, of 4 in INT8"
    # The guess, one layer fewer, and what was chosen by its own recipe
    assert [message[:1] for message in told[1:]] == ["2", "1", "2"]


def test_the_recipe_can_forbid_the_search(chain, recipe, tmp_path):
    with pytest.raises(GateError) as caught:
        optkit.compile(chain, recipe(max_drop=5, lossy_int8="report"), tmp_path / "out")
    assert "search" not in caught.value.bundle.report


def test_too_few_samples_are_not_searched(chain, recipe, tmp_path):
    few = recipe(max_drop=5)
    few = few.updated(validation={**few.validation.model_dump(mode="json"), "samples": 40})
    with pytest.raises(GateError) as caught:
        optkit.compile(chain, few, tmp_path / "out")
    report = caught.value.bundle.report
    assert report["accuracy"]["reachable"] is False
    assert "search" not in report
