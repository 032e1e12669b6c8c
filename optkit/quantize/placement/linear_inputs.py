"""ONNX Runtime: a matrix product with a constant is quantized on its inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optkit.quantize.placement.draft import Draft
from optkit.quantize.placement.graph import weight_axis, weight_problem

if TYPE_CHECKING:
    import onnx_ir as ir


def linear_inputs(node: ir.Node, draft: Draft) -> bool:
    """``MatMul`` and ``Gemm`` read INT8 and write float; products of two activations stay in float.

    The kernels write float for free, and what follows (Softmax, LayerNorm, Gelu) wants it: on encoders this placement
    doubles the decibels of quantizing the outputs too.
    """
    if node.op_type not in ("MatMul", "Gemm"):
        return False
    problem = weight_problem(node)
    if problem is not None:
        draft.keep_float(node, problem)
        return True
    draft.quantize_input(node, 0)
    draft.quantize_weight(node, weight_axis(node))
    return True
