"""Dynamic quantization: the products inside an LSTM find the range of what they read at each step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optkit.quantize.placement.draft import RECURRENT, Draft
from optkit.quantize.placement.graph import attribute, constant, weight_axis

if TYPE_CHECKING:
    import onnx_ir as ir

_WEIGHTS = (1, 2)
"""Inputs of an LSTM: what multiplies its input, and what multiplies its state."""


def dynamic_recurrent(node: ir.Node, draft: Draft) -> bool:
    """``LSTM`` with constant weights becomes ONNX Runtime's ``DynamicQuantizeLSTM``; ``GRU`` and ``RNN`` stay float."""
    if node.op_type not in RECURRENT:
        return False
    problem = _problem(node)
    if problem is not None:
        draft.keep_float(node, problem)
        return True
    draft.quantize_at_run_time(node)
    for position in _WEIGHTS:
        draft.quantize_weight(node, weight_axis(node), position)
    return True


def _problem(node: ir.Node) -> str | None:
    if node.op_type != "LSTM":
        return f"no runtime has an INT8 {node.op_type}"
    weights = [constant(node.inputs[position]) for position in _WEIGHTS]
    if any(weight is None for weight in weights):
        return "its weights are not constants"
    if any(weight is not None and weight.dtype.numpy() != "float32" for weight in weights):
        return "it does not compute in float32"
    return "its batch comes first" if attribute(node, "layout", 0) else None
