from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from optkit.quantize.bias_correction import BiasCorrection, correct_biases
from optkit.quantize.calibration import scales
from optkit.quantize.linter import lint
from optkit.quantize.measure import Judge, decibels, outputs_of
from optkit.quantize.observers import observe
from optkit.quantize.placement import Use, name_nodes, place
from optkit.quantize.qdq import Quantization, quantize_weights, write
from optkit.quantize.walk import walk
from optkit.targets.base import ORT_CPU, TENSORRT

# Exact on every processor that these tests may run on
ONNXRUNTIME = replace(ORT_CPU, sums_in_16_bits=True)

DEPTHWISE = """g (float[b,8,6,6] x) => (float[b,4] y) <float zero = {0}, float six = {6}> {
    a = Conv<pads = [1,1,1,1]>(x, w1, b1) ar = Clip(a, zero, six)
    d = Conv<group = 32, pads = [1,1,1,1]>(ar, w2, b2) dr = Clip(d, zero, six)
    p = Conv(dr, w3)
    m = GlobalAveragePool(p) f = Flatten(m) y = Gemm(f, w4, b4)
}"""


@pytest.fixture
def depthwise(net):
    """Channels of very different ranges, one of them dead, and layers with and without a bias."""
    rng = np.random.default_rng(0)
    w2 = rng.standard_normal((32, 1, 3, 3)).astype("f") * np.geomspace(0.05, 5, 32, dtype="f")[:, None, None, None]
    w2[5] = 0
    return net(
        DEPTHWISE,
        w1=rng.standard_normal((32, 8, 3, 3)).astype("f") / 3,
        b1=rng.standard_normal(32).astype("f"),
        w2=w2,
        b2=rng.standard_normal(32).astype("f"),
        w3=rng.standard_normal((16, 32, 1, 1)).astype("f"),
        w4=rng.standard_normal((16, 4)).astype("f"),
        b4=np.zeros(4, "f"),
    )


@pytest.fixture
def samples(array_data):
    rng = np.random.default_rng(1)
    return array_data({"x": rng.standard_normal((192, 8, 6, 6)).astype("f")})


def quantization_of(model, batches, policy):
    name_nodes(model)
    placement = place(model, policy)
    activations = scales(placement, observe(model, placement.observed, batches), policy, "max")
    return Quantization(placement, activations, quantize_weights(model, placement, policy, activations))


@pytest.mark.parametrize("policy", [ONNXRUNTIME, TENSORRT], ids=["onnxruntime", "tensorrt"])
def test_means_are_right_after_every_layer_and_unseen_samples_gain(depthwise, samples, policy):
    batches = list(samples.batches("calibration", 32))
    before = quantization_of(depthwise, batches, policy)
    after = correct_biases(depthwise, before, policy, batches)
    written = write(depthwise, after)
    stops = ["ar", "dr", "p"]
    for (name, exact), (_, measured) in zip(
        walk(depthwise, stops, batches), walk(written, stops, batches), strict=True
    ):
        off = np.concatenate(exact).mean((0, 2, 3)) - np.concatenate(measured).mean((0, 2, 3))
        assert np.abs(off).max() < 2e-3 * np.concatenate(exact).std(), name
    judge = Judge(depthwise, list(samples.batches("validation", 32)), policy, 1)
    assert judge.error(written) < judge.error(write(depthwise, before))
    assert not [finding for finding in lint(written, policy) if finding.is_error]


@pytest.mark.parametrize(
    ("activation", "right"), [("Relu(a)", 0.5), ("Clip(a, zero, six)", 0.5), ("Clip(a, minus, six)", 0.0)]
)
def test_what_an_activation_cuts_off_does_not_count(net, activation, right):
    """What is positive is 0.5 too low, and what is negative, where a Relu is flat, 0.5 too high."""
    model = net(
        f"g (float[b,2] x) => (float[b,1] y) <float zero = {{0}}, float minus = {{-9}}, float six = {{6}}>"
        f" {{ a = Gemm(x, w, c) y = {activation} }}",
        w=np.ones((2, 1), "f"),
        c=np.zeros(1, "f"),
    )
    name_nodes(model)
    weights = {Use(str(model.ir.graph[0].name), 1): None}
    correction = BiasCorrection(model, Quantization(place(model, ONNXRUNTIME), {}, weights))
    exact = np.array([[-4], [-3], [3], [4]] * 100, np.float32)
    measured = exact + np.where(exact > 0, np.float32(-0.5), np.float32(0.5))
    correction.correct("a", [exact], [measured])
    found = correction.added_to(Quantization(place(model, ONNXRUNTIME), {}, weights), TENSORRT).biases
    assert found[str(model.ir.graph[0].name)] == pytest.approx([right], rel=0.03)


def test_a_channel_that_is_never_active_keeps_its_bias(net):
    model = net(
        "g (float[b,2] x) => (float[b,1] y) { a = Gemm(x, w, c) y = Relu(a) }",
        w=np.ones((2, 1), "f"),
        c=np.full(1, -9, "f"),
    )
    name_nodes(model)
    quantization = Quantization(place(model, ONNXRUNTIME), {}, {Use(str(model.ir.graph[0].name), 1): None})
    correction = BiasCorrection(model, quantization)
    exact = -np.ones((64, 1), np.float32)
    correction.correct("a", [exact], [exact - 1])
    assert correction.added_to(quantization, TENSORRT).biases[str(model.ir.graph[0].name)] == -9


def test_a_layer_without_a_bias_gets_an_int32_one_where_the_target_wants_that(depthwise, samples):
    batches = list(samples.batches("calibration", 32))
    after = correct_biases(depthwise, quantization_of(depthwise, batches, ONNXRUNTIME), ONNXRUNTIME, batches)
    (name,) = (node.name for node in depthwise.ir.graph if node.outputs[0].name == "p")
    assert Use(name, 2) in after.placement.biases
    bias = write(depthwise, after).ir.graph.node(name).inputs[2].producer()
    assert bias.op_type == "DequantizeLinear"
    assert bias.inputs[0].const_value.numpy().dtype == np.int32


def test_the_add_behind_a_product_takes_the_correction(net, array_data):
    rng = np.random.default_rng(0)
    model = net(
        "g (float[b,5,32] x) => (float[b,5,24] y, float[b,5,24] z) { p = MatMul(x, w) y = Add(b, p) z = MatMul(x, v) }",
        w=rng.standard_normal((32, 24)).astype("f"),
        v=rng.standard_normal((32, 24)).astype("f"),
        b=rng.standard_normal(24).astype("f"),
    )
    batches = list(array_data({"x": rng.exponential(size=(64, 5, 32)).astype("f")}).batches("calibration", 16))
    before = quantization_of(model, batches, ONNXRUNTIME)
    after = correct_biases(model, before, ONNXRUNTIME, batches)
    assert len(after.biases) == 1  # of the two products one has a bias
    exact = mean_of(outputs_of(model, batches, 1))
    off_before = np.abs(exact - mean_of(outputs_of(write(model, before), batches, 1, optimize=False))).max()
    off_after = np.abs(exact - mean_of(outputs_of(write(model, after), batches, 1, optimize=False))).max()
    assert off_after < 1e-5 < 0.05 * off_before


def mean_of(outputs):
    return np.concatenate([out["y"] for out in outputs]).mean((0, 1), dtype=np.float64)


def test_nothing_is_lost_where_there_is_nothing_to_correct(net, array_data):
    """Weights and inputs that INT8 holds exactly."""
    rng = np.random.default_rng(0)
    weight = rng.integers(-127, 128, (16, 16)).astype("f")
    weight[0] = 127
    model = net("g (float[b,16] x) => (float[b,16] y) { y = Gemm(x, w, c) }", w=weight, c=np.zeros(16, "f"))
    x = rng.integers(-127, 128, (64, 16)).astype("f")
    x[:, 0] = 127
    batches = list(array_data({"x": x}).batches("calibration", 16))
    symmetric = replace(TENSORRT, rules=("weighted_inputs",))
    before = quantization_of(model, batches, symmetric)
    after = correct_biases(model, before, symmetric, batches)
    (bias,) = after.biases.values()
    assert np.abs(bias).max() < 0.01  # of outputs in the tens of thousands
    assert decibels(Judge(model, batches, symmetric, 1).error(write(model, after))) > 100
