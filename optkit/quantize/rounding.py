"""Rounds a layer's weights one after the other, and lets those to come make up for the error of those that are done.

For a layer with rows of inputs X (a convolution's patches) and H = X'X, weight k of every output channel is rounded,
and its error e is spread over the weights k+1... so that what the layer computes from X changes least:

    U = chol(inv(H))',    W[:, k+1:] -= e / U[k, k] * U[k, k+1:]

After Frantar et al., "GPTQ", 2022 (optimal brain quantization with a fixed order). Layers are taken in the order of the
graph, and X is what the quantized network with the earlier layers' new weights gives. Where biases are corrected as
well, a layer's is right before the next layer is rounded: X holds no shift that would be gone later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from optkit.models import OnnxModel
from optkit.quantize.bias_correction import BiasCorrection
from optkit.quantize.initializers import operand
from optkit.quantize.placement.draft import Use
from optkit.quantize.placement.graph import attribute, weight_axis
from optkit.quantize.qdq import Quantization, write
from optkit.quantize.rows import as_table, from_table, rows_read
from optkit.quantize.saturation import MOST, neighbours
from optkit.quantize.scales import QuantizedWeight
from optkit.quantize.walk import walk
from optkit.targets.base import Int8Policy

if TYPE_CHECKING:
    import onnx_ir as ir

    from optkit.data import Batch

Array = np.ndarray[Any, Any]

_ROWS, _FEWEST_ROWS = 4096, 512
_ELEMENTS = 1 << 23
"""Most elements of X, as long as it has the fewest rows: those of a wide depthwise layer, which needs few."""

_DAMPING = 0.01
"""Share of the mean of H's diagonal that is added to it: inputs that were never seen move no weight."""

_BLOCK = 64
"""Weights whose errors are spread over the rest together."""


def round_weights(
    model: OnnxModel,
    quantization: Quantization,
    policy: Int8Policy,
    batches: Sequence[Batch],
    correct_bias: bool = False,
    seed: int = 0,
    threads: int = 1,
) -> Quantization:
    """The same quantization with the same scales and weights that are rounded layer by layer.

    Args:
        model: the float model.
        quantization: of that model.
        policy: what the target wants.
        batches: samples that the result is not judged by.
        correct_bias: also take each channel's mean error out of its bias, before the next layer is rounded.
        seed: which rows of X are used, where there are more than enough.
        threads: intra-op threads.
    """
    written = write(model, quantization)
    readers = _readers(model, written, quantization)
    biases = BiasCorrection(model, quantization if correct_bias else replace(quantization, weights={}))
    weights = dict(quantization.weights)
    rng = np.random.default_rng(seed)
    as_float = walk(model, biases.stops, batches, threads)
    for name, arrays in walk(written, [*readers, *biases.stops], batches, threads):
        if name in biases.stops:
            biases.correct(name, next(as_float)[1], arrays)
        for node in readers.get(name, ()):
            use = Use(str(node.name), 1)
            rows = rows_read(node, weights[use].values.shape, arrays, _enough(node, weights[use]), rng)
            if rows is not None:
                weights[use] = _rounded(node, weights[use], rows, policy)
                _store(written.ir.graph.node(use.node), weights[use])
    return biases.added_to(replace(quantization, weights=weights), policy)


def _readers(model: OnnxModel, written: OnnxModel, quantization: Quantization) -> dict[str, list[ir.Node]]:
    """The float graph's layers, by the tensor of the written graph whose values they multiply."""
    readers: dict[str, list[ir.Node]] = {}
    for node in model.ir.graph:
        name = str(node.name)
        if Use(name, 1) in quantization.weights:
            # What is quantized at each call is known as a float only
            at_each_call = name in quantization.placement.dynamic
            source = (node if at_each_call else written.ir.graph.node(name)).inputs[0]
            assert source is not None  # a layer reads something
            readers.setdefault(str(source.name), []).append(node)
    return readers


def _enough(node: ir.Node, weight: QuantizedWeight) -> int:
    groups = attribute(node, "group", 1) if node.op_type == "Conv" else 1
    width = groups * weight.values.size // int(weight.values.shape[weight_axis(node)])
    return max(_FEWEST_ROWS, min(_ROWS, _ELEMENTS // max(width, 1)))


def _store(written: ir.Node, weight: QuantizedWeight) -> None:
    import onnx_ir as ir

    value = written.inputs[1]
    assert value is not None  # a layer has a weight: as it is stored, or behind a DequantizeLinear
    dequantize = value.producer()
    stored = value if dequantize is None else dequantize.inputs[0]
    assert stored is not None
    # MatMulInteger multiplies by what a Gemm may have the other way round
    values = weight.values if written.op_type != "MatMulInteger" or weight.axis == 1 else weight.values.T
    stored.const_value = ir.tensor(np.ascontiguousarray(values), name=stored.name)


def _rounded(node: ir.Node, stored: QuantizedWeight, rows: Array, policy: Int8Policy) -> QuantizedWeight:
    weight = operand(node, 1)
    table = as_table(node, weight).astype(np.float64)
    scale = stored.scale.astype(np.float64).reshape(table.shape[:2])
    pairs = policy.sums_in_16_bits and len(neighbours(node, weight.shape)) > 0
    values = from_table(node, _in_turn(table, _hessian(rows), scale, pairs), weight.shape)
    return replace(stored, values=values.astype(np.int8))


def _hessian(rows: Array) -> Array:
    """float64[groups, inputs, inputs]."""
    hessian: Array = (rows.transpose(0, 2, 1) @ rows).astype(np.float64)
    diagonal = np.einsum("gkk->gk", hessian)  # a view
    diagonal += _DAMPING * diagonal.mean(axis=1, keepdims=True) + np.where(diagonal == 0, 1e-6, 0)
    return hessian


def _in_turn(weight: Array, hessian: Array, scale: Array, pairs: bool) -> Array:
    """The integers for a table [groups, outputs, inputs] with scales [groups, outputs]; the table is used up.

    With ``pairs`` the second of two neighbours stays where their sum does not saturate.
    """
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).transpose(0, 2, 1)
    values, inputs = np.empty_like(weight), weight.shape[2]
    pruned = weight == 0  # they stay so: kernels for sparse weights count on them
    for start in range(0, inputs, _BLOCK):
        stop = min(start + _BLOCK, inputs)
        errors = np.empty_like(weight[:, :, start:stop])
        for k in range(start, stop):
            before = values[:, :, k - 1] if pairs and k % 2 else np.zeros_like(scale)
            lowest, highest = np.maximum(-127, -MOST - before), np.minimum(127, MOST - before)
            rounded = np.clip(np.rint(weight[:, :, k] / scale), lowest, highest)
            values[:, :, k] = np.where(pruned[:, :, k], 0, rounded)
            error = (weight[:, :, k] - values[:, :, k] * scale) / upper[:, k, k, None]
            weight[:, :, k + 1 : stop] -= error[:, :, None] * upper[:, None, k, k + 1 : stop]
            errors[:, :, k - start] = error
        weight[:, :, stop:] -= errors @ upper[:, start:stop, stop:]
    return values
