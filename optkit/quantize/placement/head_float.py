"""TensorRT: the layer that makes the logits stays in float."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optkit.quantize.placement.draft import WEIGHTED, Draft
from optkit.quantize.placement.graph import MOVES, constant, only_consumer

if TYPE_CHECKING:
    import onnx_ir as ir

_ENDS = MOVES | {"Identity", "LogSoftmax", "Sigmoid", "Softmax"}


def head_float(node: ir.Node, draft: Draft) -> bool:
    """The last ``Gemm`` or ``MatMul`` before an output of the graph stays in float: little time, much accuracy."""
    if node.op_type not in WEIGHTED or node.op_type.startswith("Conv") or not _leads_out(node.outputs[0]):
        return False
    draft.keep_float(node, "it makes the model's output")
    return True


def _leads_out(value: ir.Value) -> bool:
    while not value.is_graph_output():
        consumer = only_consumer(value)
        if consumer is None or not (consumer.op_type in _ENDS or _adds_constant(consumer)):
            return False
        value = consumer.outputs[0]
    return True


def _adds_constant(node: ir.Node) -> bool:
    return node.op_type == "Add" and any(constant(operand) is not None for operand in node.inputs)
