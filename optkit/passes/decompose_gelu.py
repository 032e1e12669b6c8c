"""Expresses GELU in arithmetic, for builders that lack the operator."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from optkit.passes.decompose_activation import DecomposeActivation
from optkit.passes.tape import Tape

if TYPE_CHECKING:
    import onnx_ir as ir


class DecomposeGelu(DecomposeActivation):
    """``Gelu(x)`` becomes ``x/2 * (1 + erf(x/sqrt 2))``, or with ``tanh`` as in its approximate form."""

    use: Literal["decompose_gelu"] = "decompose_gelu"
    touches: ClassVar[frozenset[str]] = frozenset({"Gelu"})

    def express(self, tape: Tape, node: ir.Node, x: ir.Value) -> ir.Value:
        """The product, exact or approximate as the node is."""
        approximate = node.attributes.get_string("approximate", "none") == "tanh"
        curve = _tanh(tape, x) if approximate else _erf(tape, x)
        one_more = tape.add("Add", curve, tape.scalar("one", 1.0), name="one_more")
        # In this order TensorRT 8 recognizes it and makes one kernel
        product = tape.add("Mul", x, one_more, name="product")
        return tape.add("Mul", product, tape.scalar("half", 0.5), name="halved")


def _erf(tape: Tape, x: ir.Value) -> ir.Value:
    return tape.add("Erf", tape.add("Div", x, tape.scalar("root", math.sqrt(2)), name="divided"), name="erf")


def _tanh(tape: Tape, x: ir.Value) -> ir.Value:
    cube = tape.add("Mul", x, tape.add("Mul", x, x, name="square"), name="cube")
    bent = tape.add("Add", x, tape.add("Mul", cube, tape.scalar("bend", 0.044715), name="bend_cube"), name="bent")
    inner = tape.add("Mul", bent, tape.scalar("slope", math.sqrt(2 / math.pi)), name="inner")
    return tape.add("Tanh", inner, name="tanh")
