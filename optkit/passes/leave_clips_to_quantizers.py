"""Drops what a Clip does where the quantizer behind it does the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from optkit.context import Context
from optkit.passes.graph_edit import GraphEdit, constant, replace, scalar, sweep
from optkit.quantize.placement.graph import COMMUTES

if TYPE_CHECKING:
    import onnx_ir as ir

_MOVES = COMMUTES - {"Cast"}  # one to integers would wrap what saturates


class LeaveClipsToQuantizers(GraphEdit):
    """A float32 ``Clip`` goes where all that read it are symmetric quantizers to INT8 that saturate as it does.

    One from zero becomes ``Relu`` where they repeat its upper bound alone. TensorRT 8.5.3 moves a quantizer to before a
    Clip that no kernel takes in, such as that of a ReLU6 behind a convolution in float, and then clips the INT8 numbers
    at the bounds of the floats (``benchmarks/gpu/results/efficientnet_lite0-clips-h200.txt``); Relu gives the same on
    either side of the quantizer.
    """

    use: Literal["leave_clips_to_quantizers"] = "leave_clips_to_quantizers"
    touches: ClassVar[frozenset[str]] = frozenset({"Clip"})

    def edit(self, model: ir.Model, context: Context) -> bool:
        """Rewrite every Clip whose upper bound makes no difference; the numbers stay the same to the bit."""
        import onnx_ir as ir

        changed = False
        clips = [node for node in model.graph if node.op_type == "Clip" and node.domain == ""]
        for node in reversed(clips):  # so that one before another sees what became of that
            source, result = node.inputs[0], node.outputs[0]
            scales = _scales(result)
            low, high = _bounds(node)
            if source is None or source.dtype != ir.DataType.FLOAT or not scales or high is None or low is None:
                continue
            if any(_number(high, scale) < 127 for scale in scales):
                continue
            if all(_number(low, scale) <= -128 for scale in scales):
                result.replace_all_uses_with(source)
                model.graph.remove(node, safe=True)
            elif low == 0:
                replace(model, result, ir.Node("", "Relu", [source], name=node.name))
            else:
                continue
            changed = True
        if changed:
            sweep(model)
        return changed


def _scales(value: ir.Value) -> list[float]:
    """The scales of the INT8 quantizers that read a tensor, seen behind what moves it; none if anything else does."""
    found: list[float] = []
    ahead, seen = [value], {value}
    while ahead:
        tensor = ahead.pop()
        if tensor.is_graph_output():
            return []
        for use in tensor.uses():
            if use.node.op_type == "QuantizeLinear" and use.idx == 0:
                scale = _scale(use.node)
                if not scale:
                    return []
                found.append(scale)
            elif _moves(use.node, use.idx):
                ahead += [output for output in use.node.outputs if output not in seen]
                seen.update(use.node.outputs)
            else:
                return []
    return found


def _scale(quantizer: ir.Node) -> float | None:
    """The scale of a quantizer to INT8 with zero point 0, or None."""
    zero = constant(quantizer.inputs[2]) if len(quantizer.inputs) > 2 else None
    return scalar(quantizer.inputs[1]) if zero is not None and zero.dtype == np.int8 and not zero.any() else None


def _moves(node: ir.Node, position: int) -> bool:
    """Whether a node only moves what it reads there."""
    indices = node.op_type == "MaxPool" and any(output.uses() for output in node.outputs[1:])
    return node.op_type in _MOVES and (position == 0 or node.op_type == "Concat") and not indices


def _bounds(clip: ir.Node) -> tuple[float | None, float | None]:
    """What it clips at; infinite where it does not, None where that is not known."""
    if clip.attributes:  # before opset 11
        return None, None
    low, high = (clip.inputs[i] if len(clip.inputs) > i else None for i in (1, 2))
    return (-np.inf if low is None else scalar(low), np.inf if high is None else scalar(high))


def _number(bound: float, scale: float) -> float:
    """What a float32 bound is quantized to, before that saturates."""
    return float(np.rint(np.float32(bound) / np.float32(scale)))
