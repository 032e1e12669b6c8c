"""Writes a Clip before a quantizer in ops that a quantizer may be moved across."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from optkit.context import Context
from optkit.passes.graph_edit import GraphEdit, constant, replace, scalar, sweep
from optkit.quantize.placement.graph import COMMUTES, is_int8_product

if TYPE_CHECKING:
    import onnx_ir as ir

_MOVES = COMMUTES - {"Cast"} | {"Identity"}  # a Cast to integers would wrap what saturates
_CLIPS = frozenset({"Clip", "Max", "Min", "Relu"})


class SpellOutClips(GraphEdit):
    """A float32 ``Clip`` that a quantizer reads becomes Relu or Max, and Min; the numbers stay the same to the bit.

    TensorRT 8.5.3 moves a quantizer to before a Clip that no kernel takes in, such as that of a ReLU6 behind a
    convolution in float, and then clips the INT8 numbers at the bounds of the floats
    (``benchmarks/gpu/results/efficientnet_lite0-clips-h200.txt``). It may move one across Relu, whose numbers it does
    not change, and across Min, whose constant it quantizes as well (``clips-h200.txt`` beside that). A bound at which
    all that read it saturate anyway needs no op. What a convolution or product in INT8 gives is clipped in its kernel,
    before it is quantized: there Clip stays where it would take a Max or Min.
    """

    use: Literal["spell_out_clips"] = "spell_out_clips"
    touches: ClassVar[frozenset[str]] = frozenset({"Clip"})

    def edit(self, model: ir.Model, context: Context) -> bool:
        """Rewrite every Clip before a quantizer, as far as its bounds are known."""
        clips = [node for node in model.graph if node.op_type == "Clip" and node.domain == ""]
        changed = [_spell_out(model, clip) for clip in reversed(clips)]  # one before another sees what became of that
        if any(changed):
            sweep(model)
        return any(changed)


def _spell_out(model: ir.Model, clip: ir.Node) -> bool:
    import onnx_ir as ir

    source, result = clip.inputs[0], clip.outputs[0]
    if source is None or source.dtype != ir.DataType.FLOAT or clip.attributes:  # attributes: before opset 11
        return False
    low, high = (clip.inputs[i] if len(clip.inputs) > i else None for i in (1, 2))
    least, most = -np.inf if low is None else scalar(low), np.inf if high is None else scalar(high)
    quantizers, alone = _readers(result)
    if not quantizers or least is None or most is None:
        return False
    scales = [_scale(quantizer) if alone else None for quantizer in quantizers]
    steps = []
    if low is not None and not all(scale and _number(least, scale) <= -128 for scale in scales):
        steps.append(("Max", [low]) if least else ("Relu", []))
    if high is not None and not all(scale and _number(most, scale) >= 127 for scale in scales):
        steps.append(("Min", [high]))
    in_kernel = is_int8_product(source.producer()) and any(bound for _, bound in steps)
    if in_kernel or not (steps or alone):
        return False
    for op, bound in steps[:-1]:
        node = ir.Node("", op, [source, *bound], name=clip.name and f"{clip.name}_low")
        model.graph.insert_before(clip, node)
        node.outputs[0].type, node.outputs[0].shape = result.type, result.shape
        source = node.outputs[0]
    if steps:
        op, bound = steps[-1]
        replace(model, result, ir.Node("", op, [source, *bound], name=clip.name))
    else:
        result.replace_all_uses_with(source)
        model.graph.remove(clip, safe=True)
    return True


def _readers(value: ir.Value) -> tuple[list[ir.Node], bool]:
    """The quantizers behind a tensor, across all that they may be moved across, and whether nothing else reads it."""
    quantizers, alone = [], True
    ahead, seen = [value], {value}
    while ahead:
        tensor = ahead.pop()
        alone &= not tensor.is_graph_output()
        for use in tensor.uses():
            if use.node.op_type == "QuantizeLinear" and use.idx == 0:
                quantizers.append(use.node)
                continue
            moves = _moves(use.node, use.idx)
            alone &= moves
            if moves or use.node.op_type in _CLIPS:
                ahead += [output for output in use.node.outputs if output not in seen]
                seen.update(use.node.outputs)
    return quantizers, alone


def _scale(quantizer: ir.Node) -> float | None:
    """The scale of a quantizer to INT8 with zero point 0, or None."""
    zero = constant(quantizer.inputs[2]) if len(quantizer.inputs) > 2 else None
    return scalar(quantizer.inputs[1]) if zero is not None and zero.dtype == np.int8 and not zero.any() else None


def _moves(node: ir.Node, position: int) -> bool:
    """Whether a node only moves what it reads there."""
    indices = node.op_type == "MaxPool" and any(output.uses() for output in node.outputs[1:])
    return node.op_type in _MOVES and (position == 0 or node.op_type == "Concat") and not indices


def _number(bound: float, scale: float) -> float:
    """What a float32 bound is quantized to, before that saturates."""
    return float(np.rint(np.float32(bound) / np.float32(scale)))
