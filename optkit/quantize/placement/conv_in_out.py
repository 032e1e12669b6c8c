"""ONNX Runtime: a convolution is quantized on both sides."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optkit.quantize.placement.draft import Draft
from optkit.quantize.placement.graph import after_activation
from optkit.quantize.placement.read_int8 import read_int8

if TYPE_CHECKING:
    import onnx_ir as ir


def conv_in_out(node: ir.Node, draft: Draft) -> bool:
    """``Conv`` reads and writes INT8, for only then does QLinearConv form; a Relu or Clip after it is absorbed."""
    if node.op_type != "Conv":
        return False
    if read_int8(node, draft):
        draft.quantize_output(after_activation(node.outputs[0]))
    return True
