from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from optkit.quantize.calibration import scales
from optkit.quantize.measure import decibels, noise_to_signal, outputs_of
from optkit.quantize.observers import observe
from optkit.quantize.placement import name_nodes, place
from optkit.quantize.qdq import Quantization, quantize_weights, write
from optkit.quantize.rounding import round_weights
from optkit.quantize.saturation import MOST, neighbours
from optkit.targets.base import ORT_CPU, TENSORRT

POLICY = replace(TENSORRT, rules=("weighted_inputs",))
DYNAMIC = replace(ORT_CPU, rules=ORT_CPU.dynamic)

LAYERS = {
    "Conv": ("<pads = [1,0,1,2], strides = [2,1], dilations = [1,2]>", (6, 8, 3, 3), (8, 9, 11)),
    "grouped": ("<group = 4, auto_pad = 'NOTSET', pads = [1,1,1,1]>", (8, 2, 3, 3), (8, 6, 6)),
    "depthwise": ("<group = 8>", (8, 1, 3, 3), (8, 6, 6)),
    "Gemm": ("<transB = 1>", (12, 24), (24,)),
    "MatMul": ("", (24, 12), (5, 24)),
}


def layer(net, name):
    attributes, weight, sample = LAYERS[name]
    op = name if name in ("Gemm", "MatMul") else "Conv"
    shape, after = ",".join(map(str, sample)), ",".join("NMLK"[: len(sample)])
    rng = np.random.default_rng(0)
    text = f"g (float[b,{shape}] x) => (float[b,{after}] y) {{ y = {op} {attributes} (x, w) }}".replace("'", '"')
    return net(text, w=rng.standard_normal(weight).astype("f"))


def quantization_of(model, batches, policy=POLICY):
    name_nodes(model)
    placement = place(model, policy)
    activations = scales(placement, observe(model, placement.observed, batches), policy, "max")
    return Quantization(placement, activations, quantize_weights(model, placement, policy, activations))


def samples(array_data, sample):
    """Correlated channels, which is what makes one weight's error another one's to mend."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((128, *sample)) * 0.1 + rng.standard_normal((128, *[1] * len(sample))) + 0.5
    return list(array_data({"x": x.astype("f")}).batches("calibration", 32))


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_come_closer_with_the_same_scales(net, array_data, name):
    model = layer(net, name)
    *batches, unseen = samples(array_data, LAYERS[name][2])
    before = quantization_of(model, batches)
    after = round_weights(model, before, POLICY, batches)

    def noise(quantization):
        # Of the weights alone: the activations' rounding is the same for both
        exact = write(model, replace(quantization, weights={}))
        given = outputs_of(exact, [unseen], 1, optimize=False)
        return decibels(noise_to_signal(given, outputs_of(write(model, quantization), [unseen], 1, optimize=False)))

    assert noise(after) > noise(before) + 2
    for use, weight in after.weights.items():
        assert weight.scale is before.weights[use].scale
        assert weight.values.shape == before.weights[use].values.shape
        assert np.abs(weight.values.astype(int)).max() <= 127
        assert not np.array_equal(weight.values, before.weights[use].values)


def test_layers_that_find_their_ranges_at_each_call_are_rounded_as_well(net, array_data):
    """What the second one reads is known as a float only; its weight is stored the other way round."""
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal((128, 128)).astype("f") / 11 for name in "vw"}
    model = net("g (float[b,128] x) => (float[b,128] y) { a = MatMul(x, v) y = Gemm<transB = 1>(a, w) }", **weights)
    *batches, unseen = samples(array_data, (128,))
    before = quantization_of(model, batches, DYNAMIC)
    after = round_weights(model, before, DYNAMIC, batches)
    assert len(before.placement.dynamic) == 2
    for use, weight in before.weights.items():
        if model.ir.graph.node(use.node).op_type == "MatMul":
            assert np.array_equal(weight.values, after.weights[use].values)  # no walk stops at a model's input
            continue
        read = unseen.feeds["x"] @ weights["v"]
        old, new = (np.linalg.norm(read @ (w.dequantized - weights["w"]).T) for w in (weight, after.weights[use]))
        assert new < 0.8 * old
        stored = write(model, after).ir.graph.node(use.node).inputs[1].const_value.numpy()
        np.testing.assert_array_equal(stored, after.weights[use].values.T)


def test_inputs_that_are_always_zero_leave_their_weights_at_the_nearest(net, array_data):
    model = layer(net, "Gemm")
    x = np.random.default_rng(0).standard_normal((64, 24)).astype("f")
    x[:, 7] = 0
    batches = list(array_data({"x": x}).batches("calibration", 32))
    before = quantization_of(model, batches)
    (old,), (new,) = before.weights.values(), round_weights(model, before, POLICY, batches).weights.values()
    np.testing.assert_array_equal(new.values[:, 7], old.values[:, 7])


def test_a_convolution_that_pads_by_itself_keeps_its_rounding(net, array_data):
    model = net(
        'g (float[b,8,6,6] x) => (float[b,4,H,W] y) { y = Conv <auto_pad = "SAME_UPPER"> (x, w) }',
        w=np.random.default_rng(0).standard_normal((4, 8, 3, 3)).astype("f"),
    )
    batches = samples(array_data, (8, 6, 6))
    before = quantization_of(model, batches)
    assert round_weights(model, before, POLICY, batches).weights == before.weights


def test_what_rounding_moves_leaves_no_pair_of_neighbours_that_saturates(net, array_data):
    """Weights that are all but equal: every pair is as large as the scale allows. Those of small inputs move far."""
    weight = (1 + 0.01 * np.random.default_rng(0).standard_normal((24, 12))).astype("f")
    model = net("g (float[b,24] x) => (float[b,12] y) { y = MatMul(x, w) }", w=weight)
    x = np.concatenate([batch.feeds["x"] for batch in samples(array_data, (24,))]) * np.tile([1, 0.1], 12)
    batches = list(array_data({"x": x.astype("f")}).batches("calibration", 32))
    policy = replace(POLICY, sums_in_16_bits=True)
    before = quantization_of(model, batches, policy)
    (use,) = before.weights
    pairs = neighbours(model.ir.graph.node(use.node), weight.shape)

    def largest_sum(sums_in_16_bits):
        rounds = replace(policy, sums_in_16_bits=sums_in_16_bits)
        values = round_weights(model, before, rounds, batches).weights[use].values.astype(int)
        return np.abs(values.reshape(-1)[pairs].sum(axis=1)).max()

    assert largest_sum(True) <= MOST < largest_sum(False)


def test_biases_are_corrected_on_the_way(net, array_data):
    rng = np.random.default_rng(0)
    model = net(
        "g (float[b,8,6,6] x) => (float[b,4,4,4] y) { a = Conv<pads = [1,1,1,1]>(x, v, c) r = Relu(a) y = Conv(r, w) }",
        v=rng.standard_normal((16, 8, 3, 3)).astype("f"),
        c=rng.standard_normal(16).astype("f"),
        w=rng.standard_normal((4, 16, 3, 3)).astype("f"),
    )
    *batches, _ = samples(array_data, (8, 6, 6))
    before = quantization_of(model, batches)
    plain = round_weights(model, before, POLICY, batches)
    after = round_weights(model, before, POLICY, batches, correct_bias=True)
    assert plain.biases == {}
    exact = mean_of(outputs_of(model, batches, 1))
    wrong, right = (
        np.abs(exact - mean_of(outputs_of(write(model, q), batches, 1, optimize=False))).max() for q in (plain, after)
    )
    assert right < 1e-4 < 0.1 * wrong


def mean_of(outputs):
    return np.concatenate([out["y"] for out in outputs]).mean((0, 2, 3), dtype=np.float64)
