from __future__ import annotations

from dataclasses import replace

import numpy as np

from optkit.models import DimRange
from optkit.passes.fix_sizes import fix_sizes
from optkit.targets.onnxruntime import open_onnx

TOKENS = """
g (float[batch,3,2] x) => (float[batch,4,2] y)
  <float[1,1,2] token = {1, 2}, int64[1] front = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] end = {1}> {
    s = Shape(x)
    n = Slice(s, front, end)
    shape = Concat<axis=0>(n, one, two)
    t = Expand(token, shape)
    y = Concat<axis=1>(t, x)
}
"""


def test_a_size_that_cannot_vary_is_written_into_the_graph(onnx_model, context):
    model = onnx_model(TOKENS)
    model = replace(model, signature=replace(model.signature, dims={"batch": DimRange(2, 2, 2)}))
    fixed = fix_sizes(model, context)
    assert fixed.signature == model.signature
    assert [dim for value in (*fixed.ir.graph.inputs, *fixed.ir.graph.outputs) for dim in value.shape] == [
        *(2, 3, 2),
        *(2, 4, 2),
    ]
    assert not {"Shape", "Slice"} & {node.op_type for node in fixed.ir.graph}
    x = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    with open_onnx(model) as before, open_onnx(fixed) as after:
        np.testing.assert_array_equal(before.run({"x": x})["y"], after.run({"x": x})["y"])
    assert str(model.ir.graph.inputs[0].shape[0]) == "batch"


def test_a_size_that_may_vary_stays_a_name(onnx_model, context):
    model = onnx_model(TOKENS)
    assert fix_sizes(model, context) is model
    ranged = replace(model, signature=replace(model.signature, dims={"batch": DimRange(1, 2, 2)}))
    assert fix_sizes(ranged, context) is ranged
