"""Keeps a quantizer on its side of an op that TensorRT 8.5 moves it across wrongly."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from optkit.context import Context
from optkit.passes.graph_edit import GraphEdit, constant, label
from optkit.passes.spell_out_clips import quantizers_behind
from optkit.quantize.linter import same_parameters
from optkit.quantize.placement.draft import WEIGHTED
from optkit.quantize.placement.graph import MOVED_ACROSS, has_static_shapes, interpolates, moved

if TYPE_CHECKING:
    import onnx_ir as ir

BEHIND = ".held"
"""Follows a node's name in that of the LeakyRelu behind it."""

_RIGHT = (
    MOVED_ACROSS
    | WEIGHTED
    | {"Abs", "Add", "ArgMax", "AveragePool", "BatchNormalization", "Clip", "CumSum", "DepthToSpace", "Einsum", "Elu"}
    | {"Erf", "Expand", "GlobalAveragePool", "HardSigmoid", "LeakyRelu", "Max", "Min", "Mod", "Mul", "Neg", "PRelu"}
    | {"Pad", "Pow", "QuantizeLinear", "ReduceL1", "ReduceL2", "ReduceLogSumExp", "ReduceMean", "ReduceProd"}
    | {"ReduceSum", "Relu", "Shape", "Sigmoid", "Softmax", "Softplus", "Sub", "Tanh", "ThresholdedRelu", "Tile", "TopK"}
)
"""What TensorRT 8.5.3 was run with right behind a DequantizeLinear, and computes the same; what is not here is held."""


class HoldQuantizers(GraphEdit):
    """Puts a ``LeakyRelu`` of slope 1, which changes no number, between a quantizer and an op that must not cross it.

    TensorRT 8.5.3 moves nothing across a LeakyRelu. A DequantizeLinear that ``Gather``, ``Where`` or their like read it
    takes into their kernel, and there divides by the scale instead of multiplying with it; before ``ReduceMax`` it
    refuses it. It moves quantizers across a ``Resize`` that interpolates, so that numbers are rounded and saturate
    before, and has no kernel for that where shapes are dynamic: a Resize is left alone only where shapes are static,
    what it reads is INT8 with the scale of what it writes, and nothing reads that in float
    (``benchmarks/gpu/results/quantizers-h200.txt``). The bodies of If and Loop are left as they are.
    """

    use: Literal["hold_quantizers"] = "hold_quantizers"
    touches: ClassVar[frozenset[str]] = frozenset({"QuantizeLinear", "DequantizeLinear"})

    def applies(self, model: ir.Model) -> bool:
        """Whether there are quantizers, and an op that may be wrong beside one."""
        return super().applies(model) and any(map(_may_be_wrong, model.graph))

    def edit(self, model: ir.Model, context: Context) -> bool:
        """Hold what is dequantized before an op, and what is quantized behind a Resize."""
        changed = False
        for node in filter(_may_be_wrong, list(model.graph)):
            if interpolates(node):
                quantizers, alone = quantizers_behind(node.outputs[0])
                if quantizers and alone and has_static_shapes(node) and _has_their_scale(node.inputs[0], quantizers):
                    continue
                if quantizers:
                    _hold_output(node)
                    changed = True
            for position, value in enumerate(node.inputs):
                if value is not None and _is_dequantized(value):
                    _hold_input(node, position, value)
                    changed = True
        return changed


def _may_be_wrong(node: ir.Node) -> bool:
    if node.domain or node.op_type in _RIGHT or node.op_type == "DequantizeLinear":  # that reads numbers, not floats
        return False
    return node.op_type != "Resize" or interpolates(node)


def _is_dequantized(value: ir.Value) -> bool:
    """Whether a float32 tensor, or a part of it, is dequantized, across all that TensorRT moves that across."""
    import onnx_ir as ir

    ahead, seen = [value], {value}
    while ahead:
        tensor = ahead.pop()
        producer = tensor.producer()
        if producer is None or tensor.dtype != ir.DataType.FLOAT:
            continue
        if producer.op_type == "DequantizeLinear":
            return True
        new = {*moved(producer)} - seen
        ahead += new
        seen |= new
    return False


def _has_their_scale(value: ir.Value | None, quantizers: list[ir.Node]) -> bool:
    """Whether a tensor is dequantized with the scale and zero point of all these quantizers."""
    dequantizer = None if value is None else value.producer()
    if dequantizer is None or dequantizer.op_type != "DequantizeLinear":
        return False
    grids = [node.inputs[1:3] for node in (dequantizer, *quantizers)]
    known = all(len(grid) == len(grids[0]) and all(constant(part) is not None for part in grid) for grid in grids)
    return known and all(same_parameters(dequantizer, quantizer) for quantizer in quantizers)


def _hold_input(node: ir.Node, position: int, value: ir.Value) -> None:
    held = _held(value, f"{label(node)}.held_{position}")
    assert node.graph is not None
    node.graph.insert_before(node, held)
    node.replace_input_with(position, held.outputs[0])


def _hold_output(node: ir.Node) -> None:
    """All that reads the first output reads it held; where it is an output of the graph, that stays as it is."""
    value = node.outputs[0]
    uses = tuple(value.uses())
    held = _held(value, label(node) + BEHIND)
    for use in uses:
        use.node.replace_input_with(use.idx, held.outputs[0])
    assert node.graph is not None
    node.graph.insert_after(node, held)


def _held(value: ir.Value, name: str) -> ir.Node:
    import onnx_ir as ir

    held = ir.node("LeakyRelu", [value], attributes={"alpha": 1.0}, num_outputs=1, name=name)
    held.outputs[0].name, held.outputs[0].type, held.outputs[0].shape = name, value.type, value.shape
    return held
