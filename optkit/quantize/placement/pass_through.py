"""ONNX Runtime: what only moves or selects INT8 values writes INT8 with the same scale."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optkit.quantize.placement.draft import Draft
from optkit.quantize.placement.graph import MOVES

if TYPE_CHECKING:
    import onnx_ir as ir

_SELECTS = frozenset({"Gather", "MaxPool", "Slice"})


def pass_through(node: ir.Node, draft: Draft) -> bool:
    """``MaxPool``, ``Reshape``, ``Transpose`` and their like of INT8 write INT8 with their input's scale."""
    if node.op_type not in MOVES | _SELECTS or len(node.outputs) != 1:
        return False
    source = node.inputs[0]
    if source is None or not draft.is_int8(source):
        return False
    draft.quantize_output(node.outputs[0], same_scale_as=source)
    return True
