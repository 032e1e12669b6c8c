"""quantize_int8 with ranges of activations that are found at each call."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from optkit.errors import PostconditionError, PreconditionError
from optkit.passes.quantize_int8 import QuantizeInt8
from optkit.quantize.calibration import Calibration
from optkit.quantize.measure import decibels, noise_to_signal, outputs_of
from optkit.quantize.sensitivity import sensitivity
from optkit.recipe import Recipe
from optkit.targets.base import TENSORRT, Dialect
from optkit.targets.onnxruntime import OnnxRuntimeTarget

DYNAMIC = QuantizeInt8(activations="dynamic")


class Symmetric(OnnxRuntimeTarget):
    """ONNX Runtime as a stand-in for what runs TensorRT's graphs."""

    @property
    def dialect(self):
        return Dialect(int8=TENSORRT)


def run(step, model, context):
    step.requires(model, context)
    after = step.run(model, context)
    step.ensures(model, after, context)
    return after


def ops(model):
    return Counter(node.op_type for node in model.ir.graph)


def sqnr(model, other, data):
    batches = list(data.batches("validation", 1))
    return decibels(noise_to_signal(outputs_of(model, batches, 1), outputs_of(other, batches, 1)))


@pytest.fixture
def speech(net):
    """A convolution over time, an LSTM, a GRU and a product."""
    rng = np.random.default_rng(3)

    def normal(*shape):
        return (rng.standard_normal(shape) / shape[-1] ** 0.5).astype("f")

    return net(
        """g (float[batch,12,20] x) => (float[batch,32] y) <int64[1] middle = {1}, int64[1] start = {0}> {
            c = Conv <pads = [1, 1]> (x, w0, b0)
            t = Transpose <perm = [2, 0, 1]> (c)
            s, h = LSTM <hidden_size = 64> (t, w1, r1, b1)
            q = Squeeze(s, middle)
            u, g0 = GRU <hidden_size = 64> (q, w2, r2)
            f = Squeeze(g0, start)
            y = Gemm(f, w3, b3)
        }""",
        w0=normal(24, 12, 3),
        b0=normal(24),
        w1=normal(1, 256, 24),
        r1=normal(1, 256, 64),
        b1=normal(1, 512),
        w2=normal(1, 192, 64),
        r2=normal(1, 192, 64),
        w3=normal(64, 32),
        b3=normal(32),
    )


@pytest.fixture
def sounds(array_data):
    return array_data({"x": np.random.default_rng(4).standard_normal((64, 12, 20)).astype("f")})


FOUND = {
    # What computes in INT8, and why the rest does not
    "static": ({"Conv_0", "Gemm_6"}, {"LSTM_2": "the target has no rule for LSTM"}),
    "dynamic": ({"LSTM_2", "Gemm_6"}, {"Conv_0": "the target has no rule for Conv"}),
    "auto": ({"Conv_0", "LSTM_2", "Gemm_6"}, {}),
}


@pytest.mark.parametrize("mode", FOUND)
def test_each_mode_takes_the_layers_that_it_has_kernels_for(speech, sounds, context, mode):
    step = QuantizeInt8(activations=mode, calibrate=Calibration(method="max"), smooth=False)
    after = run(step, speech, replace(context, data=sounds))
    int8, kept = FOUND[mode]
    record = after.records["quantization"]
    assert set(record["int8"]) - {"Transpose_1"} == int8  # which moves what a convolution writes
    assert set(record["dynamic"]) == (set() if mode == "static" else {"LSTM_2", "Gemm_6"})
    gru = "the target has no rule for GRU" if mode == "static" else "there is no INT8 GRU"
    assert record["float"] == kept | {"GRU_4": gru}
    assert sqnr(speech, after, sounds) > 27
    assert after.signature == speech.signature


def test_auto_is_static_where_convolutions_write_int8(residual, images, context):
    context = replace(context, data=images)
    quick = QuantizeInt8(calibrate=Calibration(method="max"), smooth=False, correct_bias=False)
    steps = [quick.model_copy(update={"activations": mode}) for mode in ("auto", "static")]
    found = [ops(run(step, residual, context)) for step in steps]
    assert found[0] == found[1]


def test_a_tensor_may_have_a_known_range_for_one_layer_and_one_of_the_moment_for_another(net, array_data, context):
    rng = np.random.default_rng(0)
    model = net(
        """g (float[batch,16,32] x) => (float[batch,16,32] y, float[batch,16,32] z) {
            y = Conv <pads = [1, 1]> (x, w) z = MatMul(x, v)
        }""",
        w=rng.standard_normal((16, 16, 3)).astype("f"),
        v=rng.standard_normal((32, 32)).astype("f"),
    )
    data = array_data({"x": rng.standard_normal((64, 16, 32)).astype("f")})
    step = QuantizeInt8(calibrate=Calibration(method="max"), smooth=False)
    after = run(step, model, replace(context, data=data))
    assert ops(after)["DynamicQuantizeLinear"] == 1
    assert ops(after)["QuantizeLinear"] == 2  # around the convolution
    assert sqnr(model, after, data) > 30


def test_dynamic_needs_no_data(speech, context):
    after = run(DYNAMIC, speech, context)
    assert ops(after)["DynamicQuantizeLSTM"] == ops(after)["MatMulInteger"] == 1
    assert after.records["quantization"]["algorithms"] == []
    assert after.records["ranges"]["data"] is None
    assert after.records["ranges"]["tensors"] == {}


@pytest.mark.parametrize("mode", ["auto", "static"])
def test_every_other_mode_does(speech, context, mode):
    with pytest.raises(PreconditionError, match="quantize_int8 needs data"):
        QuantizeInt8(activations=mode).requires(speech, context)


def test_data_improves_it(net, array_data, context):
    rng = np.random.default_rng(0)
    outlier = np.ones(64, np.float32)
    outlier[5] = 60
    data = array_data({"x": (rng.standard_normal((96, 4, 64)) * outlier).astype("f")})
    model = net(
        """g (float[batch,4,64] x) => (float[batch,4,64] y) {
            p = MatMul(x, w) a = Add(p, b) r = Relu(a) y = MatMul(r, v)
        }""",
        w=(rng.standard_normal((64, 64)) / outlier[:, None]).astype("f"),
        b=rng.standard_normal(64).astype("f"),
        v=rng.standard_normal((64, 64)).astype("f"),
    )
    plain = run(DYNAMIC, model, context)
    better = run(DYNAMIC, model, replace(context, data=data))
    tried = {trial["algorithm"]: trial["kept"] for trial in better.records["quantization"]["algorithms"]}
    assert tried["smooth"]
    assert sqnr(model, better, data) > sqnr(model, plain, data) + 3


def test_a_target_without_the_kernels_refuses(speech, sounds, context):
    context = replace(context, data=sounds, target=Symmetric())
    with pytest.raises(PreconditionError, match="'onnxruntime' has no kernels that find ranges at each call: leave"):
        DYNAMIC.requires(speech, context)


def test_a_model_of_convolutions_has_nothing_to_quantize(net, context):
    model = net("g (float[n,4,8,8] x) => (float[n,4,8,8] y) { y = Conv(x, w) }", w=np.ones((4, 4, 1, 1), np.float32))
    with pytest.raises(PreconditionError, match=r"nothing to quantize \(Conv_0: the target has no rule for Conv\)"):
        DYNAMIC.run(model, context)


def test_what_is_quantized_already_is_refused(speech, context):
    after = run(DYNAMIC, speech, context)
    with pytest.raises(
        PreconditionError, match="the model is already quantized: node 'LSTM_2' is a DynamicQuantizeLSTM"
    ):
        DYNAMIC.requires(after, context)


def test_excluded_layers_stay_float(speech, context):
    after = run(DYNAMIC.model_copy(update={"exclude": ("LSTM*",)}), speech, context)
    assert after.records["quantization"]["float"]["LSTM_2"] == "excluded by the recipe"
    assert ops(after)["LSTM"] == ops(after)["MatMulInteger"] == 1


def test_a_form_that_does_not_fuse_is_no_success(speech, context):
    after = run(DYNAMIC, speech, context)
    product = after.ir.graph.node("Gemm_6")
    cast = product.outputs[0].uses()[0].node
    cast.outputs[0].uses()[0].node.replace_input_with(1, cast.outputs[0])  # its scale is gone
    with pytest.raises(PostconditionError, match="W10 Gemm_6: its form is not one that fuses"):
        DYNAMIC.ensures(speech, after, context)


def test_layers_are_ranked_whatever_finds_their_ranges(speech, sounds, context):
    context = replace(context, data=sounds)
    found = sensitivity(QuantizeInt8(smooth=False).calibrated(speech, context), context)
    assert sorted(node.name for node in found.nodes) == ["Conv_0", "Gemm_6", "LSTM_2"]
    # 20 steps of 4 gates of 64 units, each of 24 inputs and 64 units before
    assert next(node for node in found.nodes if node.name == "LSTM_2").macs == 20 * 4 * 64 * (24 + 64)


def test_a_recipe_chooses_the_mode():
    recipe = Recipe.parse("passes: [{use: quantize_int8, activations: dynamic}]")
    assert recipe.passes == (DYNAMIC,)
    assert Recipe.parse(recipe.to_yaml()) == recipe
