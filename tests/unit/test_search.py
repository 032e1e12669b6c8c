"""The search for the layers that cost the accuracy: how it walks, and that it mends a model that INT8 ruins."""

from __future__ import annotations

import numpy as np
import pytest

import optkit
from optkit.errors import GateError
from optkit.quantize.placement import name_nodes
from optkit.recipe import Recipe
from optkit.report.text import render
from optkit.search import fewest

RUINED = "MatMul_2"
RNG = np.random.default_rng(3)


@pytest.mark.parametrize("most", [1, 2, 3, 7, 8, 20])
def test_fewest_finds_every_threshold(most):
    for threshold in range(1, most + 1):
        tried = []

        def passes(count, tried=tried, threshold=threshold):
            tried.append(count)
            return count >= threshold

        assert fewest(most, passes) == threshold
        assert len(tried) == len(set(tried)) <= 2 * most.bit_length()


@pytest.mark.parametrize("most", [0, 1, 5])
def test_fewest_gives_up_where_nothing_passes(most):
    assert fewest(most, lambda count: False) is None


def weight():
    return (RNG.standard_normal((32, 32)) / 32**0.5).astype("f")


@pytest.fixture
def chain(net):
    """Four products. The second has one large weight in each column, for an input that is small."""
    arrays = {f"w{i}": weight() for i in range(4)}
    arrays["w0"][:, 0] /= 500
    arrays["w1"][0] *= 500
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
def recipe(tmp_path):
    """INT8 of the chain, judged by how often its largest output is the float model's."""
    np.savez(tmp_path / "rows.npz", x=RNG.standard_normal((1200, 32)).astype("f"))
    (tmp_path / "data.yaml").write_text(
        "source: {kind: npz, path: rows.npz}\nsplits: {calibration: {count: 128}}\ninputs: {x: x}\nmetric: agreement\n"
    )

    def make(**gate):
        return Recipe.load("int8").updated(
            passes=[{"use": "quantize_int8", "smooth": False, "calibrate": {"method": "max"}}, {"use": "build_engine"}],
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
    (step, _) = bundle.recipe.passes
    assert step.exclude == (RUINED,)  # a plain list, which compiles to the same bundle again


def test_the_recipe_that_was_found_makes_the_same_model(chain, recipe, tmp_path):
    found = optkit.compile(chain, recipe(max_drop=5), tmp_path / "found")
    again = optkit.compile(chain, found.recipe, tmp_path / "again")
    assert "search" not in again.report
    assert (again.path / "model.onnx").read_bytes() == (found.path / "model.onnx").read_bytes()


def test_a_budget_that_no_choice_keeps_is_missed_and_says_so(chain, recipe, tmp_path):
    with pytest.raises(GateError, match=r"keeps the drop within 0\.4: not even with only") as caught:
        optkit.compile(chain, recipe(max_drop=0.4), tmp_path / "out")
    report = caught.value.bundle.report
    assert report["search"]["chosen"] is None and report["search"]["excluded"] == []
    assert len(report["search"]["points"]) == 4
    assert "chosen" not in render(report).split("Stages")[0].split("what each choice gave")[1]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir() and "out" in path.name] == ["out.rejected"]


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
