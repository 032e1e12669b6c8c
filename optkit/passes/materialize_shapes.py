"""Makes the shapes of Reshape constant."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, ClassVar, Literal

from optkit.context import Context
from optkit.passes.graph_edit import GraphEdit, constant, sweep

if TYPE_CHECKING:
    import onnx_ir as ir

log = logging.getLogger("optkit.passes")


class MaterializeShapes(GraphEdit):
    """``Reshape(x, <computed>)`` gets a constant shape: 0 copies a dimension of ``x``, -1 is the one that is left.

    The arithmetic on Shape that exporters write for dynamic dimensions falls away where at most one dimension of the
    result is neither known nor the one of ``x`` at the same place.
    """

    use: Literal["materialize_shapes"] = "materialize_shapes"
    touches: ClassVar[frozenset[str]] = frozenset({"Reshape"})

    def edit(self, model: ir.Model, context: Context) -> bool:
        """Replace the shape input where it can be told from the shapes of input and output."""
        import numpy as np
        import onnx_ir as ir

        changed = False
        for node in model.graph:
            if node.op_type != "Reshape" or node.domain != "" or constant(node.inputs[1]) is not None:
                continue
            shape = _constant_shape(node.inputs[0], node.outputs[0])
            if shape is None:
                log.debug("materialize_shapes: %s: more than one dimension is unknown", node.name)
                continue
            tensor = ir.tensor(np.array(shape, np.int64), name=f"{node.outputs[0].name}_shape")
            value = ir.Value(name=tensor.name, shape=ir.Shape([len(shape)]), type=ir.TensorType(tensor.dtype))
            value.const_value = tensor
            model.graph.register_initializer(value)
            node.replace_input_with(1, value)
            node.attributes.pop("allowzero", None)
            changed = True
        if changed:
            sweep(model)
        return changed


def _constant_shape(source: ir.Value | None, result: ir.Value) -> list[int] | None:
    if source is None or source.shape is None or result.shape is None:
        return None
    shape = []
    for axis, dim in enumerate(result.shape):
        if isinstance(dim, int):
            if dim == 0:
                return None  # an empty tensor: 0 would copy a dimension
            shape.append(dim)
        elif axis < len(source.shape) and dim.value is not None and dim == source.shape[axis]:
            shape.append(0)
        else:
            shape.append(-1)
    return shape if shape.count(-1) <= 1 else None
