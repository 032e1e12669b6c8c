"""Fuses the arithmetic of layer normalization."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from optkit.context import Context
from optkit.passes.graph_edit import GraphEdit, constant, opset, rank, replace, scalar, sweep

if TYPE_CHECKING:
    import onnx_ir as ir

LAYER_NORM_OPSET = 17


class FuseLayerNorm(GraphEdit):
    """``(x - mean) / sqrt(var + eps) * scale + bias`` over the last dimensions becomes ``LayerNormalization``.

    ``var`` is the mean of the squared difference. The op exists from opset 17 on: a graph or a target below that keeps
    the arithmetic.
    """

    use: Literal["fuse_layer_norm"] = "fuse_layer_norm"
    touches: ClassVar[frozenset[str]] = frozenset({"Sqrt", "Pow"})

    def edit(self, model: ir.Model, context: Context) -> bool:
        """Fuse every normalization, with the scale and the bias that follow it."""
        if min(opset(model), context.target.dialect.opsets[1]) < LAYER_NORM_OPSET:
            return False
        changed = False
        for node in list(model.graph):
            core = _match(node.outputs[0]) if node.graph is not None and node.op_type in ("Div", "Mul") else None
            if core is not None and _fuse(model, node.outputs[0], core):
                changed = True
        if changed:
            sweep(model)
        return changed


class _Core(NamedTuple):
    x: ir.Value
    axis: int
    epsilon: float


def _fuse(model: ir.Model, normalized: ir.Value, core: _Core) -> bool:
    import numpy as np
    import onnx_ir as ir

    assert core.x.shape is not None and core.x.dtype is not None  # _match saw both
    dims = tuple(core.x.shape)[core.axis :]
    sizes = tuple(dim for dim in dims if isinstance(dim, int))
    last, scale = _follow(normalized, "Mul", dims)
    if scale is None:
        if len(sizes) != len(dims):
            return False
        ones = ir.tensor(np.ones(sizes, core.x.dtype.numpy()), name=f"{normalized.name}_ones")
        scale = ir.Value(name=ones.name, shape=ir.Shape(sizes), type=ir.TensorType(ones.dtype), const_value=ones)
        model.graph.register_initializer(scale)
    last, bias = _follow(last, "Add", dims)
    inputs = [core.x, scale] if bias is None else [core.x, scale, bias]
    producer = normalized.producer()
    fused = ir.node(
        "LayerNormalization",
        inputs,
        attributes={"axis": core.axis, "epsilon": core.epsilon},
        name=producer.name if producer else None,
    )
    replace(model, last, fused)
    return True


def _follow(value: ir.Value, op_type: str, dims: tuple[object, ...]) -> tuple[ir.Value, ir.Value | None]:
    """The result and the constant of shape ``dims`` of the ``op_type`` that alone uses ``value``, if there is one."""
    if value.is_graph_output() or len(value.uses()) != 1:
        return value, None
    node = value.consumers()[0]
    if node.op_type != op_type or node.domain != "":
        return value, None
    other = node.inputs[1] if node.inputs[0] is value else node.inputs[0]
    array = constant(other)
    if array is None or array.shape != dims:
        return value, None
    return node.outputs[0], other


def _match(value: ir.Value) -> _Core | None:
    """What is normalized, if ``value`` is ``d / sqrt(mean(d^2) + eps)`` with ``d = x - mean(x)``."""
    parts = _numerator_and_deviation(value)
    if parts is None:
        return None
    difference, deviation = parts
    found = _mean_and_epsilon(deviation)
    centered = _centered(difference)
    if found is None or centered is None:
        return None
    (squared, axes), epsilon = found
    x, mean_axes = centered
    base = _square_base(squared)
    if base is None or (base is not difference and _centered(base) != centered) or axes != mean_axes:
        return None
    depth = rank(x)
    if depth is None or x.dtype is None or not x.dtype.is_floating_point():
        return None
    wanted = sorted(axis % depth for axis in axes)
    if wanted != list(range(depth - len(wanted), depth)) or not wanted:
        return None
    return _Core(x, -len(wanted), epsilon)


def _mean_and_epsilon(value: ir.Value) -> tuple[tuple[ir.Value, tuple[int, ...]], float] | None:
    """The mean and the constant, if ``value`` is their sum."""
    summands = _inputs(value, "Add")
    for one, other in (summands, summands[::-1]) if summands else ():
        mean, epsilon = _mean(one), scalar(other)
        if mean is not None and epsilon is not None:
            return mean, epsilon
    return None


def _numerator_and_deviation(value: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """``d`` and ``v`` of ``d / Sqrt(v)``, ``d * Reciprocal(Sqrt(v))`` or ``d * Pow(v, -0.5)``."""
    division = _inputs(value, "Div")
    if division:
        root = _inputs(division[1], "Sqrt")
        return (division[0], root[0]) if root else None
    product = _inputs(value, "Mul")
    for difference, inverse in (product, product[::-1]) if product else ():
        reciprocal = _inputs(inverse, "Reciprocal")
        root = _inputs(reciprocal[0], "Sqrt") if reciprocal else ()
        power = _inputs(inverse, "Pow")
        if root:
            return difference, root[0]
        if power and scalar(power[1]) == -0.5:
            return difference, power[0]
    return None


def _centered(value: ir.Value) -> tuple[ir.Value, tuple[int, ...]] | None:
    """``x`` and the axes, if ``value`` is ``x - mean(x)``."""
    found = _inputs(value, "Sub")
    mean = _mean(found[1]) if found else None
    return mean if mean is not None and found and mean[0] is found[0] else None


def _mean(value: ir.Value) -> tuple[ir.Value, tuple[int, ...]] | None:
    """What is averaged and over which axes, if ``value`` is a ReduceMean that keeps its dimensions."""
    node = value.producer()
    if node is None or node.op_type != "ReduceMean" or node.domain != "" or node.inputs[0] is None:
        return None
    if node.attributes.get_int("keepdims", 1) != 1:
        return None
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        axes = constant(node.inputs[1])
        return (node.inputs[0], tuple(int(axis) for axis in axes)) if axes is not None else None
    return node.inputs[0], tuple(node.attributes.get_ints("axes", ()))


def _square_base(value: ir.Value) -> ir.Value | None:
    product, power = _inputs(value, "Mul"), _inputs(value, "Pow")
    if product and product[0] is product[1]:
        return product[0]
    return power[0] if power and scalar(power[1]) == 2.0 else None


def _inputs(value: ir.Value, op_type: str) -> tuple[ir.Value, ...]:
    """The inputs of the ``op_type`` node that makes ``value``; empty if another node does."""
    node = value.producer()
    if node is None or node.op_type != op_type or node.domain != "":
        return ()
    return tuple(x for x in node.inputs if x is not None)
