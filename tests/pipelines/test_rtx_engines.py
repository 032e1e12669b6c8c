"""Every example model becomes real TensorRT-RTX engines on a machine without a GPU, which says that it cannot run them.

The recipes for TensorRT-RTX are run, judged and verified with all others in ``test_recipes``. Here each model is
exported once and built in both precisions, calibrated in the quickest way: how accurate that is is not the question.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

import optkit
from optkit.bundle import verify
from optkit.context import Context
from optkit.data import open_data
from optkit.errors import UnavailableError
from optkit.models import Engine, Model
from optkit.passes.base import Pass
from optkit.passes.build_engine import BuildEngine
from optkit.passes.cast_fp16 import CastFp16
from optkit.passes.export_onnx import ExportOnnx
from optkit.passes.optimize_graph import OptimizeGraph
from optkit.passes.quantize_int8 import QuantizeInt8
from optkit.pipeline import run_passes
from optkit.quantize.calibration import Calibration
from optkit.recipe import Recipe
from optkit.source import load_model
from optkit.targets import cuda
from optkit.targets.tensorrt_rtx import TensorRtRtxTarget

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / ".data"
RTX = TensorRtRtxTarget()

pytestmark = [
    pytest.mark.skipif(not (DATA / "bbc").is_dir(), reason="`make data` has not been run"),
    pytest.mark.skipif(not RTX.can_build().ok, reason=RTX.can_build().reason),
]

MODELS = {
    "digits": ("digits/digit_cnn.pt2", "digits"),
    "resnet8": ("fashion/resnet8.pt2", "fashion-mnist"),
    "efficientnet": ("efficientnet/efficientnet_lite0.pt2", "efficientnet-photos"),
    "minilm": ("bbc/minilm_classifier.pt2", "bbc"),
}

INT8 = QuantizeInt8(calibrate=Calibration(method="max", samples=2, batch_size=1), smooth=False, correct_bias=False)


@pytest.mark.parametrize("name", MODELS)
def test_every_example_model_becomes_engines_in_both_precisions(name: str, tmp_path: Path):
    program, spec = MODELS[name]
    data = open_data(str(ROOT / f"calibration/{spec}.yaml"), 0)
    context = Context(RTX, tmp_path, data)
    start = load_model(DATA / program, Recipe.load("fp32"), data.inputs).model
    exported = run_passes([ExportOnnx(), OptimizeGraph()], start, context)[-1].model
    steps: dict[str, Pass] = {"HALF": CastFp16(), "INT8": INT8}
    for kind, lower in steps.items():
        engine = build(exported, lower, replace(context, scratch=tmp_path / kind))
        types = engine.records["network"]["types"]
        assert engine.path.stat().st_size == engine.records["bytes"] > 10_000
        assert types.get(kind, 0) >= 4, "strongly typed: what the graph says is what the engine computes in"
        assert [tensor["name"] for tensor in engine.records["tensors"] if tensor["mode"] == "input"] == [
            tensor.name for tensor in start.signature.inputs
        ]
        with pytest.raises(UnavailableError, match=re.escape(RTX.can_run().reason)):
            RTX.open(engine, 1)


def build(model: Model, lower: Pass, context: Context) -> Engine:
    context.scratch.mkdir()
    engine = run_passes([lower, BuildEngine(target=RTX)], model, context)[-1].model
    assert isinstance(engine, Engine)
    return engine


def test_the_report_says_that_the_engine_cannot_be_run_here(tmp_path: Path):
    quick = {"samples": 64, "stage_samples": 4, "latency": {"rounds": 2, "seconds": 0.01, "warmup": 0.0}}
    spec = str(ROOT / "calibration/digits.yaml")
    recipe = Recipe.load("fp16").updated(
        data=spec, target="tensorrt-rtx", validation=quick, gate={"max_drop": 60.0}, threads=1
    )
    bundle = optkit.compile(DATA / "digits/digit_cnn.pt2", recipe, tmp_path / "out")
    candidate, available = bundle.report["candidate"], RTX.can_run()
    assert not candidate["engine_ran"] and available.reason in candidate["why_not"]
    assert (bundle.path / "engine.plan").stat().st_size > 10_000
    assert "The engine did not run on this machine" in bundle.summary
    if not cuda.detect().gpus:
        assert "Layers of the engine: not looked at, since TensorRT-RTX loads a plan only where" in bundle.summary
    (problem,) = verify(bundle.path)
    assert problem.exit_code == 4 and problem.mend == available.mend
