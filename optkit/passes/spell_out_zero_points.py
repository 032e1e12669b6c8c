"""Writes the zero point on every DequantizeLinear of INT8."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from optkit.context import Context
from optkit.passes.graph_edit import GraphEdit

if TYPE_CHECKING:
    import onnx_ir as ir


class SpellOutZeroPoints(GraphEdit):
    """``DequantizeLinear`` of INT8 gets the zero point 0 that ONNX assumes; TensorRT 8 does not take it without."""

    use: Literal["spell_out_zero_points"] = "spell_out_zero_points"
    touches: ClassVar[frozenset[str]] = frozenset({"DequantizeLinear"})

    def edit(self, model: ir.Model, context: Context) -> bool:
        """Add the third input where it is missing."""
        import onnx_ir as ir

        changed = False
        for node in model.graph:
            given, scale = node.inputs[:2] if node.op_type == "DequantizeLinear" else (None, None)
            if given is None or scale is None or given.dtype != ir.DataType.INT8 or scale.shape is None:
                continue
            sizes = [dim for dim in scale.shape if isinstance(dim, int)]
            if len(sizes) < len(scale.shape) or (len(node.inputs) > 2 and node.inputs[2] is not None):
                continue
            name = f"{node.outputs[0].name}_zero_point"
            tensor = ir.tensor(np.zeros(sizes, np.int8), name=name)
            zero = ir.Value(name=name, shape=ir.Shape(sizes), type=ir.TensorType(tensor.dtype), const_value=tensor)
            model.graph.register_initializer(zero)
            node.resize_inputs(3)
            node.replace_input_with(2, zero)
            changed = True
        return changed
