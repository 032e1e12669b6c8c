"""Adds constants to a graph, reads them, and drops those that nothing reads any more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir

Array = np.ndarray[Any, Any]


def operand(node: ir.Node, index: int) -> Array:
    """The data of a constant input."""
    import onnx_ir as ir

    value = node.inputs[index]
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    assert tensor is not None  # placement only takes constants
    return tensor.numpy()


def add_initializer(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    """A new constant of this name, or of one like it where that is taken."""
    import onnx_ir as ir

    while name in graph.initializers:
        name += "_"
    tensor = ir.tensor(np.asarray(array, order="C"), name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def drop_unused_initializers(graph: ir.Graph) -> None:
    """Remove what no node reads any more: ONNX Runtime takes no data for it."""
    outputs = set(graph.outputs)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and value not in outputs:
            del graph.initializers[name]
