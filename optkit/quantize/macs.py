"""Counts multiplications: how much of a model's work a placement moves to INT8."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from optkit.models import OnnxModel, Signature
from optkit.quantize.placement import Placement
from optkit.quantize.placement.draft import RECURRENT, WEIGHTED
from optkit.quantize.placement.graph import constant

if TYPE_CHECKING:
    import onnx_ir as ir


def macs(node: ir.Node, signature: Signature) -> int | None:
    """Multiplications for one sample, dynamic dimensions at their ``opt``; None where shapes are not known.

    Every weight is used once at each position of the output, or of the input that ConvTranspose spreads; a product of
    two activations sums over the last dimension of the first. Recurrent layers use both of their weights at each step.
    """
    if node.op_type in RECURRENT:
        return _of_steps(node, signature)
    weight = constant(node.inputs[1])
    read, written = _dims(node.inputs[0], signature), _dims(node.outputs[0], signature)
    if weight is None:
        return None if read is None or written is None else math.prod(written) * read[-1]
    # Shape inference gives up on what a MatMul writes sooner than on what it reads
    table = node.op_type == "MatMul" and len(weight.shape) == 2
    positions = read if table or node.op_type == "ConvTranspose" else written
    if positions is None:
        return None
    del positions[1 if node.op_type.startswith("Conv") else -1]  # channels
    return math.prod(positions) * math.prod(weight.numpy().shape)


def _of_steps(node: ir.Node, signature: Signature) -> int | None:
    read, weights = _dims(node.inputs[0], signature), [constant(value) for value in node.inputs[1:3]]
    sizes = [math.prod(weight.numpy().shape) for weight in weights if weight is not None]
    return None if read is None or len(sizes) < len(weights) else math.prod(read[:-1]) * sum(sizes)


def _dims(value: ir.Value | None, signature: Signature) -> list[int] | None:
    if value is None or value.shape is None:
        return None
    sizes = signature.sizes(**({signature.batch: 1} if signature.batch else {}))
    dims = [dim if isinstance(dim, int) else sizes.get(str(dim.value)) for dim in value.shape]
    known = [dim for dim in dims if dim is not None]
    return known if len(known) == len(dims) else None


def int8_share(model: OnnxModel, placement: Placement) -> float | None:
    """The share, 0 to 1, of the multiplications of weighted nodes that is in INT8; None where shapes are unknown."""
    in_int8 = {use.node for use in placement.weights}
    nodes = [node for node in model.ir.graph if node.name in in_int8 or _left(node, placement)]
    counted = [(node.name in in_int8, macs(node, model.signature)) for node in nodes]
    known = [(quantized, count) for quantized, count in counted if count is not None]
    total = sum(count for _, count in known)
    if len(known) < len(counted) or not total:
        return None
    return sum(count for quantized, count in known if quantized) / total


def _left(node: ir.Node, placement: Placement) -> bool:
    return node.op_type in WEIGHTED | RECURRENT and node.name in placement.kept_float
