"""Dynamic quantization: the products inside an LSTM find the range of what they read at each step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optkit.quantize.placement.draft import RECURRENT, Draft
from optkit.quantize.placement.graph import attribute, constant, weight_axis

if TYPE_CHECKING:
    import onnx_ir as ir

_WEIGHTS = (1, 2)
"""Inputs of an LSTM: what multiplies its input, and what multiplies its state."""

_GATES = 4

_LEAST = 64
"""Hidden units from which INT8 pays. With one sample at a time it is 0.83 times as fast as float with 32, 1.2 times
with 64, 2 times with 128 and 3 times with 256 (ONNX Runtime 1.32, one thread with AVX2)."""


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
        return f"there is no INT8 {node.op_type}"
    if attribute(node, "layout", 0):
        return "its batch comes first"
    weights = [constant(node.inputs[position]) for position in _WEIGHTS]
    for weight in weights:
        if weight is None:
            return "its weights are not constants"
        if weight.dtype.numpy() != "float32":
            return "it does not compute in float32"
        hidden = len(weight.numpy()[0]) // _GATES
        if hidden < _LEAST:
            return f"an LSTM with {hidden} hidden units is too small for INT8 to pay"
    return None
