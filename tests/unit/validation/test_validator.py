import json
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from optkit.context import Context
from optkit.data import random_data
from optkit.errors import DataError, UnavailableError, UsageError
from optkit.metrics import Cosine
from optkit.models import DimRange, Engine, OnnxModel, Signature, TensorSpec, TorchModel
from optkit.pipeline import Stage
from optkit.recipe import Gate, LatencySettings, Recipe, ValidationSettings
from optkit.report.text import render
from optkit.validation import Contest, Entrant, compare_entrants, validate

from .conftest import QUICK, SIGNATURE, Arrays, Function, contest_of

QUICK_SETTINGS = ValidationSettings(latency=QUICK, stage_samples=8)


@pytest.fixture(scope="module")
def exported() -> tuple[TorchModel, OnnxModel]:
    """A small torch model, and what torch.onnx makes of it."""
    import torch

    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 32), torch.nn.GELU(), torch.nn.Linear(32, 3)).eval()
    signature = Signature(SIGNATURE.inputs, SIGNATURE.outputs, {"batch": DimRange(1, 4, 32)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        program = torch.onnx.export(
            module,
            (torch.zeros(2, 3),),
            dynamo=True,
            input_names=["x"],
            output_names=["y"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    assert program is not None
    return TorchModel(module, signature), OnnxModel(program.model, signature)


@pytest.fixture
def labelled(exported, context) -> Context:
    """Samples whose labels are what the torch model says."""
    import torch

    x = np.random.default_rng(3).normal(size=(900, 3)).astype(np.float32)
    with torch.inference_mode():
        labels = exported[0].module(torch.from_numpy(x)).numpy().argmax(axis=1)
    return Context(context.target, context.scratch, Arrays(x, labels))


def _wrecked(model: OnnxModel) -> OnnxModel:
    """The same graph with other weights."""
    import onnx_ir as ir

    after = model.clone()
    for value in after.ir.graph.initializers.values():
        assert value.const_value is not None
        value.const_value = ir.tensor(np.flip(value.const_value.numpy()).copy(), name=value.name)
    return after


def _recipe(**changes: object) -> Recipe:
    return Recipe.model_validate(
        {"name": "small", "passes": ["export_onnx", "build_engine"], "validation": QUICK_SETTINGS, **changes}
    )


def test_an_exported_torch_model_passes_end_to_end(exported, labelled):
    torch_model, onnx_model = exported
    stages = [Stage("checkpoint", torch_model, 0), Stage("export_onnx", onnx_model, 1)]
    report = validate(stages, _recipe(), labelled)
    document = report.document
    assert report.verdict.status == "passed", report.verdict.reasons
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["accuracy"]["baseline"] == document["accuracy"]["candidate"] == 1
    assert document["accuracy"]["n"] == 900
    assert document["accuracy"]["per_output"]["y"]["sqnr_db"] > 100
    assert list(document["latency"]["runners"]) == ["PyTorch", "FP32 ONNX", "ONNX"]
    assert [len(turns["samples_us"]) for turns in document["latency"]["runners"].values()] == [6, 6, 6]
    assert document["latency"]["batch"] == 4
    (stage,) = document["stages"]
    assert (stage["name"], stage["precision"], stage["within"]) == ("export_onnx", "float32", True)
    assert document["candidate"]["engine_ran"]
    assert document["environment"]["runners"]["PyTorch"]["runtime"].startswith("torch ")
    assert all(len(line) <= 100 for line in render(document).splitlines())


def test_a_wrecked_stage_is_named_and_misses(exported, labelled):
    torch_model, onnx_model = exported
    stages = [
        Stage("checkpoint", torch_model, 0),
        Stage("export_onnx", onnx_model, 1),
        Stage("optimize_graph", onnx_model, 0),
        Stage("wreck", _wrecked(onnx_model), 1),
    ]
    report = validate(stages, _recipe(), labelled)
    assert report.verdict.status == "missed"
    assert [stage["name"] for stage in report.document["stages"]] == ["export_onnx", "wreck"]
    assert report.document["first_past_tolerance"] == "wreck"
    assert any("stage wreck is the first past tolerance for float32" in w for w in report.document["warnings"])
    text = render(report.document)
    assert "small: MISSED" in text
    assert "NO" in text


def test_an_engine_that_cannot_run_is_replaced_by_its_onnx_and_the_report_says_so(exported, labelled, tmp_path):
    torch_model, onnx_model = exported
    engine = Engine(tmp_path / "engine.plan", "tensorrt-rtx", onnx_model.signature)
    rtx = {"passes": ["export_onnx", {"use": "build_engine", "target": "tensorrt-rtx"}]}
    recipe = _recipe(**rtx)
    # On no machine does this file run: there is no GPU, or it is not the one, or the file is not a plan
    with pytest.raises(UnavailableError) as refusal:
        recipe.target.open(engine, 1)
    stages = [
        Stage("checkpoint", torch_model, 0),
        Stage("export_onnx", onnx_model, 1),
        Stage("build_engine", engine, 1),
    ]
    report = validate(stages, _recipe(**rtx, gate={"min_speedup": 1.1}), labelled)
    candidate = report.document["candidate"]
    assert candidate["name"] == "ONNX (not the engine)"
    assert not candidate["engine_ran"]
    assert candidate["why_not"] == str(refusal.value)
    assert "tensorrt-rtx engine was built from" in candidate["what"]
    assert report.verdict.status == "inconclusive"
    assert "cannot be judged" in report.verdict.reasons[-1]
    assert report.document["stages"][-1]["why_not"] == candidate["why_not"]
    assert "The engine did not run on this machine" in render(report.document)
    assert validate(stages, recipe, labelled).verdict.status == "passed"


def test_what_the_inspector_told_of_an_engine_is_in_the_report(exported, labelled, tmp_path):
    told = {"precisions": {"FP16": 2}, "reformats": 0, "islands": [], "unproved": [], "layers": [{"name": "conv"}]}
    engine = Engine(tmp_path / "engine.plan", "tensorrt-rtx", exported[1].signature, {"inspector": told})
    recipe = _recipe(passes=["export_onnx", {"use": "build_engine", "target": "tensorrt-rtx"}])
    stages = [
        Stage("checkpoint", exported[0], 0),
        Stage("export_onnx", exported[1], 1),
        Stage("build_engine", engine, 1),
    ]
    report = validate(stages, recipe, labelled)
    assert report.document["inspector"] == told
    assert "Layers of the engine: 2 in FP16\n" in render(report.document)


def test_a_lower_precision_is_timed_against_the_optimized_float_model(exported, labelled):
    onnx_model = exported[1]
    half = onnx_model.clone()
    output = half.ir.graph.outputs[0].producer()
    assert output is not None
    _cast_through_half(half, output)
    stages = [
        Stage("checkpoint", onnx_model, 0),
        Stage("optimize_graph", onnx_model.clone(), 1),
        Stage("cast_fp16", half, 1),
    ]
    report = validate(stages, _recipe(gate={"min_speedup": 0.01}), labelled)
    assert list(report.document["latency"]["runners"]) == ["FP32 ONNX", "optimized FP32 ONNX", "ONNX"]
    assert "times as fast as optimized FP32 ONNX" in report.verdict.reasons[1]
    assert report.document["accuracy"]["others"] == {}
    assert [stage["precision"] for stage in report.document["stages"]] == ["float32", "float16"]


def test_what_a_cast_kept_in_float32_is_in_the_report(exported, labelled):
    reasons = {f"sum_{i}": "ReduceSum would overflow or lose digits" for i in range(9)}
    reasons["wide"] = "'w' holds 1e+05, FP16 ends at 65504"
    cast = exported[1].with_record("kept_float32", reasons)
    stages = [Stage("checkpoint", exported[1], 0), Stage("cast_fp16", cast, 1)]
    document = validate(stages, _recipe(), labelled).document
    assert document["kept_float32"] == reasons
    text = " ".join(render(document).split())
    assert "Kept in float32: 10 nodes" in text
    assert "sum_0, sum_1, sum_2, sum_3, sum_4, sum_5 and 3 more: ReduceSum would overflow" in text
    assert "wide: 'w' holds 1e+05, FP16 ends at 65504" in text
    assert "kept_float32" not in validate(stages[:1], _recipe(), labelled).document


def _cast_through_half(model: OnnxModel, node: Any) -> None:
    import onnx_ir as ir

    down = ir.node("Cast", [node.inputs[0]], {"to": ir.DataType.FLOAT16.value})
    up = ir.node("Cast", [down.outputs[0]], {"to": ir.DataType.FLOAT.value})
    node.replace_input_with(0, up.outputs[0])
    model.ir.graph.insert_before(node, [down, up])


def test_an_incoming_onnx_model_is_the_reference(exported, labelled):
    stages = [Stage("checkpoint", exported[1], 0), Stage("optimize_graph", exported[1], 0)]
    document = validate(stages, _recipe(), labelled).document
    assert document["accuracy"]["reference"] == "FP32 ONNX"
    assert document["stages"] == []


def test_nan_from_the_candidate_misses_whatever_the_gate_allows(on_samples, samples):
    contest = contest_of(lambda x: np.where(x == samples.x[5], np.float32("nan"), x))
    report = compare_entrants(contest, on_samples, QUICK_SETTINGS, Gate(max_drop=100))
    assert report.verdict.status == "missed"
    assert "new gives NaN in output 'y' for validation sample 5" in report.verdict.reasons[0]
    assert report.document["accuracy"]["candidate"] is None
    assert "NaN" in render(json.loads(json.dumps(report.document, allow_nan=False)))


def test_random_inputs_are_said_to_prove_little(context):
    data = random_data(SIGNATURE, count=40)
    report = compare_entrants(contest_of(np.copy), replace(context, data=data), QUICK_SETTINGS, Gate())
    assert report.verdict.status == "passed"
    assert any("random numbers, which prove little" in warning for warning in report.document["warnings"])
    assert not report.document["accuracy"]["labelled"]
    assert report.document["samples"]["count"] == 40


def test_a_metric_without_labels_is_said_to_compare_only(samples, context):
    data = Arrays(samples.x, metric=Cosine())
    report = compare_entrants(contest_of(np.copy), replace(context, data=data), QUICK_SETTINGS, Gate())
    assert any("cosine looks at no labels" in warning for warning in report.document["warnings"])


def test_a_speedup_is_judged_against_the_rival(on_samples):
    contest = Contest(
        (Entrant("slow", Function(np.copy, 4e-3)), Entrant("rival", Function(np.copy, 2e-3))),
        Entrant("new", Function(np.copy, 1e-3)),
        "rival",
    )
    gate = {wanted: Gate(max_drop=5, min_speedup=wanted) for wanted in (1.9, 2.1)}
    assert compare_entrants(contest, on_samples, QUICK_SETTINGS, gate[1.9]).verdict.status == "passed"
    missed = compare_entrants(contest, on_samples, QUICK_SETTINGS, gate[2.1])
    assert missed.verdict.status == "missed"
    assert "new is 2.00 times as fast as rival" in missed.verdict.reasons[1]
    assert missed.document["latency"]["ratios"]["slow"]["ratio"] == pytest.approx(4)


def test_the_same_seed_gives_the_same_document(samples, context):
    noisy = contest_of(lambda x: np.round(x, 1))
    data = Arrays(samples.x, metric=Cosine())
    reports = [
        compare_entrants(noisy, replace(context, data=data), QUICK_SETTINGS, Gate()).document["accuracy"] for _ in "ab"
    ]
    assert reports[0] == reports[1]


def test_entrants_of_different_boundaries_are_refused():
    other = Signature(SIGNATURE.inputs, (TensorSpec("logits", "float32", ("batch", 3)),))
    with pytest.raises(UsageError, match=r"new cannot be compared with base: its outputs are logits"):
        Contest((Entrant("base", Function(np.copy)),), Entrant("new", Function(np.copy, 1, other)), "base")


def test_no_data_at_all_is_refused(context):
    with pytest.raises(DataError, match="nothing to validate on"):
        compare_entrants(contest_of(np.copy), context, QUICK_SETTINGS, Gate())


def test_real_runners_keep_their_order(exported, labelled):
    # PyTorch's and ONNX Runtime's clocks are real here: only what must hold on any machine is asked
    stages = [Stage("checkpoint", exported[0], 0), Stage("export_onnx", exported[1], 1)]
    settings = ValidationSettings(latency=LatencySettings(rounds=6, seconds=0.005, warmup=0.01), stage_samples=4)
    document = validate(stages, _recipe(validation=settings), labelled).document
    for timed in document["latency"]["runners"].values():
        assert 0 < timed["p50_ms"] <= timed["p90_ms"]
        assert timed["throughput_per_s"] == pytest.approx(4 / timed["p50_ms"] * 1e3)
    for ratio in document["latency"]["ratios"].values():
        assert ratio["interval"][0] <= ratio["ratio"] <= ratio["interval"][1]


@pytest.mark.parametrize(("target", "optimization"), [("tensorrt-rtx", "none"), ("onnxruntime", "all")])
def test_int8_as_given_runs_as_written_unless_onnxruntime_is_the_target(
    onnx_model, context, tmp_path, target, optimization
):
    model = onnx_model("""g (float[batch, 3] x) => (float[batch, 3] y) <float s = {0.03125}, int8 z = {0}> {
      q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)  y = Relu(d) }""")
    model = replace(model, signature=replace(model.signature, dims={"batch": DimRange(1, 4, 32)}))
    x = np.random.default_rng(3).normal(size=(40, 3)).astype(np.float32)
    recipe = _recipe(passes=[{"use": "build_engine", "target": target}], gate={"max_drop": 5})
    engine = recipe.target.build(model, tmp_path, context) if target == "onnxruntime" else None
    stages = [Stage("checkpoint", model, 0)]
    stages.append(Stage("build_engine", engine or Engine(tmp_path / "engine.plan", target, model.signature), 1))
    report = validate(stages, recipe, Context(recipe.target, context.scratch, Arrays(x, None, Cosine())))
    given = report.document["latency"]["runners"]["ONNX as given (int8)"]
    assert given["settings"]["optimization"] == optimization
