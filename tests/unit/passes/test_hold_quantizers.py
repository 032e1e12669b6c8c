from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from optkit.passes.graph_edit import infer_types
from optkit.passes.hold_quantizers import HoldQuantizers
from optkit.targets.onnxruntime import open_onnx

GRAPH = """
g (float[1,4,6,6] x) => (float[A,B,C,D] y)
  <float s = {{0.05}}, float t = {{0.06}}, int8 z = {{0}}, float one = {{1}}, bool[1] yes = {{1}},
   int64[2] rows = {{3,1}}, float[4] scales = {{1,1,2,2}}, int8[4,1,1,1] w = {{1,2,3,4}}> {{
    q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) {body} }}
"""
RESIZE = '<mode="linear", coordinate_transformation_mode="asymmetric">({source}, , scales)'
BEHIND = "p = QuantizeLinear(b, {scale}, z) y = DequantizeLinear(p, {scale}, z)"


@pytest.mark.parametrize(
    ("body", "held"),
    [
        ("[op] y = Gather<axis=2>(d, rows)", ["LeakyRelu", "Gather"]),
        ("[op] y = Where(yes, one, d)", ["LeakyRelu", "Where"]),
        ("[op] y = Where(yes, d, d)", ["LeakyRelu", "LeakyRelu", "Where"]),
        ("c = Transpose<perm=[0,1,3,2]>(d) [op] y = ReduceMax<axes=[2]>(c)", ["Transpose", "LeakyRelu", "ReduceMax"]),
        ("c = Concat<axis=1>(x, d) [op] y = ReduceMax<axes=[2]>(c)", ["Concat", "LeakyRelu", "ReduceMax"]),
        ("c = Abs(d) [op] y = Gather<axis=2>(c, rows)", ["Abs", "Gather"]),
        ("[op] y = Gather<axis=2>(x, rows)", ["Gather"]),
        ("[op] y = Softmax<axis=1>(d)", ["Softmax"]),
        ("e = DequantizeLinear(w, s, z) [op] y = Gather<axis=0>(e, rows)", ["LeakyRelu", "Gather"]),
        (f"[op] y = Resize{RESIZE.format(source='d')}", ["LeakyRelu", "Resize"]),
        ("[op] y = Resize(d, , scales)", ["Resize"]),
        (f"[op] b = Resize{RESIZE.format(source='d')} {BEHIND.format(scale='s')}", ["Resize"]),
        (
            f"[op] b = Resize{RESIZE.format(source='d')} {BEHIND.format(scale='t')}",
            ["LeakyRelu", "Resize", "LeakyRelu"],
        ),
        (f"[op] b = Resize{RESIZE.format(source='x')} {BEHIND.format(scale='s')}", ["Resize", "LeakyRelu"]),
        (
            f"[op] c = Resize{RESIZE.format(source='d')} b = Relu(c) {BEHIND.format(scale='s')} v = Abs(c)",
            ["LeakyRelu", "Resize", "LeakyRelu", "Relu", "Abs"],
        ),
    ],
)
def test_holds_what_tensorrt_would_move_wrongly(onnx_model, context, body, held):
    model = onnx_model(GRAPH.format(body=body), opset=17)
    infer_types(model.ir)
    after = HoldQuantizers().run(model, context)
    assert [n.op_type for n in after.ir.graph if n.op_type not in ("QuantizeLinear", "DequantizeLinear")] == held
    assert len({node.name for node in after.ir.graph if node.op_type == "LeakyRelu"}) == held.count("LeakyRelu")
    assert (after is model) is ("LeakyRelu" not in held)
    assert HoldQuantizers().run(after, context) is after
    feeds = {"x": np.random.default_rng(0).standard_normal((1, 4, 6, 6)).astype("f")}
    with open_onnx(model, optimize=False) as before, open_onnx(after, optimize=False) as runner:
        np.testing.assert_array_equal(runner.run(feeds)["y"], before.run(feeds)["y"])


def test_an_output_of_the_graph_keeps_its_name_and_reads_what_is_not_held(onnx_model, context):
    text = GRAPH.format(body=f"b = Resize{RESIZE.format(source='x')} {BEHIND.format(scale='s')}")
    model = onnx_model(text.replace("=> (", "=> (float[E,F,G,H] b, "), opset=17)
    infer_types(model.ir)
    after = HoldQuantizers().run(model, context)
    producers = {node.outputs[0].name: node for node in after.ir.graph}
    assert producers["b"].op_type == "Resize"
    assert producers["p"].inputs[0].producer().op_type == "LeakyRelu"
    onnx.checker.check_model(ir.to_proto(after.ir), full_check=True)


def test_holds_where_only_the_kind_of_the_numbers_differs(onnx_model, context):
    body = f"b = Resize{RESIZE.format(source='d')} p = QuantizeLinear(b, s, u) y = DequantizeLinear(p, s, u)"
    model = onnx_model(GRAPH.format(body=body).replace("int8 z", "uint8 u = {0}, int8 z"), opset=17)
    infer_types(model.ir)
    assert [node.op_type for node in HoldQuantizers().run(model, context).ir.graph].count("LeakyRelu") == 2


@pytest.mark.parametrize("shape", ["[N,4,6,6]", "[1,4,H,W]"])
def test_holds_a_resize_of_a_dynamic_shape_for_which_tensorrt_has_no_int8(onnx_model, context, shape):
    body = f'b = Resize<mode="linear">(d, , , sizes) {BEHIND.format(scale="s")}'
    text = (
        GRAPH.format(body=body)
        .replace("[1,4,6,6]", shape)
        .replace("float one", "int64[4] sizes = {1,4,8,8}, float one")
    )
    model = onnx_model(text, opset=17)
    infer_types(model.ir)
    after = HoldQuantizers().run(model, context)
    assert [node.op_type for node in after.ir.graph][2:5] == ["LeakyRelu", "Resize", "LeakyRelu"]
