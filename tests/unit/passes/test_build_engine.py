from __future__ import annotations

import sys

import numpy as np
import pytest

from optkit.errors import BuildError, UnavailableError
from optkit.passes.build_engine import BuildEngine
from optkit.passes.optimize_graph import OptimizeGraph
from optkit.pipeline import run_passes
from optkit.targets.onnxruntime import OnnxRuntimeTarget
from optkit.targets.tensorrt_rtx import TensorRtRtxTarget

TEXT = "g (float[2,4] x) => (float[2,4] y) { y = Relu(x) }"


def test_takes_a_target_by_name_or_with_options():
    assert BuildEngine().target == OnnxRuntimeTarget()
    assert BuildEngine(target="tensorrt-rtx").target == TensorRtRtxTarget()
    assert BuildEngine(target={"name": "onnxruntime", "exact_int8": True}).target == OnnxRuntimeTarget(exact_int8=True)


def test_builds_what_its_target_opens(onnx_model, context):
    model = onnx_model(TEXT)
    engine = run_passes([BuildEngine()], model, context)[-1].model
    assert engine.path.parent == context.scratch
    assert engine.signature == model.signature
    x = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)
    with OnnxRuntimeTarget().open(engine, context.threads) as runner:
        np.testing.assert_array_equal(runner.run({"x": x})["y"], np.maximum(x, 0))


def test_refuses_a_target_that_is_not_installed(onnx_model, context, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UnavailableError, match=r"target 'onnxruntime': onnxruntime cannot be .* pip install 'optkit"):
        run_passes([BuildEngine()], onnx_model(TEXT), context)


def test_a_target_that_is_missing_is_told_before_any_other_pass_runs(onnx_model, context, monkeypatch):
    monkeypatch.setenv("OPTKIT_TENSORRT_PYTHON", "no-such-python")
    ran = []
    monkeypatch.setattr(OptimizeGraph, "run", lambda self, model, context: ran.append(self) or model)
    with pytest.raises(
        UnavailableError, match=r"target 'tensorrt': 'no-such-python' cannot be started .*\. set OPTKIT"
    ):
        run_passes([OptimizeGraph(), BuildEngine(target="tensorrt")], onnx_model(TEXT), context)
    assert ran == []


def test_names_itself_when_the_build_fails(onnx_model, context):
    with pytest.raises(BuildError, match=r"^build_engine: ONNX Runtime does not take the model: .*passes done before"):
        run_passes([BuildEngine()], onnx_model(TEXT.replace("Relu", "NoSuchOp")), context)
