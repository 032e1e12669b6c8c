"""Drops Identity nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from optkit.context import Context
from optkit.passes.graph_edit import GraphEdit

if TYPE_CHECKING:
    import onnx_ir as ir


class DropIdentity(GraphEdit):
    """``Identity(x)`` becomes ``x``; a graph output keeps its name, and its Identity where ``x`` must keep its own."""

    use: Literal["drop_identity"] = "drop_identity"
    touches: ClassVar[frozenset[str]] = frozenset({"Identity"})

    def edit(self, model: ir.Model, context: Context) -> bool:
        """Drop what can be dropped."""
        changed = False
        for node in model.graph:
            if node.op_type != "Identity" or node.domain != "":
                continue
            source, result = node.inputs[0], node.outputs[0]
            assert source is not None  # ONNX: Identity has exactly one input
            if result.is_graph_output():
                # Inputs, initializers and other outputs cannot be renamed
                if source.producer() is None or source.is_graph_output() or source.graph is not model.graph:
                    continue
                source.name, result.name = result.name, None
                source.shape, source.type = source.shape or result.shape, source.type or result.type
            result.replace_all_uses_with(source, replace_graph_outputs=True)
            model.graph.remove(node, safe=True)
            changed = True
        return changed
