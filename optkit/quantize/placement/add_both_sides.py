"""ONNX Runtime: the addition that ends a residual block is quantized on all sides."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optkit.quantize.placement.draft import Draft
from optkit.quantize.placement.graph import after_activation

if TYPE_CHECKING:
    import onnx_ir as ir


def add_both_sides(node: ir.Node, draft: Draft) -> bool:
    """``Add`` of two INT8 tensors writes INT8, so that QLinearAdd forms; a Relu or Clip after it is absorbed."""
    if node.op_type != "Add" or not all(draft.is_int8(value) for value in node.inputs):
        return False
    draft.quantize_output(after_activation(node.outputs[0]))
    return True
