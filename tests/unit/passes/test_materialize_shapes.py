from typing import Any

from optkit.passes.materialize_shapes import MaterializeShapes

COMPUTED = """<int64[1] heads = {2}, int64[1] width = {3}> {
    b = Shape<start = 0, end = 2>(x) s = Concat<axis = 0>(b, heads, width) a = Reshape(x, s) y = Relu(a) }"""


def test_a_computed_shape_becomes_constant(rewrites: Any, onnx_model: Any, context: Any) -> None:
    before = f"g (float[batch,seq,6] x) => (float[batch,seq,2,3] y) <float[batch,seq,2,3] a> {COMPUTED}"
    before = before.replace("<float[batch,seq,2,3] a> <", "<float[batch,seq,2,3] a, ")
    after = """g (float[batch,seq,6] x) => (float[batch,seq,2,3] y) <int64[4] s = {0, 0, 2, 3}> {
        a = Reshape(x, s) y = Relu(a) }"""
    rewrites(MaterializeShapes(), before, after)


def test_two_unknown_dimensions_stay(leaves: Any) -> None:
    leaves(
        MaterializeShapes(),
        """g (float[a,b,6] x, int64[3] s) => (float[c,d,6] y) { y = Reshape(x, s) }""",
    )
