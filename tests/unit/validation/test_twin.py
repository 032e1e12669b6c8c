"""The twin: the same recipe without INT8, on the same target with the same settings."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from optkit.context import Context
from optkit.models import Engine, OnnxModel
from optkit.pipeline import Stage, run_passes
from optkit.recipe import Recipe
from optkit.validation import validate
from optkit.validation.twin import NoTwin, Twin, build_twin, twin_passes

from .conftest import QUICK

TEXT = "g (float[batch,32] x) => (float[batch,32] y) { a = MatMul(x, w) b = Relu(a) y = MatMul(b, w) }"


@pytest.fixture
def model(net) -> OnnxModel:
    return net(TEXT, w=np.random.default_rng(0).standard_normal((32, 32)).astype("f"))


@pytest.fixture
def with_data(context, array_data) -> Context:
    return replace(context, data=array_data({"x": np.random.default_rng(1).standard_normal((64, 32)).astype("f")}))


def recipe(*passes: object, **changes: object) -> Recipe:
    steps = passes or ({"use": "quantize_int8", "smooth": False}, "build_engine")
    return Recipe.model_validate({"passes": steps, "validation": {"latency": QUICK, "stage_samples": 4}, **changes})


def names(steps) -> list[str]:
    return [step.use for step in steps]


def test_the_twin_is_built_from_what_was_quantized(model, with_data):
    target = {"name": "onnxruntime", "optimization": "extended"}
    made = recipe({"use": "quantize_int8", "smooth": False}, {"use": "build_engine", "target": target})
    stages = run_passes(made.passes, model, with_data)
    twin = build_twin(stages, made, with_data)
    assert isinstance(twin, Twin) and twin.engine is not None
    assert names(twin.recipe.passes) == ["build_engine"]
    assert (twin.name, twin.precision) == ("FP32 twin", "float32")
    assert twin.recipe.target == made.target
    assert [stage.name for stage in twin.stages] == ["checkpoint", "build_engine"]
    engine = stages[-1].model
    assert isinstance(engine, Engine)
    assert twin.engine.path != engine.path and twin.engine.path.exists() and engine.path.exists()
    assert [node.name for node in twin.floats.ir.graph] == ["MatMul_0", "Relu_1", "MatMul_2"]
    assert not any(node.name for node in model.ir.graph)  # the caller's model keeps its names


def test_it_is_what_int8_is_timed_beside(model, with_data):
    made = recipe(gate={"min_speedup": 0.001, "max_drop": 100})
    stages = run_passes(made.passes, model, with_data)
    document = validate(stages, made, with_data, build_twin(stages, made, with_data)).document
    assert list(document["latency"]["runners"]) == ["FP32 ONNX", "FP32 twin", "engine"]
    assert "as fast as FP32 twin" in document["verdict"]["reasons"][-1]
    assert list(document["latency"]["ratios"]) == ["FP32 ONNX", "FP32 twin"]
    assert document["accuracy"]["others"] == {}  # timed, not scored


def test_an_int8_model_that_is_not_built_has_a_twin_too(model, with_data):
    made = recipe({"use": "quantize_int8", "smooth": False}, gate={"max_drop": 100})
    stages = run_passes(made.passes, model, with_data)
    twin = build_twin(stages, made, with_data)
    assert isinstance(twin, Twin) and twin.engine is None
    assert list(validate(stages, made, with_data, twin).document["latency"]["runners"])[1] == "FP32 twin"


def test_without_int8_there_is_no_twin(model, with_data):
    made = recipe("build_engine")
    assert build_twin(run_passes(made.passes, model, with_data), made, with_data) is None


def test_where_the_target_cannot_run_there_is_none(model, with_data):
    made = recipe({"use": "quantize_int8", "smooth": False}, {"use": "build_engine", "target": "tensorrt-rtx"})
    quantized = run_passes(made.passes[:1], model, with_data)
    engine = Engine(with_data.scratch / "engine.plan", "tensorrt-rtx", model.signature)
    stages = (*quantized, Stage("build_engine", engine, 0.0))
    twin = build_twin(stages, made, with_data)
    assert isinstance(twin, NoTwin)
    assert "tensorrt-rtx does not run on this machine" in twin.why
    assert not (with_data.scratch / "twin").exists()
    document = validate(stages, made.updated(gate={"max_drop": 100}), with_data, twin).document
    assert "FP32 twin" not in document["latency"]["runners"]


def test_a_twin_that_cannot_be_built_is_explained(model, with_data):
    made = recipe({"use": "quantize_int8", "smooth": False}, {"use": "cast_fp16", "keep": ["nowhere"]}, "build_engine")
    stages = run_passes(made.passes[:1], model, with_data)
    twin = build_twin(stages, made, with_data)
    assert isinstance(twin, NoTwin)
    assert "could not be built: cast_fp16: `keep` names 'nowhere'" in twin.why


@pytest.mark.parametrize(
    ("target", "between", "expected"),
    [
        ("onnxruntime", [], ["build_engine"]),
        ("tensorrt-rtx", [], ["cast_fp16", "build_engine"]),
        ("tensorrt-rtx", ["cast_fp16"], ["cast_fp16", "build_engine"]),
        ("tensorrt-rtx", ["cast_bf16"], ["cast_bf16", "build_engine"]),
    ],
)
def test_it_computes_in_fp16_where_the_target_does(target, between, expected):
    made = recipe("quantize_int8", *between, {"use": "build_engine", "target": target})
    assert names(twin_passes(made, made.passes[1:])) == expected


def test_an_fp16_twin_says_so(model, with_data):
    made = recipe({"use": "quantize_int8", "smooth": False}, "cast_fp16", "build_engine")
    twin = build_twin(run_passes(made.passes, model, with_data), made, with_data)
    assert isinstance(twin, Twin)
    assert twin.name == "FP16 twin"
