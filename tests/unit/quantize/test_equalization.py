from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest

from optkit.quantize.calibration import scales
from optkit.quantize.equalization import equalize
from optkit.quantize.measure import Judge, decibels, noise_to_signal, outputs_of
from optkit.quantize.observers import observe, with_probes
from optkit.quantize.placement import name_nodes, place
from optkit.quantize.qdq import Quantization, quantize_weights, write
from optkit.targets.base import ORT_CPU

POLICY = replace(ORT_CPU, sums_in_16_bits=True)
SHAPES = {"w1": (16, 8, 3, 3), "w2": (16, 1, 3, 3), "w3": (16, 16, 1, 1), "w4": (12, 4, 1, 1), "w5": (5, 12)}


def constants(*names, uneven=16.0):
    """Weights whose output channels differ in size by up to ``uneven``, and biases of the same sizes."""
    rng = np.random.default_rng(0)
    found = {}
    for name in names:
        sizes = np.geomspace(1, uneven, SHAPES[name][0])
        weight = rng.standard_normal(SHAPES[name]) * sizes.reshape(-1, *[1] * (len(SHAPES[name]) - 1))
        found[name] = (weight / np.prod(SHAPES[name][1:]) ** 0.5).astype("f")
        found[f"b{name[1]}"] = (rng.standard_normal(len(sizes)) * sizes).astype("f")
    return found


@pytest.fixture
def batches(array_data):
    x = np.random.default_rng(1).standard_normal((96, 8, 8, 8)).astype("f")
    return list(array_data({"x": x}).batches("calibration", 32))


RESIDUAL = """g (float[b,8,8,8] x) => (float[b,5] y) {
    a = Conv<pads = [1,1,1,1]>(x, w1, b1) ar = Relu(a)
    d = Conv<group = 16, pads = [1,1,1,1]>(ar, w2, b2) dr = LeakyRelu(d)
    p = Conv(dr, w3, b3) s = Add(p, ar) sr = Relu(s) m = MaxPool<kernel_shape = [2,2], strides = [2,2]>(sr)
    q = Conv<group = 4>(m, w4, b4) r = Relu(q) v = GlobalAveragePool(r) f = Flatten(v) y = Gemm<transB = 1>(f, w5, b5)
}"""


def quantized(model, batches):
    placement = place(model, POLICY)
    activations = scales(placement, observe(model, placement.observed, batches), POLICY, "max")
    return write(model, Quantization(placement, activations, quantize_weights(model, placement, POLICY, activations)))


def test_the_function_stays_and_quantized_it_is_better(net, batches):
    """A residual, a depthwise chain, a grouped convolution, poolings and a Gemm."""
    model = net(RESIDUAL, **constants(*SHAPES))
    name_nodes(model)
    after = equalize(model, place(model, POLICY), batches)
    exact, same = outputs_of(model, batches, 1), outputs_of(after, batches, 1)
    assert decibels(noise_to_signal(exact, same)) > 110  # float32
    judge = Judge(model, batches, POLICY, 1)
    assert decibels(judge.error(quantized(after, batches))) > decibels(judge.error(quantized(model, batches))) + 1


def test_channels_come_to_like_ranges_where_that_costs_nothing(net, batches):
    """A depthwise convolution has a scale for each channel."""
    model = net(
        """g (float[b,8,8,8] x) => (float[b,16,4,4] y) {
            a = Conv(x, w1, b1) r = Relu(a) y = Conv<group = 16>(r, w2, b2)
        }""",
        **constants("w1", "w2", uneven=4.0),
    )
    name_nodes(model)

    def spread(candidate):
        outputs = outputs_of(with_probes(candidate, ["r"]), batches, 1)
        reach = np.concatenate([values["r"] for values in outputs]).max((0, 2, 3))
        return reach.max() / reach.min()

    assert spread(equalize(model, place(model, POLICY), batches)) < 1.001 < 3 < spread(model)


@pytest.mark.parametrize(
    ("between", "op"),
    [("r = Clip(a, zero, six)", "Clip"), ("t = Sigmoid(a) r = Mul(a, t)", "Mul"), ("r = Add(a, shift)", "Add")],
)
def test_what_a_factor_does_not_pass_through_is_declined_by_name(net, batches, caplog, between, op):
    model = net(
        f"""g (float[b,8,8,8] x) => (float[b,16,4,4] y) <float zero = {{0}}, float six = {{6}}> {{
            a = Conv(x, w1, b1) {between} y = Conv<group = 16>(r, w2, b2)
        }}""",
        **constants("w1", "w2"),
        shift=np.ones((16, 1, 1), "f"),
    )
    name_nodes(model)
    with caplog.at_level(logging.DEBUG, "optkit.quantize"):
        assert equalize(model, place(model, POLICY), batches) is model
    (blocking,) = (node.name for node in model.ir.graph if node.op_type == op)
    first = model.ir.graph[0].name
    assert f"what {first} writes stays as it is: {blocking} ({op}) is not positively homogeneous" in caplog.text


def test_what_a_branch_reads_stays_as_it_is(net, array_data, batches):
    model = net(
        """g (float[b,8,8,8] x, bool c) => (float[b,16,4,4] y, float[b,16,6,6] z) {
            a = Conv(x, w1, b1) r = Relu(a) y = Conv<group = 16>(r, w2, b2)
            z = If (c) <
                then_branch = then () => (float[b,16,6,6] t) { t = Neg(r) },
                else_branch = other () => (float[b,16,6,6] e) { e = Abs(r) }
            >
        }""",
        **constants("w1", "w2"),
    )
    name_nodes(model)
    assert equalize(model, place(model, POLICY), batches) is model


def test_dead_channels_stay_as_they_are(net, batches):
    weights = constants("w1", "w2")
    weights["w1"][3], weights["b1"][3] = 0, -1
    model = net(
        """g (float[b,8,8,8] x) => (float[b,16,4,4] y) {
            a = Conv(x, w1, b1) r = Relu(a) y = Conv<group = 16>(r, w2, b2)
        }""",
        **weights,
    )
    name_nodes(model)
    after = equalize(model, place(model, POLICY), batches)
    stored = after.ir.graph[0].inputs[2].const_value.numpy()
    assert stored[3] == -1 and np.isfinite(stored).all() and stored[4] != weights["b1"][4]
