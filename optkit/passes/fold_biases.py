"""Writes INT32 biases as floats."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from optkit.context import Context
from optkit.passes.graph_edit import GraphEdit, constant, sweep
from optkit.passes.tape import Tape
from optkit.quantize.linter import is_int32
from optkit.quantize.placement.graph import attribute
from optkit.quantize.scales import along

if TYPE_CHECKING:
    import onnx_ir as ir


class FoldBiases(GraphEdit):
    """``DequantizeLinear`` of a constant INT32 becomes the constant that it gives.

    ONNX Runtime's quantizer stores biases so; TensorRT takes them in float only.
    """

    use: Literal["fold_biases"] = "fold_biases"

    def applies(self, model: ir.Model) -> bool:
        """Whether there is one."""
        return any(map(is_int32, model.graph))

    def edit(self, model: ir.Model, context: Context) -> bool:
        """Fold every one whose numbers and scale are constants."""
        changed = False
        for node in list(model.graph):
            folded = _dequantized(node)
            if folded is not None:
                result = node.outputs[0]
                result.replace_all_uses_with(Tape(model, node, like=result).constant("folded", folded))
                changed = True
        if changed:
            sweep(model)
        return changed


def _dequantized(node: ir.Node) -> np.ndarray[Any, Any] | None:
    """What a DequantizeLinear of a constant INT32 gives, whose zero point ONNX wants to be 0."""
    if not is_int32(node) or node.domain or node.outputs[0].is_graph_output():
        return None
    numbers, scale = (constant(value) for value in node.inputs[:2])
    if numbers is None or scale is None or scale.ndim > 1:
        return None
    if scale.ndim and numbers.ndim:
        scale = along(scale, numbers.ndim, attribute(node, "axis", 1) % numbers.ndim)
    return np.asarray(numbers.astype(scale.dtype) * scale)
