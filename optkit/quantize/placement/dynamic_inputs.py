"""Dynamic quantization: products with a constant find the range of what they read at each call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optkit.quantize.placement.draft import Draft
from optkit.quantize.placement.graph import weight_axis, weight_problem

if TYPE_CHECKING:
    import onnx_ir as ir


def dynamic_inputs(node: ir.Node, draft: Draft) -> bool:
    """``MatMul`` and ``Gemm`` read UINT8 of the range that the call has, and write float."""
    if node.op_type not in ("MatMul", "Gemm"):
        return False
    problem = weight_problem(node)
    if problem is not None:
        draft.keep_float(node, problem)
        return True
    draft.quantize_at_run_time(node)
    draft.quantize_weight(node, weight_axis(node))
    return True
