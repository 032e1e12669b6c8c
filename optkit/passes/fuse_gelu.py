"""Fuses the arithmetic of GELU."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from optkit.context import Context
from optkit.passes.graph_edit import GraphEdit, opset, replace, scalar, sweep

if TYPE_CHECKING:
    import onnx_ir as ir

GELU_OPSET = 20
SQRT_HALF = math.sqrt(0.5)
SQRT_TWO_OVER_PI = math.sqrt(2 / math.pi)
CUBIC = 0.044715


class FuseGelu(GraphEdit):
    """``x / 2 * (1 + Erf(x / sqrt 2))`` becomes ``Gelu(x)``, and so does its tanh approximation.

    ``Gelu<approximate = "tanh">(x) = x / 2 * (1 + Tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))``. The factors may stand in
    any order. The op exists from opset 20 on: a graph or a target below that keeps the arithmetic.
    """

    use: Literal["fuse_gelu"] = "fuse_gelu"
    touches: ClassVar[frozenset[str]] = frozenset({"Erf", "Tanh"})

    def edit(self, model: ir.Model, context: Context) -> bool:
        """Fuse every product that is a GELU."""
        import onnx_ir as ir

        if min(opset(model), context.target.dialect.opsets[1]) < GELU_OPSET:
            return False
        changed = False
        # From the end, so that the outermost product is met before its parts
        for node in reversed(model.graph):
            found = _gelu(node.outputs[0]) if node.op_type in ("Mul", "Div") else None
            if found is not None:
                x, approximate = found
                fused = ir.node("Gelu", [x], attributes={"approximate": approximate}, name=node.name)
                replace(model, node.outputs[0], fused)
                changed = True
        if changed:
            sweep(model)
        return changed


class _Product(NamedTuple):
    """A constant times values, each as often as it occurs."""

    scale: float
    values: tuple[ir.Value, ...]

    def is_power(self, x: ir.Value, exponent: int, scale: float) -> bool:
        return self.values == (x,) * exponent and math.isclose(self.scale, scale, rel_tol=1e-3)


def _product(value: ir.Value) -> _Product:
    """``value`` as a product, through Mul, Div by a constant, and Pow with a small whole exponent."""
    node = value.producer()
    if node is None or node.domain != "" or node.op_type not in ("Mul", "Div", "Pow"):
        return _Product(1.0, (value,))
    left, right = node.inputs
    assert left is not None and right is not None  # ONNX: each of the three has two inputs
    by = scalar(right)
    if node.op_type == "Pow":
        return _Product(1.0, (left,) * int(by)) if by in (2.0, 3.0) else _Product(1.0, (value,))
    if node.op_type == "Div":
        if not by:
            return _Product(1.0, (value,))
        inner = _product(left)
        return _Product(inner.scale / by, inner.values)
    scale = 1.0
    values: list[ir.Value] = []
    for factor in (left, right):
        number = scalar(factor)
        inner = _Product(number, ()) if number is not None else _product(factor)
        scale *= inner.scale
        values += inner.values
    return _Product(scale, tuple(values))


def _plus_one(value: ir.Value) -> ir.Value | None:
    """``v`` if ``value`` is ``v + 1``."""
    for other, one in _summands(value):
        if scalar(one) == 1.0:
            return other
    return None


def _summands(value: ir.Value) -> list[tuple[ir.Value, ir.Value]]:
    """The two inputs of an Add, in both orders."""
    node = value.producer()
    if node is None or node.op_type != "Add" or node.domain != "":
        return []
    left, right = node.inputs
    assert left is not None and right is not None  # ONNX: Add has two inputs
    return [(left, right), (right, left)]


def _gelu(value: ir.Value) -> tuple[ir.Value, str] | None:
    """``x`` and the approximation, if ``value`` is ``Gelu(x)`` written out."""
    product = _product(value)
    if len(product.values) != 2 or not math.isclose(product.scale, 0.5, rel_tol=1e-3):
        return None
    for x, gate in (product.values, product.values[::-1]):
        inner = _plus_one(gate)
        curve = inner.producer() if inner is not None else None
        if curve is None or curve.domain != "" or curve.inputs[0] is None:
            continue
        argument = _product(curve.inputs[0])
        if curve.op_type == "Erf" and argument.is_power(x, 1, SQRT_HALF):
            return x, "none"
        if curve.op_type == "Tanh" and _is_tanh_argument(argument, x):
            return x, "tanh"
    return None


def _is_tanh_argument(argument: _Product, x: ir.Value) -> bool:
    if not math.isclose(argument.scale, SQRT_TWO_OVER_PI, rel_tol=1e-3):
        return False
    if len(argument.values) == 1:  # x + c x^3
        return any(a is x and _product(b).is_power(x, 3, CUBIC) for a, b in _summands(argument.values[0]))
    if len(argument.values) == 2 and x in argument.values:  # x (1 + c x^2)
        gate = argument.values[1] if argument.values[0] is x else argument.values[0]
        square = _plus_one(gate)
        return square is not None and _product(square).is_power(x, 2, CUBIC)
    return False
