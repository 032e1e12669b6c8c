import numpy as np
import pytest

from optkit.data import Batch
from optkit.models import Engine
from optkit.pipeline import Stage
from optkit.targets.onnxruntime import open_onnx
from optkit.targets.tensorrt_rtx import TensorRtRtxTarget
from optkit.validation.stages import compare_stages, first_past_tolerance, open_as_meant, precision_of

EXACT = "g (float[batch, 3] x) => (float[batch, 3] y) { two = Constant<value = float {2.0}>()  y = Mul(x, two) }"
NEAR = "g (float[batch, 3] x) => (float[batch, 3] y) { two = Constant<value = float {2.001}>()  y = Mul(x, two) }"
QUANTIZED = """g (float[batch, 3] x) => (float[batch, 3] y)
<float scale = {0.03125}, int8 zero = {0}, float two = {2.0}>
{ q = QuantizeLinear(x, scale, zero)  d = DequantizeLinear(q, scale, zero)  y = Mul(d, two) }"""
WRECKED = QUANTIZED.replace("0.03125", "2.0")
HALF = """g (float[batch, 3] x) => (float[batch, 3] y)
{ h = Cast<to = 10>(x)  s = Add(h, h)  y = Cast<to = 1>(s) }"""


@pytest.fixture
def batches():
    rng = np.random.default_rng(0)
    return [Batch({"x": rng.uniform(-3, 3, (size, 3)).astype(np.float32)}, None) for size in (16, 5)]


FULL = """g (float[batch, 64] x) => (float[batch, 1] y) <float s = {0.03125}, int8 z = {0}, int8[64, 1] w = {%s}> {
  q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)  e = DequantizeLinear(w, s, z)  y = MatMul(d, e) }"""


def _stages(*named):
    return [Stage(name, model, 0.0) for name, model in named]


def test_each_changed_stage_is_compared_with_the_checkpoint(onnx_model, batches, context):
    exact = onnx_model(EXACT)
    stages = _stages(
        ("checkpoint", exact),
        ("idle", exact),
        ("near", onnx_model(NEAR)),
        ("half", onnx_model(HALF)),
        ("quantized", onnx_model(QUANTIZED)),
    )
    errors = compare_stages(stages, batches, context, None, None)
    assert [error.name for error in errors] == ["near", "half", "quantized"]
    assert [error.precision for error in errors] == ["float32", "float16", "int8"]
    near = errors[0].error
    assert near is not None
    # 2.001 for 2: the noise is 1/2000 of the signal everywhere
    assert near.sqnr_db == pytest.approx(20 * np.log10(2000), abs=0.05)
    assert near.cosine == pytest.approx(1)
    assert [error.within for error in errors] == [True, True, True]
    assert first_past_tolerance(errors) is None


def test_the_first_stage_past_tolerance_is_found(onnx_model, batches, context):
    stages = _stages(
        ("checkpoint", onnx_model(EXACT)),
        ("quantized", onnx_model(QUANTIZED)),
        ("wrecked", onnx_model(WRECKED)),
        ("later", onnx_model(WRECKED)),
    )
    errors = compare_stages(stages, batches, context, None, None)
    assert [error.within for error in errors] == [True, False, False]
    past = first_past_tolerance(errors)
    assert past is not None
    assert past.name == "wrecked"


def test_an_engine_is_judged_by_the_precision_it_was_built_from(onnx_model, batches, context, tmp_path):
    quantized = onnx_model(QUANTIZED)
    engine = Engine(tmp_path / "none", "onnxruntime", quantized.signature)
    stages = _stages(("checkpoint", onnx_model(EXACT)), ("quantize", quantized), ("build_engine", engine))
    with open_onnx(quantized) as runner:
        ran = compare_stages(stages, batches, context, runner, None)[-1]
    assert (ran.name, ran.precision, ran.within) == ("build_engine", "int8", True)
    missing = compare_stages(stages, batches, context, None, "no GPU")[-1]
    assert (missing.error, missing.why_not, missing.within) == (None, "no GPU", None)


def test_a_stage_that_cannot_run_here_is_reported_and_not_fatal(onnx_model, batches, context, caplog):
    unknown = '<ir_version: 10, opset_import: ["" : 20, "elsewhere" : 1]> ' + (
        "g (float[batch, 3] x) => (float[batch, 3] y) { y = elsewhere.Unknown(x) }"
    )
    stages = _stages(("checkpoint", onnx_model(EXACT)), ("odd", onnx_model(unknown)), ("near", onnx_model(NEAR)))
    odd, near = compare_stages(stages, batches, context, None, None)
    assert odd.error is None
    assert odd.why_not is not None
    assert near.within
    assert "stage odd could not be compared" in caplog.text


@pytest.mark.parametrize(("text", "precision"), [(EXACT, "float32"), (HALF, "float16"), (QUANTIZED, "int8")])
def test_precision_is_read_from_the_graph(onnx_model, text, precision):
    assert precision_of(onnx_model(text)) == precision


def test_int8_for_tensorrt_is_not_blamed_for_kernels_that_saturate(onnx_model):
    """ONNX Runtime adds two such products in 16 bits on x86 without VNNI: 17 dB of a Swin that has 37."""
    model = onnx_model(FULL % ",".join(["127"] * 64))
    feeds = {"x": np.full((2, 64), 3.9, np.float32)}
    with open_as_meant(model, TensorRtRtxTarget(), 1) as runner:
        np.testing.assert_allclose(runner.run(feeds)["y"], 64 * 125 * 127 * 0.03125**2, rtol=1e-5)
        assert runner.environment.settings["optimization"] == "none"  # whatever this processor has
    with open_as_meant(onnx_model(EXACT), TensorRtRtxTarget(), 1) as runner:
        assert runner.environment.settings["optimization"] == "all"
