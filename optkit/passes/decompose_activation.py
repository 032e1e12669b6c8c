"""What passes share that express an activation in arithmetic, for builders that lack the operator."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optkit.context import Context
from optkit.passes.graph_edit import GraphEdit, replace
from optkit.passes.tape import Tape

if TYPE_CHECKING:
    import onnx_ir as ir


class DecomposeActivation(GraphEdit):
    """Every node of the op that it ``touches``, whose one input is a float tensor, becomes other nodes."""

    def edit(self, model: ir.Model, context: Context) -> bool:
        """Rewrite every such node."""
        found = [node for node in model.graph if node.op_type in self.touches and node.domain == ""]
        for node in found:
            x = node.inputs[0]
            assert x is not None  # ONNX: an activation has exactly one input
            tape = Tape(model, node, like=x)
            replace(model, node.outputs[0], tape.last(self.express(tape, node, x)))
        return bool(found)

    def express(self, tape: Tape, node: ir.Node, x: ir.Value) -> ir.Value:
        """Write what the node computes from ``x``; the result comes last."""
        raise NotImplementedError
