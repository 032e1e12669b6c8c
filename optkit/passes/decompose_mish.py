"""Expresses Mish in older operators, for builders that lack it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from optkit.context import Context
from optkit.passes.graph_edit import GraphEdit, replace
from optkit.passes.tape import Tape

if TYPE_CHECKING:
    import onnx_ir as ir


class DecomposeMish(GraphEdit):
    """``Mish(x)`` becomes ``x * tanh(softplus(x))``."""

    use: Literal["decompose_mish"] = "decompose_mish"
    touches: ClassVar[frozenset[str]] = frozenset({"Mish"})

    def edit(self, model: ir.Model, context: Context) -> bool:
        """Rewrite every Mish."""
        found = [node for node in model.graph if node.op_type == "Mish" and node.domain == ""]
        for node in found:
            x = node.inputs[0]
            assert x is not None  # ONNX: Mish has exactly one input
            tape = Tape(model, node, like=x)
            gate = tape.add("Tanh", tape.add("Softplus", x, name="softplus"), name="gate")
            replace(model, node.outputs[0], tape.last(tape.add("Mul", x, gate, name="product")))
        return bool(found)
