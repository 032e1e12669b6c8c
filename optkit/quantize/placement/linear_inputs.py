"""ONNX Runtime: a matrix product with a constant is quantized on its inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optkit.quantize.placement.draft import Draft
from optkit.quantize.placement.read_int8 import read_int8

if TYPE_CHECKING:
    import onnx_ir as ir


def linear_inputs(node: ir.Node, draft: Draft) -> bool:
    """``MatMul`` and ``Gemm`` read INT8 and write float; products of two activations stay in float.

    The kernels write float for free, and what follows (Softmax, LayerNorm, Gelu) wants it: on encoders this placement
    doubles the decibels of quantizing the outputs too.
    """
    if node.op_type not in ("MatMul", "Gemm"):
        return False
    read_int8(node, draft)
    return True
