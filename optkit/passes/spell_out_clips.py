"""Writes a Clip before a quantizer as ops across which the quantizer may be moved."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from optkit.context import Context
from optkit.passes.graph_edit import GraphEdit, constant, replace, scalar, sweep
from optkit.passes.tape import Tape
from optkit.quantize.placement.graph import MOVED_ACROSS, is_int8_product, only_consumer

if TYPE_CHECKING:
    import onnx_ir as ir

_CLIPS = frozenset({"Clip", "Max", "Min", "Relu"})


class SpellOutClips(GraphEdit):
    """A float32 ``Clip`` that a quantizer reads becomes Relu or Max, and Min; at most the sign of a zero changes.

    TensorRT 8.5.3 moves a quantizer to before a Clip that no kernel takes in, such as that of a ReLU6 behind a
    convolution in float, and then clips the INT8 numbers at the bounds of the floats
    (``benchmarks/gpu/results/efficientnet_lite0-clips-h200.txt``). Across Relu it may move one, since zero stays zero,
    and across Max and Min, whose constants it quantizes as well (``clips-h200.txt`` beside that). A bound at which all
    that read it saturate anyway needs no op. What alone reads a convolution or product in INT8 is computed in its
    kernel, before it is quantized: there Clip stays where it would take a Max or Min.
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
    quantizers, alone = quantizers_behind(result)
    if not quantizers or least is None or most is None or np.isnan([least, most]).any():
        return False
    scales = [_scale(quantizer) if alone else None for quantizer in quantizers]
    steps = []
    if low is not None and not all(scale and _number(least, scale) <= -128 for scale in scales):
        steps.append(("Max", [low]) if least else ("Relu", []))
    if high is not None and not all(scale and _number(most, scale) >= 127 for scale in scales):
        steps.append(("Min", [high]))
    in_kernel = is_int8_product(source.producer()) and only_consumer(source) is clip
    if (in_kernel and any(bound for _, bound in steps)) or not (steps or alone):
        return False
    tape = Tape(model, clip, like=result)
    for op, bound in steps[:-1]:
        source = tape.add(op, source, *bound, name="low")
        source.shape = result.shape
    if steps:
        op, bound = steps[-1]
        replace(model, result, ir.Node("", op, [source, *bound], name=clip.name))
    else:
        result.replace_all_uses_with(source)
        model.graph.remove(clip, safe=True)
    return True


def quantizers_behind(value: ir.Value) -> tuple[list[ir.Node], bool]:
    """The quantizers behind a tensor, across all that they may be moved across, and whether nothing else reads it."""
    quantizers, alone = [], True
    ahead, seen = [value], {value}
    while ahead:
        tensor = ahead.pop()
        alone &= not tensor.is_graph_output()
        for use in tensor.uses():
            op = "" if use.node.domain else use.node.op_type
            if op == "QuantizeLinear" and use.idx == 0:
                quantizers.append(use.node)
                continue
            moves = op in MOVED_ACROSS and (use.idx == 0 or op == "Concat")
            alone &= moves and not (op == "MaxPool" and any(output.uses() for output in use.node.outputs[1:]))
            if moves or op in _CLIPS:
                ahead += [output for output in use.node.outputs if output not in seen]
                seen.update(use.node.outputs)
    return quantizers, alone


def _scale(quantizer: ir.Node) -> float | None:
    """The scale of a quantizer to INT8 with zero point 0, or None."""
    zero = constant(quantizer.inputs[2]) if len(quantizer.inputs) > 2 else None
    scale = scalar(quantizer.inputs[1]) if zero is not None and zero.dtype == np.int8 and not zero.any() else None
    return scale if scale is not None and scale > 0 else None


def _number(bound: float, scale: float) -> float:
    """What a float32 bound is quantized to, before that saturates."""
    with np.errstate(over="ignore"):  # a bound may be the largest float32
        return float(np.rint(np.float32(bound) / np.float32(scale)))
