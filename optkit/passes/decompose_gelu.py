"""Expresses GELU in arithmetic, for builders that lack the operator."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from optkit.context import Context
from optkit.passes.graph_edit import GraphEdit, replace
from optkit.passes.tape import Tape

if TYPE_CHECKING:
    import onnx_ir as ir


class DecomposeGelu(GraphEdit):
    """``Gelu(x)`` becomes ``x/2 * (1 + erf(x/sqrt 2))``, or with ``tanh`` as in its approximate form."""

    use: Literal["decompose_gelu"] = "decompose_gelu"
    touches: ClassVar[frozenset[str]] = frozenset({"Gelu"})

    def edit(self, model: ir.Model, context: Context) -> bool:
        """Rewrite every GELU."""
        gelus = [node for node in model.graph if node.op_type == "Gelu" and node.domain == ""]
        for node in gelus:
            x = node.inputs[0]
            assert x is not None  # ONNX: Gelu has exactly one input
            tape = Tape(model, node, like=x)
            approximate = node.attributes.get_string("approximate", "none") == "tanh"
            curve = _tanh(tape, x) if approximate else _erf(tape, x)
            one_more = tape.add("Add", curve, tape.scalar("one", 1.0), name="one_more")
            # In this order TensorRT 8 recognizes it and makes one kernel
            product = tape.add("Mul", x, one_more, name="product")
            result = tape.add("Mul", product, tape.scalar("half", 0.5), name="halved")
            replace(model, node.outputs[0], tape.last(result))
        return bool(gelus)


def _erf(tape: Tape, x: ir.Value) -> ir.Value:
    return tape.add("Erf", tape.add("Div", x, tape.scalar("root", math.sqrt(2)), name="divided"), name="erf")


def _tanh(tape: Tape, x: ir.Value) -> ir.Value:
    cube = tape.add("Mul", x, tape.add("Mul", x, x, name="square"), name="cube")
    bent = tape.add("Add", x, tape.add("Mul", cube, tape.scalar("bend", 0.044715), name="bend_cube"), name="bent")
    inner = tape.add("Mul", bent, tape.scalar("slope", math.sqrt(2 / math.pi)), name="inner")
    return tape.add("Tanh", inner, name="tanh")
