"""Expresses Mish in older operators, for builders that lack it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from optkit.passes.decompose_activation import DecomposeActivation
from optkit.passes.tape import Tape

if TYPE_CHECKING:
    import onnx_ir as ir


class DecomposeMish(DecomposeActivation):
    """``Mish(x)`` becomes ``x * tanh(softplus(x))``."""

    use: Literal["decompose_mish"] = "decompose_mish"
    touches: ClassVar[frozenset[str]] = frozenset({"Mish"})

    def express(self, tape: Tape, node: ir.Node, x: ir.Value) -> ir.Value:
        """The product."""
        gate = tape.add("Tanh", tape.add("Softplus", x, name="softplus"), name="gate")
        return tape.add("Mul", x, gate, name="product")
