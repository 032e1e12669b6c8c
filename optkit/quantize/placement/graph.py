"""What several rules ask of the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from optkit.quantize.placement.draft import WEIGHTED

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

ACTIVATIONS = frozenset({"Relu", "Clip"})
"""Ops that fuse with the convolution before them."""

_GATES = ({"Sigmoid", "Mul"}, {"HardSigmoid", "Mul"})

MOVES = frozenset({"Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
"""Ops that move values and change none."""

COMMUTES = MOVES | {"Cast", "Concat", "MaxPool", "Slice", "Split"}
"""Ops that TensorRT moves a quantization across."""

MOVED_ACROSS = COMMUTES - {"Cast"} | {"Identity"}  # a Cast to integers would wrap what saturates
"""What it moves one of floats across, and rightly."""


def moved(node: ir.Node) -> list[ir.Value]:
    """What a node of ``MOVED_ACROSS`` moves, which are its inputs but for sizes and indices; nothing for any other."""
    if node.op_type not in MOVED_ACROSS:
        return []
    return [value for value in node.inputs[: None if node.op_type == "Concat" else 1] if value is not None]


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The data of an initializer or a Constant node."""
    import onnx_ir as ir

    return None if value is None else ir.convenience.get_const_tensor(value)


def only_consumer(value: ir.Value) -> ir.Node | None:
    """The node that reads a tensor, if it is the only one and the tensor is no output of the graph."""
    uses = tuple(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def is_read(value: ir.Value) -> bool:
    """Whether a node reads a tensor or it is an output of the graph."""
    return bool(value.uses()) or value.is_graph_output()


def is_int8_product(node: ir.Node | None) -> bool:
    """Whether both operands of a convolution or matrix product come out of a DequantizeLinear."""
    if node is None or node.op_type not in WEIGHTED:
        return False
    producers = [value.producer() if value is not None else None for value in node.inputs[:2]]
    return all(producer is not None and producer.op_type == "DequantizeLinear" for producer in producers)


def interpolates(node: ir.Node) -> bool:
    """Whether a node is a Resize that computes new values, as all but those to the nearest do."""
    mode = node.attributes.get("mode")
    return node.op_type == "Resize" and node.domain == "" and mode is not None and mode.as_string() != "nearest"


def has_static_shapes(node: ir.Node) -> bool:
    """Whether every size of what a node reads first and of what it writes first is known before it is computed."""
    shapes = [value.shape for value in (node.inputs[0], node.outputs[0]) if value is not None]
    return all(shape is not None and shape.is_static() for shape in shapes)


def after_activation(value: ir.Value) -> ir.Value:
    """The tensor after the Relu or Clip from zero that is a tensor's only reader, or the tensor itself.

    What it writes begins at zero, so the quantization after it saturates just as it does, and the runtime drops it. A
    Clip from elsewhere would stay, and part the convolution from its Q.
    """
    consumer = only_consumer(value)
    if consumer is None or consumer.op_type not in ACTIVATIONS or consumer.inputs[0] is not value:
        return value
    if consumer.op_type == "Clip":
        low = constant(consumer.inputs[1]) if len(consumer.inputs) > 1 else None
        if low is None or low.numpy().item() != 0:
            return value
    return consumer.outputs[0]


def _behind_activation(value: ir.Value) -> ir.Value:
    """The tensor after the Relu, Clip, HardSwish or gate ``x * sigmoid(x)`` that reads a tensor, or the tensor itself.

    These are what TensorRT computes within a convolution's kernel.
    """
    consumer = only_consumer(value)
    if consumer is not None and consumer.op_type in ACTIVATIONS | {"HardSwish"}:
        return consumer.outputs[0]
    uses = tuple(value.uses())
    readers = {use.node.op_type: use.node for use in uses}
    if len(uses) == 2 and readers.keys() in _GATES and not value.is_graph_output():
        gated = readers.pop("Mul").outputs[0]
        (gate,) = readers.values()
        if only_consumer(gate.outputs[0]) is gated.producer():
            return gated
    return value


def all_readers(value: ir.Value, wanted: Callable[[ir.Node, int], bool]) -> bool:
    """Whether every input that reads a tensor is wanted, seen behind its activation and what moves it; False for none.

    What reads it in the body of an If or Loop is not.

    Args:
        value: what a node writes.
        wanted: judges a node and the position of its input.
    """
    written = _behind_activation(value)
    uses, graph = tuple(written.uses()), written.graph
    return (
        bool(uses)
        and not written.is_graph_output()
        and all(
            use.node.graph is graph
            and (
                wanted(use.node, use.idx)
                or (use.node.op_type in COMMUTES and all(all_readers(moved, wanted) for moved in use.node.outputs))
            )
            for use in uses
        )
    )


def attribute(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute."""
    found = node.attributes.get(name)
    return default if found is None else found.as_int()


def weight_problem(node: ir.Node) -> str | None:
    """Why a weighted node's weight cannot be stored as INT8, or None."""
    weight = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if weight is None:
        return "its second operand is not a constant"
    if weight.dtype.numpy() != "float32":
        return "it does not compute in float32"
    if node.op_type in ("MatMul", "Gemm") and len(weight.shape) != 2:
        return "its weight is not a matrix"
    if node.op_type == "Gemm" and attribute(node, "transA", 0):
        return "its activation is transposed"
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:
        values = constant(bias)
        if values is None or len(values.shape) != 1 or attribute_float(node, "beta", 1.0) != 1.0:
            return "its bias is not a constant vector"
    return None


def attribute_float(node: ir.Node, name: str, default: float) -> float:
    """A float attribute."""
    found = node.attributes.get(name)
    return default if found is None else found.as_float()


def weight_axis(node: ir.Node) -> int:
    """The axis of a weight that counts output channels; an LSTM's weights are ``stacked`` first."""
    if node.op_type == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    return {"Conv": 0, "ConvTranspose": 1, "LSTM": 0, "MatMul": 1}[node.op_type]


def stacked(node: ir.Node, weight: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A weight as it is quantized: an LSTM's [directions, gates, inputs] as one matrix, any other as it is."""
    return weight.reshape(-1, weight.shape[-1]) if node.op_type == "LSTM" else weight
