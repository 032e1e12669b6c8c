"""Writes a quantization into the graph as QuantizeLinear and DequantizeLinear nodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from optkit.models import OnnxModel
from optkit.quantize.dynamic import DynamicWriter
from optkit.quantize.initializers import add_initializer, drop_unused_initializers, operand
from optkit.quantize.placement.draft import RECURRENT, Placement, Use
from optkit.quantize.placement.graph import constant, stacked
from optkit.quantize.saturation import pair_reach
from optkit.quantize.scales import QuantizedWeight, Scale, WeightMethod, quantize_weight
from optkit.targets.base import Int8Policy

if TYPE_CHECKING:
    import onnx_ir as ir

Array = np.ndarray[Any, Any]

_INT32_ROOM = 2.0**30
"""How large a bias may get in units of its scale: half of what INT32 holds leaves room for the products."""


@dataclass(frozen=True)
class Quantization:
    """Everything that ``write`` needs, in the names of the float graph; accuracy algorithms map one to another.

    Attributes:
        placement: what is quantized.
        activations: scale of every tensor of ``placement.tensors``.
        weights: the stored form of every weight of ``placement.weights``.
        biases: float biases that replace the graph's, by the node that adds them; for correction.
    """

    placement: Placement
    activations: Mapping[str, Scale]
    weights: Mapping[Use, QuantizedWeight]
    biases: Mapping[str, Array] = field(default_factory=dict)


def quantize_weights(
    model: OnnxModel,
    placement: Placement,
    policy: Int8Policy,
    activations: Mapping[str, Scale],
    method: WeightMethod = "max",
) -> dict[Use, QuantizedWeight]:
    """Every placed weight as INT8. A channel's scale grows where its INT32 bias or the kernel's sums would overflow."""
    nodes = {node.name: node for node in model.ir.graph}
    weights: dict[Use, QuantizedWeight] = {}
    for use, axis in placement.weights.items():
        node = nodes[use.node]
        smallest: Array | float = 0.0
        if Use(use.node, 2) in placement.biases:
            bias = np.abs(operand(node, 2).astype(np.float64))
            smallest = bias / (_INT32_ROOM * float(_input_scale(node, activations).scale))
        weight = stacked(node, operand(node, use.position))
        if policy.sums_in_16_bits:
            smallest = np.maximum(smallest, pair_reach(node, weight) / 127)
        weights[use] = quantize_weight(weight, axis, method, smallest)
    return weights


def _input_scale(node: ir.Node, activations: Mapping[str, Scale]) -> Scale:
    value = node.inputs[0]
    assert value is not None and value.name is not None  # placement: input 0 is a tensor that is quantized
    return activations[value.name]


def write(model: OnnxModel, quantization: Quantization) -> OnnxModel:
    """The quantized model.

    Weights become INT8 initializers behind a DequantizeLinear, biases INT32 ones where the placement says so, and
    activations get one Q/DQ pair that all of their quantized uses share. Nodes that quantize dynamically are written by
    ``DynamicWriter``.
    """
    written = model.clone()
    writer = _Writer(written.ir.graph, quantization)
    for node in list(written.ir.graph):
        writer.constants(node)
    for value in [*written.ir.graph.inputs, *(value for node in list(written.ir.graph) for value in node.outputs)]:
        writer.activation(value)
    drop_unused_initializers(written.ir.graph)
    return written


class _Writer:
    def __init__(self, graph: ir.Graph, quantization: Quantization) -> None:
        self._graph = graph
        self._quantization = quantization
        self._dynamic = DynamicWriter(graph, quantization.weights)
        self._uses: dict[str, list[tuple[ir.Node, int]]] = {}
        nodes = {node.name: node for node in graph}
        for use in sorted(quantization.placement.inputs):
            value = nodes[use.node].inputs[use.position]
            assert value is not None and value.name is not None  # a Use of an activation
            self._uses.setdefault(value.name, []).append((nodes[use.node], use.position))

    def constants(self, node: ir.Node) -> None:
        """Write the node's weight and bias as they are stored, or replace a float bias that was corrected."""
        placement, name = self._quantization.placement, node.name or ""
        if name in placement.dynamic:
            self._dynamic.write(node, self._bias(node))
            return
        weight = self._quantization.weights.get(Use(name, 1))
        if weight is None:
            self._added(node)
            return
        bias = self._bias(node)
        if bias is not None and Use(name, 2) in placement.biases:
            # float64: a float32 quotient of 2**30 would be off by up to 64 units
            unit = weight.scale * _input_scale(node, self._quantization.activations).scale
            stored = np.rint(bias.astype(np.float64) / unit).astype(np.int32)
            _set_input(node, 2, self._dequantized(node, 2, QuantizedWeight(stored, unit, 0)))
        elif bias is not None and name in self._quantization.biases:
            _set_input(node, 2, add_initializer(self._graph, f"{name}_bias", bias))
        node.replace_input_with(1, self._dequantized(node, 1, weight))

    def _added(self, node: ir.Node) -> None:
        """Replace the constant of an Add that follows a product, if it was corrected or must not look like a bias."""
        corrected = self._quantization.biases.get(node.name or "")
        apart = node.name in self._quantization.placement.apart
        for index, value in enumerate(node.inputs):
            tensor = constant(value)
            if tensor is not None and (apart or corrected is not None):
                added = tensor.numpy() if corrected is None else corrected
                shaped = added[None] if apart else added
                node.replace_input_with(index, add_initializer(self._graph, f"{node.name}_bias", shaped))

    def _bias(self, node: ir.Node) -> Array | None:
        corrected = self._quantization.biases.get(node.name or "")
        if corrected is not None:
            return corrected
        if node.op_type in RECURRENT:
            return None  # it stays an input of the node
        return operand(node, 2) if len(node.inputs) > 2 and node.inputs[2] is not None else None

    def _dequantized(self, node: ir.Node, index: int, stored: QuantizedWeight) -> ir.Value:
        import onnx_ir as ir

        base = f"{node.name}_{'weight' if index == 1 else 'bias'}"
        zero = np.zeros(stored.scale.shape, stored.values.dtype)
        inputs = [
            add_initializer(self._graph, f"{base}_quantized", stored.values),
            add_initializer(self._graph, f"{base}_scale", stored.scale),
            add_initializer(self._graph, f"{base}_zero_point", zero),
        ]
        dequantize = ir.node(
            "DequantizeLinear", inputs, {"axis": stored.axis}, num_outputs=1, name=f"{base}_DequantizeLinear"
        )
        _describe(dequantize.outputs[0], f"{base}_dequantized", ir.DataType.FLOAT, inputs[0])
        self._graph.insert_before(node, dequantize)
        return dequantize.outputs[0]

    def activation(self, value: ir.Value) -> None:
        """Put a Q/DQ pair behind a tensor and let its quantized uses read from it."""
        import onnx_ir as ir

        name = value.name or ""
        everywhere = name in self._quantization.placement.outputs
        uses = list(value.uses()) if everywhere else self._uses.get(name, [])
        if name not in self._quantization.placement.tensors or not (uses or everywhere):
            return
        scale = self._quantization.activations[name]
        parameters = [
            add_initializer(self._graph, f"{name}_scale", np.asarray(scale.scale, np.float32)),
            add_initializer(self._graph, f"{name}_zero_point", np.asarray(scale.zero_point, scale.dtype)),
        ]
        quantize = ir.node("QuantizeLinear", [value, *parameters], num_outputs=1, name=f"{name}_QuantizeLinear")
        dequantize = ir.node(
            "DequantizeLinear", [quantize.outputs[0], *parameters], num_outputs=1, name=f"{name}_DequantizeLinear"
        )
        quantized, dequantized = quantize.outputs[0], dequantize.outputs[0]
        dtype = ir.DataType[scale.dtype.upper()]
        _describe(quantized, f"{name}_quantized", dtype, value)
        _describe(dequantized, f"{name}_dequantized", ir.DataType.FLOAT, value)
        self._insert_after(value, [quantize, dequantize])
        for node, index in uses:
            node.replace_input_with(index, dequantized)
        if everywhere and value.is_graph_output():
            self._make_output(value, dequantized)

    def _insert_after(self, value: ir.Value, nodes: list[ir.Node]) -> None:
        producer = value.producer()
        if producer is not None:
            self._graph.insert_after(producer, nodes)
        elif len(self._graph):
            self._graph.insert_before(self._graph[0], nodes)

    def _make_output(self, value: ir.Value, dequantized: ir.Value) -> None:
        """The graph's output keeps its name, and what computed it gets another."""
        name, value.name = value.name, f"{value.name}_float"
        for index, output in enumerate(self._graph.outputs):
            if output is value:
                self._graph.outputs[index] = dequantized
        dequantized.name = name


def _describe(value: ir.Value, name: str, dtype: ir.DataType, like: ir.Value) -> None:
    value.name, value.dtype, value.shape = name, dtype, like.shape


def _set_input(node: ir.Node, index: int, value: ir.Value) -> None:
    while len(node.inputs) <= index:
        node.resize_inputs(index + 1)
    node.replace_input_with(index, value)
