"""Writes INT32 biases as floats."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from optkit.context import Context
from optkit.passes.graph_edit import GraphEdit, constant, sweep
from optkit.passes.tape import Tape

if TYPE_CHECKING:
    import onnx_ir as ir


class FoldBiases(GraphEdit):
    """``DequantizeLinear`` of a constant INT32 becomes the constant that it gives.

    ONNX Runtime's quantizer stores biases so; TensorRT takes them in float only.
    """

    use: Literal["fold_biases"] = "fold_biases"
    touches: ClassVar[frozenset[str]] = frozenset({"DequantizeLinear"})

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
    if node.op_type != "DequantizeLinear" or node.domain or node.outputs[0].is_graph_output():
        return None
    numbers, scale = (constant(value) for value in node.inputs[:2])
    if numbers is None or scale is None or numbers.dtype != np.int32 or scale.ndim > 1:
        return None
    if scale.ndim and numbers.ndim > 1:
        channels = node.attributes.get_int("axis", 1) % numbers.ndim
        scale = np.expand_dims(scale, [axis for axis in range(numbers.ndim) if axis != channels])
    return np.asarray(numbers.astype(scale.dtype) * scale)
