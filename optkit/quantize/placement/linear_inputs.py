"""ONNX Runtime: a matrix product with a constant is quantized on its inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optkit.quantize.placement.draft import Draft
from optkit.quantize.placement.graph import after_activation, constant, only_consumer
from optkit.quantize.placement.read_int8 import read_int8

if TYPE_CHECKING:
    import onnx_ir as ir


def linear_inputs(node: ir.Node, draft: Draft) -> bool:
    """``MatMul`` and ``Gemm`` read INT8 and write float; products of two activations stay in float.

    The kernels write float for free, and what follows (Softmax, LayerNorm, Gelu) wants it: on encoders this placement
    doubles the decibels of quantizing the outputs too.

    ONNX Runtime makes a float Gemm of a product and the vector that is added to it, before it looks at Q/DQ pairs,
    where it knows the shape or the product has two dimensions. A vector with a 1 before it is left alone. It fuses
    ``Gemm`` and the Relu or Clip after it into a float kernel too, unless what the two write is quantized.
    """
    if node.op_type not in ("MatMul", "Gemm"):
        return False
    add = merged_add(node)
    if add is not None and _dimensions(node) == 2:
        draft.keep_float(node, "ONNX Runtime makes a float Gemm of it and its Add: run optimize_graph before")
    elif read_int8(node, draft):
        if add is not None:
            draft.keep_apart(add)
        activated = after_activation(node.outputs[0])
        if node.op_type == "Gemm" and activated is not node.outputs[0]:
            draft.quantize_output(activated)
    return True


def merged_add(node: ir.Node) -> ir.Node | None:
    """The Add behind a ``MatMul`` with which ONNX Runtime would make a float Gemm of it."""
    add = only_consumer(node.outputs[0]) if node.op_type == "MatMul" else None
    shape = None if node.inputs[0] is None else node.inputs[0].shape
    if add is None or add.op_type != "Add" or shape is None:
        return None
    ranks = {len(tensor.shape) for value in add.inputs if (tensor := constant(value)) is not None}
    if len(shape) == 2:
        return add if ranks & {1, 2} else None
    return add if ranks == {1} and shape.is_static() else None


def _dimensions(node: ir.Node) -> int | None:
    shape = None if node.inputs[0] is None else node.inputs[0].shape
    return None if shape is None else len(shape)
