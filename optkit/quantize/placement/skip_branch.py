"""TensorRT: a residual addition is quantized on its skip branch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optkit.quantize.placement.draft import Draft
from optkit.quantize.placement.graph import ACTIVATIONS, after_activation, constant, only_consumer
from optkit.quantize.placement.resize_int8 import resize_int8

if TYPE_CHECKING:
    import onnx_ir as ir

_AVERAGES = frozenset({"AveragePool", "GlobalAveragePool", "ReduceMean"})


def skip_branch(node: ir.Node, draft: Draft) -> bool:
    """``Add`` of a convolution and a skip reads the skip as INT8 and the convolution as float: one fused kernel.

    With a convolution on both sides, as in a block that downsamples, the skip is the branch with the shorter way up.
    The skip's Q/DQ pair is the one that the next convolution reads as well. Where no convolution but an average comes
    next, the sum is quantized for it: a kernel that writes float wants its skip in float, so another kernel would have
    to make it, and the noise of rounding averages out.
    """
    if node.op_type != "Add" or any(constant(value) is not None for value in node.inputs):
        return False
    branches = [_convs_above(value) for value in node.inputs]
    if max(branches) == 0:
        return False
    skip = branches.index(min(branches))
    if not _joins_int8(node, 1 - skip, draft):
        return False
    draft.quantize_input(node, skip)
    resize_int8(node, skip, draft)
    total = after_activation(node.outputs[0])
    writer, reader = total.producer(), only_consumer(total)
    if writer is None or reader is None or {writer.name, reader.name} & draft.kept_float.keys():
        return True
    if reader.op_type in _AVERAGES:
        draft.quantize_output(total)
    return True


def _joins_int8(node: ir.Node, side: int, draft: Draft) -> bool:
    value = node.inputs[side]
    producer = None if value is None else value.producer()
    return producer is not None and producer.name in draft.int8


def _convs_above(value: ir.Value | None) -> int:
    """How many convolutions lead to a tensor in one line that nobody else reads; 0 if none ends there."""
    count = 0
    while value is not None:
        producer = value.producer()
        if producer is None or only_consumer(value) is None:
            break
        if producer.op_type in ("Conv", "ConvTranspose"):
            count += 1
        elif count == 0 or producer.op_type not in ACTIVATIONS:
            break
        value = producer.inputs[0]
    return count
