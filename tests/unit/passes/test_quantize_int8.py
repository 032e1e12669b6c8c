from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from optkit.errors import DataError, PassError, PostconditionError, PreconditionError
from optkit.passes.quantize_int8 import QuantizeInt8
from optkit.quantize.calibration import Calibration
from optkit.quantize.measure import decibels, noise_to_signal, outputs_of
from optkit.recipe import Recipe
from optkit.targets.base import TENSORRT, Dialect
from optkit.targets.onnxruntime import OnnxRuntimeTarget

QUICK = QuantizeInt8(calibrate=Calibration(method="max"))


class Symmetric(OnnxRuntimeTarget):
    """ONNX Runtime as a stand-in for what runs TensorRT's graphs."""

    @property
    def dialect(self):
        return Dialect(int8=TENSORRT)


class FloatOnly(OnnxRuntimeTarget):
    """A target without INT8."""

    @property
    def dialect(self):
        return Dialect(int8=None)


def run(step, model, context):
    step.requires(model, context)
    after = step.run(model, context)
    step.ensures(model, after, context)
    return after


def sqnr(model, other, data):
    batches = list(data.batches("validation", 32))
    return decibels(noise_to_signal(outputs_of(model, batches, 1), outputs_of(other, batches, 1)))


def test_shapes_that_a_file_does_not_tell_are_inferred_for_the_rules_that_want_them(net, array_data, context):
    rng = np.random.default_rng(0)
    model = net(
        """g (float[b,16,8,8] x) => (float[b,16,8,8] y) {
            c = Conv(x, v) m = GlobalAveragePool(c) s = Conv(m, v) g = Sigmoid(s) y = Mul(c, g)
        }""",
        v=rng.standard_normal((16, 16, 1, 1)).astype("f"),
    )
    for value in (value for node in model.ir.graph for value in node.outputs if not value.is_graph_output()):
        value.shape, value.type = None, None
    data = array_data({"x": rng.standard_normal((64, 16, 8, 8)).astype("f")})
    after = run(QUICK, model, replace(context, data=data, target=Symmetric()))
    (reason,) = after.records["quantization"]["float"].values()
    assert reason == "a convolution of a single pixel is too small for INT8 to pay"


DEPTHWISE = "e = Conv(x, v) d = Conv <group = 16, pads = [1,1,1,1]> (e, w)"


@pytest.mark.parametrize(
    ("size", "text", "exclude"),
    [
        (8, f"{DEPTHWISE} a = Relu(d) y = Conv(a, narrow)", ()),
        (3, "e = Conv(x, v) d = Conv <group = 16> (e, w) y = Conv(d, v)", ()),  # a pixel is left
        (8, f"{DEPTHWISE} f = Conv <group = 16, pads = [1,1,1,1]> (d, w) y = Add(f, e)", ()),
        (8, f"{DEPTHWISE} a = Relu(d) [left_out] y = Conv(a, v)", ("left_out",)),
        (8, f"{DEPTHWISE} a = Relu(d) f = Conv(a, v) g = Conv(a, narrow) y = Concat <axis = 1> (f, g)", ()),
    ],
    ids=["small", "pixel", "two in a row", "excluded", "one of two"],
)
def test_what_reads_a_depthwise_convolution_in_float_breaks_no_promise(net, array_data, context, size, text, exclude):
    rng = np.random.default_rng(0)
    weights = {"v": (16, 16, 1, 1), "w": (16, 1, 3, 3), "narrow": (8, 16, 1, 1)}
    arrays = {name: rng.standard_normal(shape).astype("f") / 4 for name, shape in weights.items()}
    model = net(f"g (float[b,16,{size},{size}] x) => (float[b,c,h,z] y) {{ {text} }}", **arrays)
    data = array_data({"x": rng.standard_normal((64, 16, size, size)).astype("f")})
    after = run(QUICK.model_copy(update={"exclude": exclude}), model, replace(context, data=data, target=Symmetric()))
    assert "a grouped convolution" in str(after.records["quantization"]["float"])


@pytest.mark.parametrize("target", [OnnxRuntimeTarget(), Symmetric()], ids=["onnxruntime", "tensorrt"])
def test_quantizes_for_each_target_and_leaves_the_input_alone(residual, images, context, target):
    before = ir.to_proto(residual.ir).SerializeToString()
    after = run(QuantizeInt8(), residual, replace(context, data=images, target=target))
    assert ir.to_proto(residual.ir).SerializeToString() == before
    assert sqnr(residual, after, images) > 30
    assert after.signature == residual.signature


def test_leaves_records_of_ranges_and_placement(residual, images, context):
    after = run(QuantizeInt8(), residual, replace(context, data=images, target=Symmetric()))
    ranges, placement = after.records["ranges"], after.records["quantization"]
    assert ranges["data"] == images.fingerprint("calibration")
    assert 32 <= ranges["samples"] <= 64
    assert set(ranges["tensors"]) == {"image", "x0", "ar", "x1", "er", "h", "x2"}
    assert all(entry["scale"] > 0 and entry["zero_point"] == 0 for entry in ranges["tensors"].values())
    names = {node.name for node in after.ir.graph}
    assert len(names) == len(after.ir.graph)
    assert set(placement["int8"]) | set(placement["float"]) <= names
    assert list(placement["float"].values()) == ["it makes the model's output"]
    assert set(placement["sqnr_by_method"]) == {"mse", "max", "percentile 99.999", "percentile 99.99", "entropy"}
    assert placement["method"] == next(iter(placement["sqnr_by_method"]))


def test_auto_is_the_best_of_the_methods(net, array_data, context):
    rng = np.random.default_rng(0)
    model = net(
        "g (float[batch,8,8,8] x) => (float[batch,8,8,8] y) { c = Conv(x, w) y = Exp(c) }",
        w=rng.standard_normal((8, 8, 1, 1)).astype("f") / 8,
    )
    samples = rng.standard_normal((256, 8, 8, 8)).astype("f")
    samples[0, 0, 0, 0] = 200.0  # ruins max, and is rare enough for a percentile
    context = replace(context, data=array_data({"x": samples}))
    step = QuantizeInt8(calibrate=Calibration(batch_size=16))
    found = run(step, model, context).records["quantization"]
    assert found["method"] != "max"
    assert found["sqnr_by_method"][found["method"]] > found["sqnr_by_method"]["max"] + 10


def test_excluded_nodes_stay_float(residual, images, context):
    after = run(QUICK.model_copy(update={"exclude": ("Gemm*",)}), residual, replace(context, data=images))
    assert list(after.records["quantization"]["float"].values()) == ["excluded by the recipe"]
    gemm = next(node for node in after.ir.graph if node.op_type == "Gemm")
    assert gemm.inputs[1].const_value.dtype == ir.DataType.FLOAT


def test_a_fixed_batch_is_kept_and_the_rest_that_does_not_fill_one_is_left_out(net, array_data, context):
    rng = np.random.default_rng(0)
    model = net("g (float[3,8] x) => (float[3,8] y) { y = MatMul(x, w) }", w=rng.standard_normal((8, 8)).astype("f"))
    context = replace(context, data=array_data({"x": rng.standard_normal((100, 8)).astype("f")}))
    static = QUICK.model_copy(update={"activations": "static"})
    observed = run(static, model, context).records["ranges"]["samples"]
    assert observed % 3 == 0
    assert 60 < observed <= 99


def test_a_recipe_sets_every_field():
    recipe = Recipe.parse(
        "passes: [{use: quantize_int8, calibrate: {method: percentile, percentile: 99.99, samples: 64},"
        " weights: mse, exclude: [conv1]}]"
    )
    (step,) = recipe.passes
    assert isinstance(step, QuantizeInt8)
    assert (step.calibrate.method, step.calibrate.samples, step.weights) == ("percentile", 64, "mse")
    assert Recipe.parse(recipe.to_yaml()) == recipe


def test_needs_data(residual, context):
    with pytest.raises(PreconditionError, match="quantize_int8 needs data: add `data:` to the recipe"):
        QUICK.requires(residual, context)


def test_needs_a_target_with_int8(residual, images, context):
    with pytest.raises(PreconditionError, match="has no INT8: choose another target"):
        QUICK.requires(residual, replace(context, data=images, target=FloatOnly()))


def test_refuses_calibration_on_the_validation_samples(residual, array_data, context):
    data = array_data({"image": np.zeros((40, 3, 16, 16), np.float32)}, shared=True)
    with pytest.raises(DataError, match="calibration and validation are the same samples"):
        QUICK.requires(residual, replace(context, data=data))


def test_refuses_a_quantized_model(residual, images, context):
    context = replace(context, data=images)
    after = run(QUICK, residual, context)
    with pytest.raises(PreconditionError, match=r"the model is already quantized: node .* is a \w+Linear; start from"):
        QUICK.requires(after, context)


def test_refuses_an_opset_without_scales_per_channel(net, images, context):
    model = net("g (float[n,4] image) => (float[n,4] y) { y = Relu(image) }", opset=12)
    with pytest.raises(PreconditionError, match="opset 12, scales per channel need 13"):
        QUICK.requires(model, replace(context, data=images))


def test_nothing_to_quantize_is_no_success(net, array_data, context):
    model = net("g (float[n,4] x) => (float[n,n] y) { t = Transpose(x) y = MatMul(x, t) }")
    context = replace(context, data=array_data({"x": np.ones((40, 4), np.float32)}))
    with pytest.raises(
        PreconditionError, match=r"nothing to quantize \(MatMul_1: its second operand is not a constant"
    ):
        QUICK.run(model, context)


def test_an_empty_split(residual, array_data, context):
    data = array_data({"image": np.zeros((0, 3, 16, 16), np.float32)})
    with pytest.raises(DataError, match="calibration split is empty"):
        QUICK.run(residual, replace(context, data=data))


@pytest.mark.parametrize("array", [np.zeros((40, 3, 16, 8), np.float32), np.zeros((40, 3, 16, 16), np.float64)])
def test_samples_of_another_shape_or_dtype(residual, array_data, context, array):
    with pytest.raises(DataError, match="the samples do not fit the model: input 'image'"):
        QUICK.run(residual, replace(context, data=array_data({"image": array})))


def test_nan_in_the_weights(residual, images, context):
    weight = next(node for node in residual.ir.graph if node.op_type == "Conv").inputs[1]
    values = weight.const_value.numpy().copy()
    values[0, 0, 0, 0] = np.nan
    weight.const_value = ir.tensor(values, name=weight.name)
    with pytest.raises(PassError, match=r"calibration: tensor .* is not finite \(NaN or infinity\)"):
        QUICK.run(residual, replace(context, data=images))


def test_dead_channels_zero_samples_and_constant_tensors_are_no_trouble(residual, array_data, context):
    weight = next(node for node in residual.ir.graph if node.op_type == "Conv").inputs[1]
    values = weight.const_value.numpy().copy()
    values[3] = 0
    weight.const_value = ir.tensor(values, name=weight.name)
    data = array_data({"image": np.zeros((40, 3, 16, 16), np.float32)})
    after = run(QuantizeInt8(), residual, replace(context, data=data))
    assert sqnr(residual, after, data) > 30


def test_objects_to_a_model_that_is_not_what_was_promised(residual, images, context):
    context = replace(context, data=images)
    after = run(QUICK, residual, context)
    quantize = next(node for node in after.ir.graph if node.op_type == "QuantizeLinear")
    quantize.inputs[1].const_value = ir.tensor(np.float32(0), name="broken")
    with pytest.raises(PostconditionError, match="the linter objects to what was written: E2"):
        QUICK.ensures(residual, after, context)
