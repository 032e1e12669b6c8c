from __future__ import annotations

import numpy as np
import pytest

from optkit.passes.fold_biases import FoldBiases
from optkit.passes.legalize import legalize
from optkit.targets.base import ORT_CPU, TENSORRT, Dialect
from optkit.targets.onnxruntime import open_onnx

CONV = """
g (float[2,4,5,5] x) => (float[2,3,5,5] y) <float s = {0.1}, int8 z = {0}, float[3] t = {0.1, 0.2, 0.3},
 int8[3,4,1,1] w = {1,2,3,4,5,6,7,8,9,10,11,12}, int32[3] b = {100, -2000000001, 300},
 float[3] u = {0.01, 0.02, 0.03}> {
    q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) e = DequantizeLinear<axis=0>(w, t)
    f = DequantizeLinear<axis=0>(b, u) y = Conv(d, e, f) }
"""


def ops(model):
    return [node.op_type for node in model.ir.graph]


def run(model):
    feeds = model.signature.random_feeds(np.random.default_rng(0))
    with open_onnx(model, optimize=False) as runner:
        return runner.run(feeds)["y"]


def test_biases_in_int32_become_the_floats_that_they_stand_for(onnx_model, context):
    model = onnx_model(CONV)
    after = FoldBiases().run(model, context)
    assert ops(after) == ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "Conv"]
    assert "b" in model.ir.graph.initializers
    assert after.ir.graph.initializers.keys() & {"b", "u"} == set()
    np.testing.assert_array_equal(run(after), run(model))
    assert FoldBiases().run(after, context) is after


@pytest.mark.parametrize(
    ("dequantize", "folded"),
    [
        ("<axis=1>(k, u)", True),
        ("(k, u)", True),
        ("<axis=-2>(k, u)", True),
        ("(k, s)", True),
        ("(i, s)", False),
        ("(k, v)", False),
    ],
)
def test_scales_may_be_of_any_axis_and_must_be_constant(onnx_model, context, dequantize, folded):
    model = onnx_model(
        f"""g (float[2,3,2] x, int32[2,3,2] i, float v) => (float[2,3,2] y)
          <float s = {{0.5}}, float[3] u = {{0.1, 0.2, 0.4}}, int32[2,3,2] k = {{1,2,3,4,5,6,7,8,9,10,11,12}}> {{
            d = DequantizeLinear{dequantize} y = Add(x, d) }}"""
    )
    after = FoldBiases().run(model, context)
    assert ops(after) == (["Add"] if folded else ["DequantizeLinear", "Add"])
    np.testing.assert_array_equal(run(after), run(model))


def test_an_output_of_the_graph_stays(onnx_model, context):
    model = onnx_model(
        "g (float[2] x) => (float[2] y) <float s = {0.5}, int32[2] k = {1, 2}> { y = DequantizeLinear(k, s) }"
    )
    assert FoldBiases().run(model, context) is model


@pytest.mark.parametrize(("policy", "folded"), [(TENSORRT, True), (ORT_CPU, False), (None, False)])
def test_only_for_targets_that_take_biases_in_float(onnx_model, context, policy, folded):
    legal = legalize(onnx_model(CONV), Dialect(int8=policy), context)
    assert ops(legal).count("DequantizeLinear") == (2 if folded else 3)
