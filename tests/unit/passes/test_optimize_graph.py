import re
from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from optkit.errors import PostconditionError, RecipeError
from optkit.passes import optimize_graph
from optkit.passes.graph_edit import GraphEdit, drift
from optkit.passes.optimize_graph import STEPS, OptimizeGraph
from optkit.recipe import Recipe

RESIDUAL = """g (float[n,1,4,4] x) => (float[n,2] y) <
    float[2,1,1,1] w = {1, 2}, float[2] k = {2, 4}, float[2] t = {1, 3}, float[2] mean = {0.5, 1},
    float[2] var = {1, 4}, float[2,2] m = {1, 2, 3, 4}, float[2] b = {1, 2}, float zero = {0}, float six = {6},
    int64[2] axes = {2, 3}> {
    c = Conv(x, w)  n = BatchNormalization<epsilon = 0.0>(c, k, t, mean, var)  r = Relu(n)  q = Clip(r, zero, six)
    i = Identity(q)  p = ReduceMean<keepdims = 0>(i, axes)  mt = Transpose<perm = [1, 0]>(m)
    o = MatMul(p, mt)  y = Add(o, b) }"""

OPTIMIZED = """g (float[n,1,4,4] x) => (float[n,2] y) <
    float[2,1,1,1] w = {2, 4}, float[2] b = {0, 1}, float zero = {0}, float six = {6}, int64[2] axes = {2, 3},
    float[2,2] m = {1, 3, 2, 4}, float[2] d = {1, 2}> {
    c = Conv(x, w, b)  q = Clip(c, zero, six)  p = ReduceMean<keepdims = 0>(q, axes)  y = Gemm(p, m, d) }"""


def test_the_steps_work_together(rewrites: Any) -> None:
    rewrites(OptimizeGraph(), RESIDUAL, OPTIMIZED)


def test_an_optimized_graph_stays(leaves: Any) -> None:
    leaves(OptimizeGraph(), OPTIMIZED)


def test_skipped_steps_do_not_run(onnx_model: Any, context: Any) -> None:
    after = OptimizeGraph(skip=("fuse_conv_bn", "fuse_gemm")).run(onnx_model(RESIDUAL), context)
    ops = Counter(node.op_type for node in after.ir.graph)
    assert ops["BatchNormalization"] == 1
    assert ops["Gemm"] == 0
    assert ops["Identity"] == 0


def test_a_typo_in_skip_names_the_nearest_step() -> None:
    with pytest.raises(
        RecipeError, match=r"'fuse_con_bn' is not a step of optimize_graph: did you mean 'fuse_conv_bn'"
    ):
        Recipe.parse("passes: [{use: optimize_graph, skip: [fuse_con_bn]}]")


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.use)
def test_every_step_stands_alone_in_a_recipe(step: GraphEdit) -> None:
    assert Recipe.parse(f"passes: [{step.use}]").passes == (step,)


def test_quantization_stays_as_it_is(leaves: Any) -> None:
    leaves(
        OptimizeGraph(),
        """g (float[n,1,4,4] x) => (float[n,2,4,4] y) <float[2,1,1,1] w = {1, 2}, float s = {0.1}, int8 z = {0}> {
            q = QuantizeLinear(w, s, z) d = DequantizeLinear(q, s, z)
            a = QuantizeLinear(x, s, z) e = DequantizeLinear(a, s, z) y = Conv(e, d) }""",
    )


class BreakRelu(GraphEdit):
    use: Any = "break_relu"

    def edit(self, model: ir.Model, context: Any) -> bool:
        broken = [node for node in model.graph if node.op_type == "Relu"]
        for node in broken:
            node.op_type = "Neg"
        return bool(broken)


def test_a_step_that_changes_the_numbers_is_named(onnx_model: Any, context: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(optimize_graph, "STEPS", (*STEPS[:3], BreakRelu(), *STEPS[3:]))
    model, step = onnx_model(RESIDUAL), OptimizeGraph()
    after = step.run(model, context)
    with pytest.raises(PostconditionError, match="in its step 'break_relu'"):
        step.ensures(model, after, context)


def bert_layer(opset: int) -> onnx.ModelProto:
    """The feed-forward half of a BERT layer, written out as older exporters do."""
    rng = np.random.default_rng(0)
    weights = {"w": (8, 16), "c": (16,), "v": (16, 8), "d": (8,), "s": (8,), "t": (8,)}
    text = f"""<ir_version: 10, opset_import: ["" : {opset}]> g (float[batch,seq,8] x) => (float[batch,seq,8] y)
        <float root = {{1.4142135}}, float half = {{0.5}}, float one = {{1}}, float two = {{2}}, float eps = {{1e-12}},
         int64[1] axis = {{-1}}> {{
        u0 = MatMul(x, w) u = Add(c, u0)
        e0 = Div(u, root) e1 = Erf(e0) e2 = Add(e1, one) e3 = Mul(u, e2) g = Mul(e3, half)
        o0 = MatMul(g, v) o = Add(o0, d) r = Add(o, x)
        mean = ReduceMean(r, axis) diff = Sub(r, mean) sq = Pow(diff, two) var = ReduceMean(sq, axis)
        ve = Add(var, eps) std = Sqrt(ve) n = Div(diff, std) ns = Mul(n, s) y = Add(ns, t) }}"""
    model = onnx.parser.parse_model(re.sub(r"\s+", " ", text))
    for name, shape in weights.items():
        array = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return model


def test_a_transformer_layer(onnx_model: Any, context: Any) -> None:
    from dataclasses import replace

    model = onnx_model("g (float[batch,seq,8] x) => (float[batch,seq,8] y) { y = Identity(x) }")
    model = replace(model, ir=ir.from_proto(bert_layer(20)))
    step = OptimizeGraph()
    after = step.run(model, context)
    assert [node.op_type for node in after.ir.graph] == [
        "MatMul",
        "Add",
        "Gelu",
        "MatMul",
        "Add",
        "Add",
        "LayerNormalization",
    ]
    step.ensures(model, after, context)
    assert drift(model, after, context).sqnr_db > 100
    onnx.checker.check_model(ir.to_proto(after.ir), full_check=True)
