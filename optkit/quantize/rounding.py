"""Rounds a layer's weights one after the other, and lets those to come make up for the error of those that are done.

For a layer with rows of inputs X (a convolution's patches) and H = X'X, weight k of every output channel is rounded,
and its error e is spread over the weights k+1... so that what the layer computes from X changes least:

    U = chol(inv(H))',    W[:, k+1:] -= e / U[k, k] * U[k, k+1:]

After Frantar et al., "GPTQ", 2022 (optimal brain quantization with a fixed order). Layers are taken in the order of the
graph, and X is what the quantized network with the earlier layers' new weights gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from optkit.models import OnnxModel
from optkit.quantize.initializers import operand
from optkit.quantize.placement.draft import Use
from optkit.quantize.placement.graph import attribute
from optkit.quantize.qdq import Quantization, write
from optkit.quantize.scales import QuantizedWeight
from optkit.quantize.walk import walk

if TYPE_CHECKING:
    import onnx_ir as ir

    from optkit.data import Batch

Array = np.ndarray[Any, Any]

_ROWS = 4096
"""Most rows of X; a layer has far fewer inputs per output."""

_DAMPING = 0.01
"""Share of the mean of H's diagonal that is added to it: inputs that were never seen move no weight."""


def round_weights(
    model: OnnxModel, quantization: Quantization, batches: Sequence[Batch], seed: int = 0, threads: int = 1
) -> Quantization:
    """The same quantization with the same scales and weights that are rounded layer by layer.

    Args:
        model: the float model.
        quantization: of that model.
        batches: samples that the result is not judged by.
        seed: which rows of X are used, where there are more than enough.
        threads: intra-op threads.
    """
    written = write(model, quantization)
    exact = {node.name: node for node in model.ir.graph}
    readers: dict[str, list[ir.Node]] = {}
    for node in written.ir.graph:
        if Use(node.name or "", 1) in quantization.weights and node.inputs[0] is not None:
            readers.setdefault(str(node.inputs[0].name), []).append(node)
    weights = dict(quantization.weights)
    rng = np.random.default_rng(seed)
    for name, arrays in walk(written, list(readers), batches, threads):
        for node in readers[name]:
            use = Use(str(node.name), 1)
            rows = _rows(node, weights[use].values.shape, arrays, rng)
            if rows is not None:
                weights[use] = _rounded(exact[node.name], weights[use], rows)
                _store(node, weights[use])
    return replace(quantization, weights=weights)


def _store(node: ir.Node, weight: QuantizedWeight) -> None:
    import onnx_ir as ir

    stored = node.inputs[1].producer().inputs[0]  # type: ignore[union-attr]  # written: a DequantizeLinear
    assert stored is not None
    stored.const_value = ir.tensor(weight.values, name=stored.name)


def _rows(node: ir.Node, shape: tuple[int, ...], arrays: Sequence[Array], rng: np.random.Generator) -> Array | None:
    """float32[rows, groups, inputs of a group]: what the products of a layer read; None where that is not known."""
    if node.op_type in ("MatMul", "Gemm"):
        table = np.concatenate([array.reshape(-1, array.shape[-1]) for array in arrays])
        return table[_some(len(table), rng)][:, None, :]
    padding = node.attributes.get("auto_pad")
    if node.op_type != "Conv" or len(shape) != 4 or (padding is not None and padding.as_string() != "NOTSET"):
        return None
    groups = attribute(node, "group", 1)
    per_batch = -(-_ROWS // len(arrays))
    parts = [_patches(node, shape, array, per_batch, rng) for array in arrays]
    patches = np.concatenate(parts)
    return patches.reshape(len(patches), groups, -1)


def _some(count: int, rng: np.random.Generator, most: int = _ROWS) -> Array:
    return np.arange(count) if count <= most else rng.choice(count, most, replace=False)


def _patches(node: ir.Node, shape: tuple[int, ...], array: Array, most: int, rng: np.random.Generator) -> Array:
    """Some of the patches that a convolution reads, float32[patches, channels, height, width]."""
    top, left, bottom, right = _ints(node, "pads", (0, 0, 0, 0))
    (down, across), (tall, wide) = _ints(node, "strides", (1, 1)), _ints(node, "dilations", (1, 1))
    padded = np.pad(array, ((0, 0), (0, 0), (top, bottom), (left, right)))
    window = ((shape[2] - 1) * tall + 1, (shape[3] - 1) * wide + 1)
    views = np.lib.stride_tricks.sliding_window_view(padded, window, axis=(2, 3))
    views = views[:, :, ::down, ::across, ::tall, ::wide]
    places = _some(views.shape[0] * views.shape[2] * views.shape[3], rng, most)
    sample, row, column = np.unravel_index(places, (views.shape[0], *views.shape[2:4]))
    patches: Array = views[sample, :, row, column]
    return patches


def _ints(node: ir.Node, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    found = node.attributes.get(name)
    return default if found is None else tuple(found.as_ints())


def _rounded(node: ir.Node, stored: QuantizedWeight, rows: Array) -> QuantizedWeight:
    weight = np.moveaxis(operand(node, 1), stored.axis, 0)
    groups, width = rows.shape[1:]
    table = weight.reshape(groups, -1, width).astype(np.float64)
    scales = stored.scale.reshape(groups, -1)
    values = np.stack([_in_turn(table[g], _hessian(rows[:, g]), scales[g].astype(np.float64)) for g in range(groups)])
    shaped = np.moveaxis(values.reshape(weight.shape), 0, stored.axis).astype(np.int8)
    return replace(stored, values=np.ascontiguousarray(shaped))


def _hessian(rows: Array) -> Array:
    table = rows.astype(np.float64)
    hessian: Array = table.T @ table
    diagonal = np.diag(hessian)
    hessian[np.diag_indices_from(hessian)] += _DAMPING * diagonal.mean() + np.where(diagonal == 0, 1e-6, 0)
    return hessian


def _in_turn(weight: Array, hessian: Array, scale: Array) -> Array:
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    values = np.empty_like(weight)
    for k in range(weight.shape[1]):
        values[:, k] = np.clip(np.rint(weight[:, k] / scale), -127, 127)
        error = (weight[:, k] - values[:, k] * scale) / upper[k, k]
        weight[:, k + 1 :] -= error[:, None] * upper[k, k + 1 :]
    return values
