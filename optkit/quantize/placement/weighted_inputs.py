"""TensorRT: whatever has a weight is quantized on its inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optkit.quantize.placement.draft import WEIGHTED, Draft
from optkit.quantize.placement.read_int8 import read_int8
from optkit.quantize.placement.resize_int8 import resize_int8

if TYPE_CHECKING:
    import onnx_ir as ir


def weighted_inputs(node: ir.Node, draft: Draft) -> bool:
    """Convolutions and products with a constant read INT8 and write float; the next one's Q is the epilogue."""
    if node.op_type not in WEIGHTED:
        return False
    if read_int8(node, draft):
        resize_int8(node, 0, draft)
    return True
