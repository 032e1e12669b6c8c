"""Drops what a Clip does where the quantizer behind it does the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from optkit.context import Context
from optkit.passes.graph_edit import GraphEdit, constant, replace, scalar, sweep
from optkit.quantize.placement.graph import COMMUTES

if TYPE_CHECKING:
    import onnx_ir as ir


class LeaveClipsToQuantizers(GraphEdit):
    """``Clip`` goes where all that read it are quantizers that saturate at its bounds; one from zero becomes ``Relu``.

    TensorRT 8.5.3 moves a quantizer to before a Clip that no kernel takes in, such as that of a ReLU6 behind a
    convolution in float, and then clips the INT8 numbers at the bounds of the floats (``benchmarks/gpu/results/
    efficientnet_lite0-clips-h200.txt``). A Relu is right on either side of the quantizer, and kernels take it in.
    """

    use: Literal["leave_clips_to_quantizers"] = "leave_clips_to_quantizers"
    touches: ClassVar[frozenset[str]] = frozenset({"Clip"})

    def edit(self, model: ir.Model, context: Context) -> bool:
        """Rewrite every Clip whose upper bound makes no difference; the numbers stay the same to the bit."""
        import onnx_ir as ir

        changed = False
        for node in [node for node in model.graph if node.op_type == "Clip" and node.domain == ""]:
            source, result = node.inputs[0], node.outputs[0]
            quantizers = _quantizers(result)
            low, high = _bounds(node)
            if source is None or not quantizers or not all(_saturates(q, high, above=True) for q in quantizers):
                continue
            if all(_saturates(q, low, above=False) for q in quantizers):
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


def _quantizers(value: ir.Value) -> list[ir.Node]:
    """The QuantizeLinear nodes that read a tensor, seen behind what moves it; none if anything else reads it."""
    found: list[ir.Node] = []
    for use in value.uses():
        if use.node.op_type == "QuantizeLinear" and use.idx == 0:
            found.append(use.node)
            continue
        behind = [_quantizers(moved) for moved in use.node.outputs] if use.node.op_type in COMMUTES else [[]]
        if not all(behind):
            return []
        found += [node for nodes in behind for node in nodes]
    return [] if value.is_graph_output() else found


def _bounds(clip: ir.Node) -> tuple[float | None, float | None]:
    """What it clips at; infinite where it does not, None where that is not known."""
    low, high = (clip.inputs[i] if len(clip.inputs) > i else None for i in (1, 2))
    return (-np.inf if low is None else scalar(low), np.inf if high is None else scalar(high))


def _saturates(quantizer: ir.Node, bound: float | None, *, above: bool) -> bool:
    """Whether everything past a bound is quantized to the same number as the bound itself."""
    scale = scalar(quantizer.inputs[1])
    zero = quantizer.inputs[2] if len(quantizer.inputs) > 2 else None
    offset = np.zeros((), np.uint8) if zero is None else constant(zero)  # ONNX: UINT8 where there is no zero point
    if bound is None or not scale or offset is None or offset.size != 1:
        return False
    limits = np.iinfo(offset.dtype)
    number = np.rint(np.float32(bound) / np.float32(scale)) + float(offset.reshape(()))
    return bool(number >= limits.max if above else number <= limits.min)
