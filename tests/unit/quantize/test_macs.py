"""MACs by the textbook formulas, and the share of them that a placement takes."""

from __future__ import annotations

import numpy as np
import pytest

from optkit.quantize.macs import int8_share, macs
from optkit.quantize.placement import name_nodes, place
from optkit.targets.base import ORT_CPU, TENSORRT


@pytest.mark.parametrize(
    ("text", "shape", "expected"),
    [
        ("g (float[n,3,8,8] x) => (float[n,4,6,6] y) { y = Conv(x, w) }", (4, 3, 3, 3), 6 * 6 * 4 * 3 * 9),
        ("g (float[n,4,8,8] x) => (float[n,4,8,8] y) { y = Conv <group = 4, pads = [1,1,1,1]> (x, w) }", (4, 1, 3, 3),
         8 * 8 * 4 * 9),
        ("g (float[n,3,8,8] x) => (float[n,4,10,10] y) { y = ConvTranspose(x, w) }", (3, 4, 3, 3), 8 * 8 * 4 * 3 * 9),
        ("g (float[n,8] x) => (float[n,4] y) { y = Gemm <transB = 1> (x, w) }", (4, 8), 32),
        ("g (float[n,5,8] x) => (float[n,5,4] y) { y = MatMul(x, w) }", (8, 4), 5 * 32),
    ],
    ids=["conv", "depthwise", "transposed", "gemm", "matmul"],
)  # fmt: skip
def test_a_weight_is_used_once_at_each_position(net, text, shape, expected):
    model = net(text, w=np.zeros(shape, np.float32))
    assert macs(model.ir.graph[0], model.signature) == expected


def test_a_product_of_activations_sums_over_the_last_dimension(net):
    model = net("g (float[n,2,5,8] q, float[n,2,8,5] k) => (float[n,2,5,5] y) { y = MatMul(q, k) }")
    assert macs(model.ir.graph[0], model.signature) == 2 * 5 * 5 * 8


def test_the_share_is_of_multiplications_not_of_nodes(residual):
    name_nodes(residual)
    assert int8_share(residual, place(residual, ORT_CPU)) == 1.0
    counted = {node.name: macs(node, residual.signature) for node in residual.ir.graph if len(node.inputs) == 3}
    without = int8_share(residual, place(residual, ORT_CPU, ["Conv_2"]))
    assert without == pytest.approx(1 - counted["Conv_2"] / sum(counted.values()))
    head = int8_share(residual, place(residual, TENSORRT))
    assert head == pytest.approx(1 - counted["Gemm_15"] / sum(counted.values()))


def test_what_a_matmul_reads_says_enough(net):
    model = net("g (float[n,5,8] x) => (float[n,5,4] y) { y = MatMul(x, w) }", w=np.zeros((8, 4), np.float32))
    model.ir.graph[0].outputs[0].shape = None
    assert macs(model.ir.graph[0], model.signature) == 5 * 32


def test_unknown_shapes_give_no_share(net):
    model = net("g (float[n,4,5,5] x) => (float[n,4,5,5] y) { y = Conv(x, w) }", w=np.ones((4, 4, 1, 1), np.float32))
    name_nodes(model)
    placement = place(model, ORT_CPU)
    assert int8_share(model, placement) == 1.0
    model.ir.graph[0].outputs[0].shape = None
    assert int8_share(model, placement) is None
