from __future__ import annotations

import numpy as np

from optkit.data import Batch
from optkit.quantize.walk import walk
from optkit.targets.onnxruntime import open_onnx

NET = """g (float[b,3] x) => (float[b,3] y, float[b,3] unused)
    <float[3] two = {2, 2, 2}, float[3] one = {1, 1, 1}> {
    a = Mul(x, two)
    b1 = Add(a, one)
    unused = Neg(a)
    s = ReduceSum<keepdims = 1>(b1)
    c = Div(b1, s)
    y = Add(c, x)
}"""


def batches(*sizes: int) -> list[Batch]:
    rng = np.random.default_rng(0)
    return [Batch({"x": rng.random((size, 3), np.float32)}, None) for size in sizes]


def test_every_stop_shows_what_the_whole_graph_computes(onnx_model):
    model, given = onnx_model(NET), batches(4, 2)
    found = dict(walk(model, ["y", "a", "c"], given))
    assert list(found) == ["a", "c", "y"]  # in the order of the graph
    with open_onnx(model, 1, optimize=False) as runner:
        for batch, array in zip(given, found["y"], strict=True):
            np.testing.assert_array_equal(array, runner.run(batch.feeds)["y"])
    np.testing.assert_array_equal(found["a"][1], given[1].feeds["x"] * 2)


def test_an_edited_tensor_and_an_exchanged_weight_change_what_follows(onnx_model):
    import onnx_ir as ir

    model, given = onnx_model(NET), batches(2)
    found = {}
    for name, arrays in walk(model, ["a", "b1"], given):
        if name == "a":
            arrays[0][:] = 5
            model.ir.graph.initializers["one"].const_value = ir.tensor(np.full(3, 7, np.float32), name="one")
        found[name] = arrays[0]
    assert (found["b1"] == 12).all()


def test_the_body_of_an_if_sees_tensors_of_earlier_stretches(onnx_model):
    model = onnx_model(
        """g (float[b,3] x, bool c) => (float[b,3] y) {
            a = Neg(x)
            s = Neg(a)
            y = If(c) <then_branch = yes () => (float[b,3] t) { t = Add(a, s) },
                       else_branch = no () => (float[b,3] e) { e = Identity(a) }>
        }"""
    )
    x = np.ones((2, 3), np.float32)
    for taken, wanted in ((True, 0), (False, -1)):
        found = dict(walk(model, ["s", "y"], [Batch({"x": x, "c": np.array(taken)}, None)]))
        assert (found["y"][0] == wanted).all()
