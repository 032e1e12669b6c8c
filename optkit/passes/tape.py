"""Writes the nodes that take one node's place, each named after it and typed like its input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir


class Tape:
    """New nodes before ``node``; ``replace`` then puts the last one where ``node`` was.

    Args:
        model: the model that ``node`` is in.
        node: what is replaced; the new nodes are named ``<its name>.<part>``.
        like: results have its element type, and so do scalars.
    """

    def __init__(self, model: ir.Model, node: ir.Node, like: ir.Value) -> None:
        self._graph, self._node, self._like = model.graph, node, like
        self._base = node.name or node.outputs[0].name or node.op_type
        self._last: ir.Node | None = None

    def add(self, op: str, *inputs: ir.Value, name: str, attributes: Mapping[str, Any] | None = None) -> ir.Value:
        """Append a node and give its result."""
        import onnx_ir as ir

        made = ir.node(op, inputs, attributes=attributes, num_outputs=1, name=f"{self._base}.{name}")
        made.outputs[0].name, made.outputs[0].type = f"{self._base}.{name}", self._like.type
        self._graph.insert_before(self._node, made)
        self._last = made
        return made.outputs[0]

    def last(self, result: ir.Value) -> ir.Node:
        """The node that gives ``result``, taken off the graph again so that it can take the place of another."""
        made = result.producer()
        assert made is not None and made is self._last  # nothing follows it yet
        self._graph.remove(made)
        return made

    def scalar(self, name: str, number: float) -> ir.Value:
        """A constant of the results' element type."""
        assert self._like.dtype is not None  # types were inferred
        return self.constant(name, np.asarray(number, self._like.dtype.numpy()))

    def integers(self, name: str, numbers: Sequence[int]) -> ir.Value:
        """A constant list of INT64."""
        return self.constant(name, np.asarray(numbers, np.int64))

    def constant(self, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
        """An array as a constant."""
        import onnx_ir as ir

        tensor = ir.tensor(array, name=f"{self._base}.{name}")
        value = ir.Value(
            name=tensor.name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self._graph.register_initializer(value)
        return value
