"""What every rule for a weighted node begins with: the node reads INT8, or stays in float for a reason."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optkit.quantize.placement.draft import Draft
from optkit.quantize.placement.graph import weight_axis, weight_problem

if TYPE_CHECKING:
    import onnx_ir as ir


def read_int8(node: ir.Node, draft: Draft) -> bool:
    """Quantize a node's first input and its weight; False if its weight cannot be, and the node is kept in float."""
    problem = weight_problem(node)
    if problem is not None:
        draft.keep_float(node, problem)
        return False
    draft.quantize_input(node, 0)
    draft.quantize_weight(node, weight_axis(node))
    return True
