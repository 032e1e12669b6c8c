"""Writes what finds the range of its activation at each call: dynamic quantization.

A product of X with a stored weight, sw per output channel, becomes

    Xq, sx, zx = DynamicQuantizeLinear(X)           UINT8 of [min, max] of all of X and zero
    Y = Cast(MatMulInteger(Xq, Wq, zx)) * (sx * sw) + b

which is standard ONNX, and which ONNX Runtime fuses into one DynamicQuantizeMatMul, or into MatMulIntegerToFloat where
several products read X. An LSTM becomes ONNX Runtime's own DynamicQuantizeLSTM.

Nothing is calibrated and no range clips, but a sample's range is that of its batch: what runs beside it changes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from optkit.quantize.initializers import add_initializer, operand
from optkit.quantize.placement.draft import Use
from optkit.quantize.placement.graph import attribute_float
from optkit.quantize.scales import QuantizedWeight

if TYPE_CHECKING:
    import onnx_ir as ir

Array = np.ndarray[Any, Any]

DOMAIN = "com.microsoft"
"""Where ONNX Runtime keeps the LSTM that standard ONNX lacks."""

_LSTM_INPUTS = 8


class DynamicWriter:
    """Replaces nodes of a graph, one by one in its order, by those that compute with the ranges of each call."""

    def __init__(self, graph: ir.Graph, weights: Mapping[Use, QuantizedWeight]) -> None:
        self._graph = graph
        self._weights = weights
        self._quantized: dict[ir.Value, ir.Node] = {}

    def write(self, node: ir.Node, bias: Array | None) -> None:
        """Replace a node; the new one that multiplies takes over its name, and the result keeps its own.

        Args:
            node: a ``MatMul``, ``Gemm`` or ``LSTM`` whose weights are given.
            bias: what is added to a product, if anything is.
        """
        if node.op_type == "LSTM":
            self._put(node, [self._lstm(node)])
        else:
            self._put(node, self._product(node, bias))

    def _product(self, node: ir.Node, bias: Array | None) -> list[ir.Node]:
        import onnx_ir as ir

        name, weight = str(node.name), self._weights[Use(str(node.name), 1)]
        values = weight.values if weight.axis == 1 else weight.values.T
        scale = (weight.scale * attribute_float(node, "alpha", 1.0)).astype(np.float32)
        quantized, unit, zero = self._quantize(node).outputs
        shape = node.outputs[0].shape
        stored = self._constant(f"{name}_weight_quantized", values)
        product = _node("MatMulInteger", [quantized, stored, zero], name, shape, ir.DataType.INT32)
        units = _node(
            "Mul", [unit, self._constant(f"{name}_weight_scale", scale)], f"{name}_scale", ir.Shape(scale.shape)
        )
        real = _node("Cast", product.outputs, f"{name}_real", shape, to=int(ir.DataType.FLOAT))
        made = [product, units, real, _node("Mul", [*real.outputs, *units.outputs], f"{name}_scaled", shape)]
        if bias is not None:
            added = self._constant(f"{name}_bias", bias)
            made.append(_node("Add", [*made[-1].outputs, added], f"{name}_biased", shape))
        return made

    def _quantize(self, reader: ir.Node) -> ir.Node:
        """The node that quantizes what a product reads, the same for all that read it."""
        import onnx_ir as ir

        source = reader.inputs[0]
        assert source is not None  # placement: a product has an activation
        if source not in self._quantized:
            base = f"{source.name}_at_run_time"  # elsewhere the tensor may be quantized by a range that is known
            node = ir.node("DynamicQuantizeLinear", [source], num_outputs=3, name=f"{base}_DynamicQuantizeLinear")
            kinds = (("quantized", ir.DataType.UINT8), ("scale", ir.DataType.FLOAT), ("zero_point", ir.DataType.UINT8))
            for value, (part, dtype) in zip(node.outputs, kinds, strict=True):
                value.name, value.dtype, value.shape = f"{base}_{part}", dtype, ir.Shape(())
            node.outputs[0].shape = source.shape
            self._graph.insert_before(reader, node)
            self._quantized[source] = node
        return self._quantized[source]

    def _lstm(self, node: ir.Node) -> ir.Node:
        import onnx_ir as ir

        name, inputs = str(node.name), [*node.inputs, *[None] * (_LSTM_INPUTS - len(node.inputs))]
        for position, letter in ((1, "W"), (2, "R")):
            stored, directions = self._weights[Use(name, position)], len(operand(node, position))
            # ONNX has [directions, gates, inputs], and this operator [directions, inputs, gates]
            values = stored.values.reshape(directions, -1, stored.values.shape[1]).transpose(0, 2, 1)
            scale = stored.scale.reshape(directions, -1)
            inputs[position] = self._constant(f"{name}_{letter}_quantized", values)
            inputs.append(self._constant(f"{name}_{letter}_scale", scale))
            inputs.append(self._constant(f"{name}_{letter}_zero_point", np.zeros(scale.shape, np.int8)))
        self._graph.opset_imports.setdefault(DOMAIN, 1)
        kept = [attribute for key, attribute in node.attributes.items() if key != "layout"]
        return ir.Node(DOMAIN, "DynamicQuantizeLSTM", inputs, kept, num_outputs=len(node.outputs), name=name)

    def _put(self, old: ir.Node, new: Sequence[ir.Node]) -> None:
        import onnx_ir as ir

        ir.convenience.replace_nodes_and_values(self._graph, old, [old], new, old.outputs, new[-1].outputs)

    def _constant(self, name: str, array: Array) -> ir.Value:
        return add_initializer(self._graph, name, array)


def _node(
    op_type: str,
    inputs: Sequence[ir.Value],
    name: str,
    shape: ir.Shape | None,
    dtype: ir.DataType | None = None,
    **attributes: int,
) -> ir.Node:
    import onnx_ir as ir

    node = ir.node(op_type, inputs, attributes, num_outputs=1, name=name)
    result = node.outputs[0]
    result.name, result.dtype, result.shape = f"{name}_{op_type}", dtype or ir.DataType.FLOAT, shape
    return node
