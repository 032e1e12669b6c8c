"""Judges the INT8 of any ONNX model by what a target wants; rules E break a build, rules W cost accuracy or time.

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
W10  a product of integers is not written in the form that the target fuses, so that each of its parts runs alone
W11  a convolution finds the range of its activation at each call, for which there is no fast kernel
W12  neighbouring weights of a channel overflow the 16 bits in which this processor's kernels add their products
W13  a Gemm has a float bias, or a product is about to become such a Gemm: the target computes it in float
==== ================================================================================================
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from optkit.models import OnnxModel
from optkit.quantize.placement.draft import WEIGHTED
from optkit.quantize.placement.graph import (
    ACTIVATIONS,
    MOVES,
    all_readers,
    attribute,
    constant,
    only_consumer,
    weight_axis,
)
from optkit.quantize.placement.linear_inputs import merged_add
from optkit.quantize.placement.small_kernels_float import small_product
from optkit.quantize.saturation import MOST, pair_reach, reach_of_rows
from optkit.targets.base import Int8Policy

if TYPE_CHECKING:
    import onnx_ir as ir


INTEGER_OPS = frozenset(
    {
        "ConvInteger",
        "DynamicQuantizeLSTM",
        "DynamicQuantizeLinear",
        "DynamicQuantizeMatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "QGemm",
        "QLinearAdd",
        "QLinearConv",
        "QLinearMatMul",
    }
)
"""Ops that compute on integers themselves."""

QUANTIZED_OPS = INTEGER_OPS | {"QuantizeLinear", "DequantizeLinear"}
"""Ops that a float model has none of."""

_LSTM_SCALES: Mapping[int, int] = {1: 8, 2: 10}
"""Of DynamicQuantizeLSTM: the inputs that hold weights, and those that hold their scales."""


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
    rules = (_operators, _parameters, _pairs, _weights, _integers, _saturation, _residual_adds, _outputs)
    return tuple(finding for node in model.ir.graph for rule in rules for finding in rule(node, policy))


def is_quantized(model: OnnxModel) -> bool:
    """Whether there is anything to judge."""
    return any(node.op_type in QUANTIZED_OPS for node in model.ir.graph)


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
    if not policy.dynamic and node.op_type in INTEGER_OPS:
        yield Finding("E5", _name(node), f"{node.op_type} is not Q/DQ", "quantize again, with Q/DQ pairs")
    elif node.op_type == "ConvInteger":
        yield Finding("W11", _name(node), "its range is found at each call", "quantize convolutions statically")


def _parameters(node: ir.Node, policy: Int8Policy) -> Iterator[Finding]:
    if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
        return
    if node.domain == "com.microsoft":
        yield Finding("W6", _name(node), "is from com.microsoft", "use ai.onnx Q/DQ, opset 13 or later")
    scale, zero_point = _parameter(node, 1), _parameter(node, 2)
    if scale is not None and not _all_positive(scale):
        yield _bad_scale(node)
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
    if _is(node, "DequantizeLinear") and _is(source, "QuantizeLinear") and not same_parameters(source, node):
        yield Finding(
            "E4", _name(node), f"reads another type, scale or zero point than {_name(source)} wrote", "share them"
        )
    if _is(node, "QuantizeLinear") and _is(source, "DequantizeLinear") and not same_parameters(source, node):
        yield Finding(
            "W4", _name(node), f"quantizes again what {_name(source)} dequantized, at another scale", "share one pair"
        )


def same_parameters(one: ir.Node, other: ir.Node) -> bool:
    """Whether two Q or DQ nodes have one scale and zero point, as far as these are constants."""
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
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if policy.bias == "float" and is_int32(_producer(bias)):
        yield Finding("E3", name, "its bias is INT32", "keep the bias in float")
    if policy.bias == "int32":
        yield from _float_gemm(node)
    if node.op_type == "Conv" and _wants_quantized_output(node, policy):
        yield Finding("W9", name, "its output is not quantized", "quantize it, or leave the convolution in float")


def _float_gemm(node: ir.Node) -> Iterator[Finding]:
    """Products whose bias keeps them in float; where the sum is quantized, ONNX Runtime quantizes the bias itself."""
    name, add = _name(node), merged_add(node)
    if add is not None and not _is(only_consumer(add.outputs[0]), "QuantizeLinear"):
        mend = "make it a Gemm with an INT32 bias, or give the bias a dimension of 1 before its own"
        yield Finding("W13", name, "with its Add it becomes a float Gemm", mend)
    bias = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
    if bias is not None and not is_int32(_producer(bias)) and not _reaches_quantize(node):
        yield Finding("W13", name, "its bias is float", "store it as INT32 behind a DequantizeLinear")


def _stored(dequantize: ir.Node) -> ir.Value | None:
    """The INT8 weight, or the float one where the file holds weight -> Q -> DQ."""
    source = _producer(dequantize.inputs[0])
    return source.inputs[0] if source is not None and source.op_type == "QuantizeLinear" else dequantize.inputs[0]


def is_int32(dequantize: ir.Node | None) -> bool:
    """Whether a node dequantizes a constant INT32, as biases are."""
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return False
    stored = constant(dequantize.inputs[0])
    return stored is not None and stored.dtype.numpy() == np.int32


def _wants_quantized_output(node: ir.Node, policy: Int8Policy) -> bool:
    """Whether there is no INT8 kernel for a convolution, because what it writes is not quantized."""
    if "conv_in_out" in policy.rules:
        return not _reaches_quantize(node)
    return (
        "depthwise_float" in policy.rules
        and attribute(node, "group", 1) > 1
        and not all_readers(node.outputs[0], lambda reader, position: reader.op_type == "QuantizeLinear")
    )


def _reaches_quantize(node: ir.Node) -> bool:
    consumer = only_consumer(node.outputs[0])
    if consumer is not None and consumer.op_type in ACTIVATIONS:
        consumer = only_consumer(consumer.outputs[0])
    return _is(consumer, "QuantizeLinear")


def _integers(node: ir.Node, policy: Int8Policy) -> Iterator[Finding]:
    """The scales of what finds its range at each call, and the form that lets it fuse."""
    if not policy.dynamic:
        return
    if node.op_type == "MatMulInteger":
        scale = _scale_of_product(node)
        if scale is None:
            form = "MatMulInteger of a DynamicQuantizeLinear and a constant, then Cast, then Mul with both scales"
            yield Finding("W10", _name(node), "its form is not one that fuses", f"write {form}")
        elif not _all_positive(scale):
            yield _bad_scale(node)
    if node.op_type == "DynamicQuantizeLSTM":
        scales = [_parameter(node, index) for index in _LSTM_SCALES.values()]
        if not all(scale is None or _all_positive(scale) for scale in scales):
            yield _bad_scale(node)


def _scale_of_product(node: ir.Node) -> np.ndarray[Any, Any] | None:
    """The weight's scale, which is multiplied by the activation's; None where the pattern is another one."""
    quantize, cast = _producer(node.inputs[0]), only_consumer(node.outputs[0])
    if quantize is None or quantize.op_type != "DynamicQuantizeLinear" or constant(node.inputs[1]) is None:
        return None
    scaled = None if cast is None or cast.op_type != "Cast" else only_consumer(cast.outputs[0])
    if cast is None or scaled is None or scaled.op_type != "Mul":
        return None
    units = next((_producer(value) for value in scaled.inputs if value is not cast.outputs[0]), None)
    if units is None or units.op_type != "Mul" or quantize.outputs[1] not in units.inputs:
        return None
    constants = (constant(value) for value in units.inputs if value is not quantize.outputs[1])
    return next((tensor.numpy() for tensor in constants if tensor is not None), None)


def _all_positive(scale: np.ndarray[Any, Any]) -> bool:
    return bool((np.isfinite(scale) & (scale > 0)).all())


def _bad_scale(node: ir.Node) -> Finding:
    return Finding("E2", _name(node), "a scale is not a positive number", "calibrate again; give dead channels 1.0")


def _saturation(node: ir.Node, policy: Int8Policy) -> Iterator[Finding]:
    if not policy.sums_in_16_bits:
        return
    reach = np.concatenate([np.zeros(0), *_reaches(node)])
    if (reach > MOST).any():
        yield Finding(
            "W12",
            _name(node),
            f"neighbouring weights add up to more than {MOST} in {(reach > MOST).sum()} of {len(reach)} channels",
            "quantize it with optkit on this machine, or to 7 bits",
        )


def _reaches(node: ir.Node) -> Iterator[np.ndarray[Any, Any]]:
    """The largest sums of neighbours in INT8 weights that UINT8 activations are multiplied by."""
    if node.op_type == "MatMulInteger":
        weight = _int8(node.inputs[1])
        if weight is not None:
            yield reach_of_rows(weight.reshape(-1, weight.shape[-1]).T)
    elif node.op_type == "DynamicQuantizeLSTM":
        for index in _LSTM_SCALES:
            weight = _int8(node.inputs[index])
            if weight is not None:
                yield reach_of_rows(weight.transpose(0, 2, 1).reshape(-1, weight.shape[1]))
    elif node.op_type in WEIGHTED and _is_uint8(_producer(node.inputs[0])):
        dequantize = _producer(node.inputs[1])
        weight = None if dequantize is None else _int8(dequantize.inputs[0])
        if weight is not None:
            yield pair_reach(node, weight)


def _int8(value: ir.Value | None) -> np.ndarray[Any, Any] | None:
    """A constant of INT8, in a type that holds sums of it."""
    tensor = constant(value)
    return tensor.numpy().astype(np.int32) if tensor is not None and tensor.dtype.numpy() == "int8" else None


def _is_uint8(dequantize: ir.Node | None) -> bool:
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return False
    zero_point = _parameter(dequantize, 2)
    return zero_point is None or zero_point.dtype == np.uint8


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
