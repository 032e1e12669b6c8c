"""Is INT8 worth it: what the report says, and what the gate has done about it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import optkit
from optkit import worth
from optkit.context import Context
from optkit.errors import PreconditionError
from optkit.models import OnnxModel
from optkit.passes.quantize_int8 import QuantizeInt8
from optkit.pipeline import Stage, run_passes
from optkit.recipe import Recipe
from optkit.report.text import render
from optkit.search import Attempt
from optkit.validation import Report, Verdict
from optkit.validation.twin import NoTwin, Twin, build_twin
from optkit.worth import weigh

# Two products. In INT8 the large one is faster on any processor, and the small one is not: it is done before its input
# is quantized
TEXT = """g (float[batch,1024] x) => (float[batch,4] y) {
    [large] a = MatMul(x, w)
    [between] b = Tanh(a)
    [narrow] c = Slice(b, zero, four, one)
    [also_between] d = Tanh(c)
    [small] y = MatMul(d, v)
}"""
BATCH = 64


@pytest.fixture
def model(net) -> OnnxModel:
    rng = np.random.default_rng(0)
    ints = {"zero": [0], "four": [4], "one": [1]}
    return net(
        TEXT,
        w=(rng.standard_normal((1024, 1024)) / 32).astype("f"),
        v=rng.standard_normal((4, 4)).astype("f"),
        **{name: np.array(value) for name, value in ints.items()},
    )


@pytest.fixture
def with_data(context, array_data) -> Context:
    return replace(context, data=array_data({"x": np.random.default_rng(1).standard_normal((BATCH, 1024)).astype("f")}))


STEP = {
    "use": "quantize_int8",
    "activations": "static",
    "smooth": False,
    "correct_bias": False,
    "calibrate": {"method": "max"},
}


@pytest.fixture
def run(model, with_data) -> Callable[..., Attempt]:
    """Weigh an attempt whose twin is as slow as the judge says, one number for each validation."""

    def weighed(ratios: Sequence[float | None], exclude: Sequence[str] = (), **gate: Any) -> Attempt:
        recipe = Recipe.model_validate(
            {
                "passes": [{**STEP, "exclude": exclude}, "build_engine"],
                "gate": gate,
                "dims": {"batch": [1, BATCH, BATCH]},
            }
        )
        left = list(ratios)

        def judge(stages: Sequence[Stage], by: Recipe) -> Report:
            quantized = any(stage.name == "quantize_int8" for stage in stages)
            return judged(left.pop(0) if quantized else None, by)

        stages = run_passes(recipe.passes, model, with_data)
        twin = build_twin(stages, recipe, with_data)
        found = weigh(Attempt(recipe, stages, judge(stages, recipe)), twin, with_data, judge)
        assert not left
        return found

    return weighed


def judged(ratio: float | None, recipe: Recipe) -> Report:
    """The report of a validation that found the engine ``ratio`` times as fast as its twin, give or take 5 %."""
    verdict = "no difference shown"
    if ratio is not None and abs(ratio - 1) > 0.05:
        verdict = "faster" if ratio > 1 else "slower"
    found = {"ratio": ratio, "interval": [(ratio or 0) - 0.05, (ratio or 0) + 0.05], "verdict": verdict}
    document = {
        "recipe": recipe.name,
        "candidate": {"name": "engine", "why_not": None},
        "accuracy": {"drop_points": 0.1, "status": "passed"},
        "latency": {
            "runners": {"engine": {"median_ms": 20.0}},
            "ratios": {} if ratio is None else {"FP32 twin": {**found, "reliable": True, "rounds": 20}},
        },
        "verdict": {"status": "passed", "reasons": ["as accurate"]},
    }
    return Report(Verdict("passed", ("as accurate",)), document)


def section(attempt: Attempt) -> dict[str, Any]:
    found: dict[str, Any] = attempt.report.document["int8"]
    return found


def exclude(attempt: Attempt) -> set[str]:
    (step,) = (step for step in attempt.recipe.passes if isinstance(step, QuantizeInt8))
    return set(step.exclude)


def shown(attempt: Attempt) -> str:
    """What the summary says beside the tables that this judge has no numbers for."""
    document = {key: attempt.report.document[key] for key in ("recipe", "candidate", "int8", "verdict")}
    return render(document)


def test_int8_that_pays_is_left_alone(run):
    found = run([1.3], slow_int8="twin")
    assert section(found) | {"interval": None} == {
        "twin": "FP32 twin", "pays": True, "why_not": None, "ratio": 1.3, "interval": None,
        "regions": [], "regions_why_not": None, "done": "report", "rollbacks": [],
    }  # fmt: skip
    assert found.report.verdict.reasons == ("as accurate",)
    assert exclude(found) == set()


@pytest.mark.parametrize(("ratio", "how"), [(0.8, "is slower than"), (1.02, "is not shown to be faster than")])
def test_int8_that_does_not_pay_is_said_with_its_regions(run, ratio, how):
    found = run([ratio])
    assert section(found)["pays"] is False
    assert found.report.verdict.status == "passed"  # whether that misses the gate is for min_speedup to say
    reason, hint = found.report.verdict.reasons[1:]
    assert f"INT8 {how} its FP32 twin: {ratio:.2f} times as fast, with 95 % confidence from" in reason
    assert "Regions that do not pay: small (" in reason
    assert hint.startswith(
        "gate.slow_int8 can give the FP32 twin instead (twin), or put what loses time there, 1 node, back"
    )
    regions = {region["name"]: region for region in section(found)["regions"]}
    assert set(regions) == {"large", "small"}
    small = regions["small"]
    assert not small["pays"] and small["interval"][0] <= small["ratio"] <= small["interval"][1] and small["ratio"] < 1
    assert small["ratio"] == pytest.approx(small["twin_ms"] / small["int8_ms"], rel=0.5)
    parts = {part["nodes"][0]: part for part in small["parts"]}
    assert parts["d_QuantizeLinear"]["twin_ms"] == 0  # what only INT8 needs
    (product,) = (part for part in small["parts"] if "small" in part["nodes"])
    assert product["int8_ms"] > 0 and product["twin_ms"] > 0
    assert regions["large"]["int8_ms"] > small["int8_ms"]
    assert "does not pay" in shown(found)
    assert re.search(r"d_QuantizeLinear +\S+ +-\n", shown(found))


def test_the_twin_takes_the_place_of_int8(run):
    found = run([0.8], slow_int8="twin")
    assert [step.use for step in found.recipe.passes] == ["build_engine"]
    assert [stage.name for stage in found.stages] == ["checkpoint", "build_engine"]
    assert section(found)["done"] == "twin"
    assert "so this is the FP32 twin: the recipe without quantize_int8" in found.report.verdict.reasons[-1]
    (built_from,) = (stage.model for stage in found.stages if isinstance(stage.model, OnnxModel))
    assert built_from.records["instead_of_int8"]["ratio"] == 0.8
    assert "FP32 twin" in found.recipe.description
    assert Recipe.parse(found.recipe.to_yaml()) == found.recipe
    assert "so this is the FP32 twin" in " ".join(shown(found).split())


def test_regions_that_do_not_pay_go_back_to_float(run):
    found = run([0.8, 1.2], slow_int8="rollback")
    assert exclude(found) == {"small"}
    assert section(found)["done"] == "rollback"
    assert [tried["excluded"] for tried in section(found)["rollbacks"]] == [[], ["small"]]
    assert [tried["pays"] for tried in section(found)["rollbacks"]] == [False, True]
    assert "so 1 node that lost time went back to float" in found.report.verdict.reasons[-1]
    quantized = next(stage.model for stage in found.stages if stage.name == "quantize_int8")
    assert isinstance(quantized, OnnxModel)
    assert quantized.records["quantization"]["int8"] == ["large"]
    assert "1 in float" in shown(found)


def test_a_rollback_that_makes_it_slower_is_undone(run):
    found = run([0.8, 0.7], slow_int8="rollback")
    assert exclude(found) == set()
    assert section(found)["done"] == "report"
    assert len(section(found)["rollbacks"]) == 2
    assert found.report.verdict.reasons[-1].endswith("made nothing faster.")


def test_where_no_region_pays_a_rollback_is_the_twin(run):
    found = run([0.8], exclude=["large"], slow_int8="rollback")
    assert [step.use for step in found.recipe.passes] == ["build_engine"]
    assert (
        "and no part of it gains more than it costs to enter and leave INT8, so this is the FP32 twin"
        in found.report.verdict.reasons[-1]
    )


def test_where_a_rollback_leaves_nothing_in_int8_it_is_the_twin(run, monkeypatch):
    def nothing_left(*_: object) -> None:
        raise PreconditionError("nothing to quantize")

    monkeypatch.setattr(worth, "_again", nothing_left)
    found = run([0.8], slow_int8="rollback")
    assert [step.use for step in found.recipe.passes] == ["build_engine"]
    assert "there is nothing left in INT8, so this is the FP32 twin" in found.report.verdict.reasons[-1]


def test_what_was_not_timed_is_not_judged(run):
    found = run([None], slow_int8="rollback")
    assert section(found)["pays"] is None
    assert found.report.verdict.reasons[-1].startswith("gate.slow_int8 did nothing: INT8 was not timed beside its twin")
    assert "was not measured" in shown(found)
    assert run([None]).report.verdict.reasons == ("as accurate",)


def test_too_few_rounds_tell_nothing(model, with_data):
    recipe = Recipe.model_validate({"passes": [STEP, "build_engine"]})
    stages = run_passes(recipe.passes, model, with_data)
    report = judged(0.5, recipe)
    report.document["latency"]["ratios"]["FP32 twin"].update(reliable=False, rounds=2)
    found = weigh(Attempt(recipe, stages, report), build_twin(stages, recipe, with_data), with_data, None)  # type: ignore[arg-type]
    assert section(found)["pays"] is None
    assert section(found)["why_not"] == "2 rounds tell nothing, 6 are needed"


def test_without_a_twin_the_report_says_why(model, with_data):
    recipe = Recipe.model_validate({"passes": [STEP, "build_engine"], "gate": {"slow_int8": "twin"}})
    attempt = Attempt(recipe, (), judged(None, recipe))
    found = weigh(attempt, NoTwin("there is no GPU"), with_data, None)  # type: ignore[arg-type]  # asked for nothing
    assert section(found)["why_not"] == "there is no GPU"
    assert "(there is no GPU)" in found.report.verdict.reasons[-1]
    assert weigh(attempt, None, with_data, None) is attempt  # type: ignore[arg-type]


def test_what_the_search_for_accuracy_showed_stays(model, with_data):
    recipe = Recipe.model_validate({"passes": [STEP, "build_engine"], "gate": {"slow_int8": "twin"}})
    stages = run_passes(recipe.passes, model, with_data)
    twin = build_twin(stages, recipe, with_data)
    assert isinstance(twin, Twin)
    report = judged(0.8, recipe)
    searched = Report(report.verdict, {**report.document, "search": {"chosen": 1}})
    found = weigh(Attempt(recipe, stages, searched), twin, with_data, lambda stages, by: judged(None, by))
    assert found.report.document["search"] == {"chosen": 1}


# The whole way


@pytest.fixture
def tiny(net) -> OnnxModel:
    """Products so small that quantizing what they read takes longer than they do."""
    rng = np.random.default_rng(0)
    text = """g (float[batch,8] x) => (float[batch,8] y) {
        a = MatMul(x, w) b = Tanh(a) c = MatMul(b, w) d = Tanh(c) e = MatMul(d, w) f = Tanh(e) y = MatMul(f, w) }"""
    return net(text, w=rng.standard_normal((8, 8)).astype("f"))


def test_a_bundle_holds_the_twin_and_says_so(tiny, tmp_path):
    np.savez(tmp_path / "rows.npz", x=np.random.default_rng(0).standard_normal((200, 8)).astype("f"))
    (tmp_path / "data.yaml").write_text(
        "source: {kind: npz, path: rows.npz}\nsplits: {calibration: {count: 64}}\ninputs: {x: x}\nmetric: cosine\n"
    )
    recipe = Recipe.load("int8").updated(
        passes=[STEP, {"use": "build_engine"}],
        data=str(tmp_path / "data.yaml"),
        validation={"stage_samples": 4, "latency": {"rounds": 8, "seconds": 0.005, "warmup": 0.01}},
        gate={"slow_int8": "twin", "max_drop": 50},
        threads=1,
    )
    bundle = optkit.compile(tiny, recipe, tmp_path / "out")
    assert bundle.report["int8"]["done"] == "twin"
    assert bundle.report["int8"]["ratio"] < 1
    assert bundle.manifest["verdict"] == "passed"
    assert bundle.manifest["records"]["instead_of_int8"]["pays"] is False
    assert [step.use for step in bundle.recipe.passes] == ["build_engine"]
    assert "so this is the FP32 twin" in " ".join(bundle.summary.split())
    assert not any(node == "MatMulIntegerToFloat" for node in bundle.manifest["records"]["engine"]["nodes"])
    x = np.random.default_rng(1).standard_normal((3, 8)).astype("f")
    (initializer,) = tiny.ir.graph.initializers.values()
    w = initializer.const_value.numpy()
    expected = np.tanh(np.tanh(np.tanh(x @ w) @ w) @ w) @ w
    np.testing.assert_allclose(bundle(x)["y"], expected, atol=1e-5)
