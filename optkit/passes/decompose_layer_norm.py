"""Expresses layer normalization in arithmetic, for builders that lack the operator."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from optkit.context import Context
from optkit.passes.graph_edit import GraphEdit, opset, rank, replace
from optkit.passes.tape import Tape

if TYPE_CHECKING:
    import onnx_ir as ir


class DecomposeLayerNorm(GraphEdit):
    """``LayerNormalization(x)`` becomes ``(x - mean) / sqrt(mean((x - mean)^2) + epsilon) * scale + bias``.

    One whose mean or deviation is used, too, stays as it is.
    """

    use: Literal["decompose_layer_norm"] = "decompose_layer_norm"
    touches: ClassVar[frozenset[str]] = frozenset({"LayerNormalization"})

    def edit(self, model: ir.Model, context: Context) -> bool:
        """Rewrite every normalization of a tensor whose rank is known."""
        changed = False
        for node in list(model.graph):
            if (
                node.op_type == "LayerNormalization"
                and rank(node.inputs[0]) is not None
                and not _gives_statistics(node)
            ):
                _decompose(model, node)
                changed = True
        return changed


def _gives_statistics(node: ir.Node) -> bool:
    return any(output.uses() or output.is_graph_output() for output in node.outputs[1:])


def _decompose(model: ir.Model, node: ir.Node) -> None:
    x, scale, bias = (*node.inputs, None)[:3]
    assert x is not None and scale is not None  # ONNX: both are required
    dims = rank(x)
    assert dims is not None  # the caller asked
    axis = node.attributes.get_int("axis", -1)
    axes = tuple(range(axis % dims, dims))
    tape = Tape(model, node, like=x)
    epsilon = tape.scalar("epsilon", node.attributes.get_float("epsilon", 1e-5))
    centred = tape.add("Sub", x, _mean(tape, "mean", x, axes, opset(model)), name="centred")
    variance = _mean(tape, "variance", tape.add("Mul", centred, centred, name="squared"), axes, opset(model))
    deviation = tape.add("Sqrt", tape.add("Add", variance, epsilon, name="stable"), name="deviation")
    result = tape.add("Div", centred, deviation, name="normalized")
    result = tape.add("Mul", result, scale, name="scaled")
    if bias is not None:
        result = tape.add("Add", result, bias, name="shifted")
    replace(model, node.outputs[0], tape.last(result))


def _mean(tape: Tape, name: str, x: ir.Value, axes: tuple[int, ...], version: int) -> ir.Value:
    """``ReduceMean``, whose axes became an input with opset 18."""
    if version < 18:
        return tape.add("ReduceMean", x, name=name, attributes={"axes": axes, "keepdims": 1})
    return tape.add("ReduceMean", x, tape.integers(f"{name}_axes", axes), name=name, attributes={"keepdims": 1})
