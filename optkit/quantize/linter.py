"""Judges the Q/DQ pairs of any ONNX model by what a target wants; rules E break a build, rules W cost accuracy or time.

==== ================================================================================================
E1   an activation is UINT8 or has a zero point, where the target takes symmetric INT8 only
E2   a scale is zero, negative, NaN or infinite
E3   a bias is INT32 behind a DequantizeLinear, where the target wants it in float
E4   a DequantizeLinear reads another type, scale or zero point than its QuantizeLinear wrote
E5   an operator computes on integers itself, where the target reads Q/DQ pairs only
W1   an activation has a scale per channel
W2   a weight's scales lie along another axis than the output channels
W3   both operands of a residual Add are quantized, where the target fuses one of them in float
W4   a QuantizeLinear follows a DequantizeLinear with another scale: rounded twice
W5   a quantized product or convolution is too small to pay
W6   Q/DQ from com.microsoft, which only ONNX Runtime is sure to read
W7   an output of the graph comes out of a Q/DQ pair, where the target has no use for that
W8   an INT8 activation meets a float weight: the product runs in float
W9   a convolution reads INT8 and its output is not quantized, where the target then computes it in float
==== ================================================================================================
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from optkit.models import OnnxModel
from optkit.quantize.placement.draft import WEIGHTED
from optkit.quantize.placement.graph import ACTIVATIONS, MOVES, attribute, constant, only_consumer, weight_axis
from optkit.quantize.placement.small_kernels_float import small_product
from optkit.targets.base import Int8Policy

if TYPE_CHECKING:
    import onnx_ir as ir


_INTEGER_OPS = frozenset(
    {"ConvInteger", "DynamicQuantizeLinear", "MatMulInteger", "QGemm", "QLinearAdd", "QLinearConv", "QLinearMatMul"}
)


@dataclass(frozen=True)
class Finding:
    """What is wrong, where, and how to mend it."""

    rule: str
    node: str
    message: str
    mend: str

    @property
    def is_error(self) -> bool:
        """Whether the target cannot build the model."""
        return self.rule.startswith("E")

    def __str__(self) -> str:
        return f"{self.rule} {self.node}: {self.message}: {self.mend}"


def lint(model: OnnxModel, policy: Int8Policy) -> tuple[Finding, ...]:
    """Every finding, in the order of the graph."""
    rules = (_operators, _parameters, _pairs, _weights, _residual_adds, _outputs)
    return tuple(finding for node in model.ir.graph for rule in rules for finding in rule(node, policy))


def is_quantized(model: OnnxModel) -> bool:
    """Whether there is anything to judge."""
    quantized = _INTEGER_OPS | {"QuantizeLinear", "DequantizeLinear"}
    return any(node.op_type in quantized for node in model.ir.graph)


def _is(node: ir.Node | None, op_type: str) -> bool:
    return node is not None and node.op_type == op_type


def _producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()


def _name(node: ir.Node) -> str:
    return node.name or f"(unnamed {node.op_type})"


def _is_dequantized_activation(value: ir.Value | None) -> bool:
    dequantize = _producer(value)
    return dequantize is not None and dequantize.op_type == "DequantizeLinear" and _reads_activation(dequantize)


def _reads_activation(node: ir.Node) -> bool:
    """Whether a Q or DQ works on an activation, not on a weight, which may be stored as float behind a pair."""
    source = _producer(node.inputs[0])
    if source is not None and source.op_type == "QuantizeLinear":
        return constant(source.inputs[0]) is None
    return constant(node.inputs[0]) is None


def _parameter(node: ir.Node, index: int) -> np.ndarray[Any, Any] | None:
    tensor = constant(node.inputs[index]) if len(node.inputs) > index else None
    return None if tensor is None else tensor.numpy()


def _operators(node: ir.Node, policy: Int8Policy) -> Iterator[Finding]:
    if policy.symmetric and node.op_type in _INTEGER_OPS:
        yield Finding("E5", _name(node), f"{node.op_type} is not Q/DQ", "quantize again, with Q/DQ pairs")


def _parameters(node: ir.Node, policy: Int8Policy) -> Iterator[Finding]:
    if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
        return
    if node.domain == "com.microsoft":
        yield Finding("W6", _name(node), "is from com.microsoft", "use ai.onnx Q/DQ, opset 13 or later")
    scale, zero_point = _parameter(node, 1), _parameter(node, 2)
    if scale is not None and not (np.isfinite(scale) & (scale > 0)).all():
        yield Finding("E2", _name(node), "a scale is not a positive number", "calibrate again; give dead channels 1.0")
    if not _reads_activation(node):
        return
    if scale is not None and scale.size > 1:
        yield Finding("W1", _name(node), "an activation has a scale per channel", "use one scale for the tensor")
    if policy.symmetric and zero_point is not None and (zero_point.dtype == np.uint8 or zero_point.any()):
        yield Finding(
            "E1",
            _name(node),
            f"{zero_point.dtype} with zero point {zero_point.reshape(-1)[0]}, but the target takes symmetric INT8 only",
            "quantize for this target",
        )


def _pairs(node: ir.Node, policy: Int8Policy) -> Iterator[Finding]:
    source = _producer(node.inputs[0]) if node.inputs else None
    if source is None or not _reads_activation(node):
        return
    if _is(node, "DequantizeLinear") and _is(source, "QuantizeLinear") and not _same_parameters(source, node):
        yield Finding(
            "E4", _name(node), f"reads another type, scale or zero point than {_name(source)} wrote", "share them"
        )
    if _is(node, "QuantizeLinear") and _is(source, "DequantizeLinear") and not _same_parameters(source, node):
        yield Finding(
            "W4", _name(node), f"quantizes again what {_name(source)} dequantized, at another scale", "share one pair"
        )


def _same_parameters(one: ir.Node, other: ir.Node) -> bool:
    for index in (1, 2):
        a, b = _parameter(one, index), _parameter(other, index)
        if a is not None and b is not None and (a.dtype != b.dtype or not np.array_equal(a, b)):
            return False
    return True


def _weights(node: ir.Node, policy: Int8Policy) -> Iterator[Finding]:
    if node.op_type not in WEIGHTED or not _is_dequantized_activation(node.inputs[0]):
        return
    name, dequantize = _name(node), _producer(node.inputs[1])
    if dequantize is None or not _is(dequantize, "DequantizeLinear"):
        if constant(node.inputs[1]) is not None:
            yield Finding("W8", name, "its activation is INT8, its weight is float", "quantize the weight too")
        return
    scale, stored = _parameter(dequantize, 1), constant(_stored(dequantize))
    if scale is not None and scale.size > 1 and stored is not None:
        axis = attribute(dequantize, "axis", 1) % len(stored.shape)
        if axis != weight_axis(node):
            yield Finding(
                "W2", name, f"its weight has scales along axis {axis}", f"put them along axis {weight_axis(node)}"
            )
    if stored is not None and "small_kernels_float" in policy.rules:
        problem = small_product(node, stored)
        if problem is not None:
            yield Finding("W5", name, problem, f"leave it in float: exclude: [{name}]")
    if policy.bias == "float" and len(node.inputs) > 2 and _is_int32(_producer(node.inputs[2])):
        yield Finding("E3", name, "its bias is INT32", "keep the bias in float")
    if node.op_type == "Conv" and "conv_in_out" in policy.rules and not _reaches_quantize(node):
        yield Finding("W9", name, "its output is not quantized", "quantize it, or leave the convolution in float")


def _stored(dequantize: ir.Node) -> ir.Value | None:
    """The INT8 weight, or the float one where the file holds weight -> Q -> DQ."""
    source = _producer(dequantize.inputs[0])
    return source.inputs[0] if source is not None and source.op_type == "QuantizeLinear" else dequantize.inputs[0]


def _is_int32(dequantize: ir.Node | None) -> bool:
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return False
    stored = constant(dequantize.inputs[0])
    return stored is not None and stored.dtype.numpy() == np.int32


def _reaches_quantize(node: ir.Node) -> bool:
    consumer = only_consumer(node.outputs[0])
    if consumer is not None and consumer.op_type in ACTIVATIONS:
        consumer = only_consumer(consumer.outputs[0])
    return _is(consumer, "QuantizeLinear")


def _residual_adds(node: ir.Node, policy: Int8Policy) -> Iterator[Finding]:
    if "skip_branch" not in policy.rules or node.op_type != "Add":
        return
    if len(node.inputs) == 2 and all(_is_dequantized_activation(value) for value in node.inputs):
        yield Finding(
            "W3", _name(node), "both operands are quantized, so it cannot join a convolution", "quantize the skip only"
        )


def _outputs(node: ir.Node, policy: Int8Policy) -> Iterator[Finding]:
    if "conv_in_out" in policy.rules or not any(value.is_graph_output() for value in node.outputs):
        return
    source: ir.Node | None = node
    while source is not None and source.op_type in MOVES:
        source = _producer(source.inputs[0])
    if source is not None and source.op_type == "DequantizeLinear" and _reads_activation(source):
        yield Finding("W7", _name(source), "an output of the graph is quantized", "leave the last layer's output float")
