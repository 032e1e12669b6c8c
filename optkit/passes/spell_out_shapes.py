"""Writes out which part of a shape is meant."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from optkit.context import Context
from optkit.passes.graph_edit import GraphEdit, constant, rank, replace
from optkit.passes.tape import Tape

if TYPE_CHECKING:
    import onnx_ir as ir


class SpellOutShapes(GraphEdit):
    """``Shape`` with ``start`` and ``end`` becomes ``Shape`` and ``Slice``; a ``Slice`` of a shape gets plain bounds.

    TensorRT 8's importer does not know these attributes of opset 15 and takes the whole shape, and it has no INT64 for
    bounds that mean "to the end".
    """

    use: Literal["spell_out_shapes"] = "spell_out_shapes"
    touches: ClassVar[frozenset[str]] = frozenset({"Shape"})

    def edit(self, model: ir.Model, context: Context) -> bool:
        """Rewrite what belongs to tensors of known rank."""
        parts = [node for node in model.graph if node.op_type == "Shape" and _is_part(node)]
        for node in parts:
            (data,) = node.inputs
            assert data is not None  # ONNX: Shape has exactly one input
            _cut(model, node, data, node.attributes.get_int("start", 0), node.attributes.get_int("end", rank(data)))
        slices = [(n, bounds) for n in model.graph if n.op_type == "Slice" and (bounds := _bounds(n)) is not None]
        for node, bounds in slices:
            shape = node.inputs[0]
            assert shape is not None
            _cut(model, node, shape.producer().inputs[0], *bounds, shape)  # type: ignore[union-attr]  # it is Shape's
        return bool(parts or slices)


def _is_part(node: ir.Node) -> bool:
    return rank(node.inputs[0]) is not None and bool({"start", "end"} & set(node.attributes))


def _bounds(node: ir.Node) -> tuple[int, int] | None:
    """Where a Slice of a whole Shape starts and ends, if constants say so and are no plain positions in it."""
    producer = node.inputs[0].producer() if node.inputs[0] is not None else None
    if producer is None or producer.op_type != "Shape" or _is_part(producer) or rank(producer.inputs[0]) is None:
        return None
    start, end, axes, steps = (constant(value) for value in (*node.inputs[1:], None, None)[:4])
    if start is None or end is None or any(extra is not None and extra.size != 1 for extra in (axes, steps)):
        return None
    if steps is not None and steps.item() != 1:
        return None
    size = rank(producer.inputs[0]) or 0
    return None if 0 <= start.item() <= size and 0 <= end.item() <= size else (start.item(), end.item())


def _cut(
    model: ir.Model, node: ir.Node, data: ir.Value | None, start: int, end: int | None, shape: ir.Value | None = None
) -> None:
    size = rank(data) or 0
    first, last, _ = slice(start, end).indices(size)
    assert data is not None
    tape = Tape(model, node, like=node.outputs[0])
    whole = tape.add("Shape", data, name="whole") if shape is None else shape
    bounds = [tape.integers(name, [number]) for name, number in (("start", first), ("end", max(first, last)))]
    part = tape.add("Slice", whole, *bounds, tape.integers("axes", [0]), name="part")
    replace(model, node.outputs[0], tape.last(part))
