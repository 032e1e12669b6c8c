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
from optkit.targets.base import TENSORRT

POLICY = replace(TENSORRT, rules=("weighted_inputs",))

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


def quantization_of(model, batches):
    name_nodes(model)
    placement = place(model, POLICY)
    activations = scales(placement, observe(model, placement.observed, batches), POLICY, "max")
    return Quantization(placement, activations, quantize_weights(model, placement, POLICY, activations))


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
    after = round_weights(model, before, batches)

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


def test_inputs_that_are_always_zero_leave_their_weights_at_the_nearest(net, array_data):
    model = layer(net, "Gemm")
    x = np.random.default_rng(0).standard_normal((64, 24)).astype("f")
    x[:, 7] = 0
    batches = list(array_data({"x": x}).batches("calibration", 32))
    before = quantization_of(model, batches)
    (old,), (new,) = before.weights.values(), round_weights(model, before, batches).weights.values()
    np.testing.assert_array_equal(new.values[:, 7], old.values[:, 7])


def test_a_convolution_that_pads_by_itself_keeps_its_rounding(net, array_data):
    model = net(
        'g (float[b,8,6,6] x) => (float[b,4,H,W] y) { y = Conv <auto_pad = "SAME_UPPER"> (x, w) }',
        w=np.random.default_rng(0).standard_normal((4, 8, 3, 3)).astype("f"),
    )
    batches = samples(array_data, (8, 6, 6))
    before = quantization_of(model, batches)
    assert round_weights(model, before, batches).weights == before.weights
