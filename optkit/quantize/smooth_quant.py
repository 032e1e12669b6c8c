"""SmoothQuant: moves the outliers of a product's input channels into its weights, where scales are per channel.

For input channel j of the products that read one tensor X, with weights W, and a strength alpha,

    s[j] = max|X[:, j]| ** alpha / max|W[j, :]| ** (1 - alpha),     X W = (X / s) (s W)

The division is folded into the LayerNormalization before, if all that reads X is smoothed; else it becomes one Mul.
Each tensor gets the alpha whose products, quantized, are nearest to the float ones; where that gains little, none.
After Xiao et al., "SmoothQuant", 2022, where one alpha serves the whole model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from optkit.models import OnnxModel
from optkit.quantize.initializers import add_initializer, drop_unused_initializers, operand
from optkit.quantize.observers import with_probes
from optkit.quantize.placement import Placement
from optkit.quantize.placement.graph import attribute, constant
from optkit.quantize.saturation import pair_reach
from optkit.quantize.scales import Scale, quantize_weight, range_scale
from optkit.targets.base import Int8Policy
from optkit.targets.onnxruntime import open_onnx

if TYPE_CHECKING:
    import onnx_ir as ir

    from optkit.data import Batch

log = logging.getLogger("optkit.quantize")

Array = np.ndarray[Any, Any]

ALPHAS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9)

_ROWS = 64
"""Rows of X of each of the first batches that alphas are compared on."""

_BATCHES_WITH_ROWS = 4

_PAYS = 0.7
"""A product's error must fall below this share of what it was, or the Mul is not worth its time."""


def smooth(
    model: OnnxModel, placement: Placement, policy: Int8Policy, batches: Iterable[Batch], threads: int = 1
) -> OnnxModel:
    """The same function with smoother inputs of its products, or the model itself if none gains.

    Args:
        model: a float model whose nodes have names.
        placement: what will be quantized.
        policy: what the target wants.
        batches: all samples to calibrate on: a channel's outliers are rare.
        threads: intra-op threads.
    """
    groups = _groups(model, placement)
    if not groups:
        return model
    seen = _measure(model, list(groups), batches, threads)
    smoothed = model.clone()
    nodes = {node.name: node for node in smoothed.ir.graph}
    changed = False
    for name, readers in groups.items():
        alpha, factors = _best(seen[name], [nodes[reader] for reader in readers], policy)
        if factors is not None:
            how = _divide(smoothed.ir.graph, [nodes[reader] for reader in readers], factors)
            log.debug("smooth: %s by alpha %s, %s", name, alpha, how)
            changed = True
    drop_unused_initializers(smoothed.ir.graph)
    return smoothed if changed else model


@dataclass(frozen=True)
class _Seen:
    """Of one tensor: the smallest and largest value of every channel, float32[2, channels], and some rows."""

    channels: Array
    rows: Array


def _groups(model: OnnxModel, placement: Placement) -> dict[str, list[str]]:
    """The quantized products by the tensor that they read."""
    groups: dict[str, list[str]] = {}
    placed = {use.node for use in placement.weights}
    for node in model.ir.graph:
        source = node.inputs[0] if node.inputs else None
        if node.name in placed and node.op_type in ("MatMul", "Gemm") and source is not None and source.name:
            groups.setdefault(source.name, []).append(node.name)
    # A tensor that is INT8 everywhere was scaled by whatever writes it
    return {name: readers for name, readers in groups.items() if name not in placement.outputs}


def _measure(model: OnnxModel, names: Sequence[str], batches: Iterable[Batch], threads: int) -> dict[str, _Seen]:
    lows: dict[str, Array] = {}
    highs: dict[str, Array] = {}
    rows: dict[str, list[Array]] = {name: [] for name in names}
    with open_onnx(with_probes(model, names), threads) as runner:
        for index, batch in enumerate(batches):
            values = {**batch.feeds, **runner.view(batch.feeds)}
            for name in names:
                table = values[name].reshape(-1, values[name].shape[-1])
                low, high = table.min(axis=0), table.max(axis=0)
                lows[name], highs[name] = np.minimum(lows.get(name, low), low), np.maximum(highs.get(name, high), high)
                if index < _BATCHES_WITH_ROWS:
                    rows[name].append(table[:: -(-len(table) // _ROWS)].copy())
    return {name: _Seen(np.stack([lows[name], highs[name]]), np.concatenate(rows[name])) for name in names}


def _best(seen: _Seen, readers: Sequence[ir.Node], policy: Int8Policy) -> tuple[float, Array | None]:
    """The alpha with the least error, and its factors; None where smoothing does not pay."""
    weights = [_matrix(reader) for reader in readers]
    exact = [seen.rows @ weight for weight in weights]

    def error(factors: Array) -> float:
        low, high = seen.channels / factors
        rows = _rounded(seen.rows / factors, range_scale(float(low.min()), float(high.max()), policy.symmetric))
        return sum(
            float(np.square(rows @ _rounded_weight(reader, factors, policy) - wanted).sum())
            for reader, wanted in zip(readers, exact, strict=True)
        )

    inputs, outputs = np.abs(seen.channels).max(axis=0), np.abs(np.concatenate(weights, axis=1)).max(axis=1)
    found = {alpha: error(_factors(inputs, outputs, alpha)) for alpha in ALPHAS}
    best = min(found, key=found.__getitem__)
    if found[best] > _PAYS * error(np.ones_like(inputs)):
        return best, None
    return best, _factors(inputs, outputs, best)


def _factors(inputs: Array, outputs: Array, alpha: float) -> Array:
    alive = (inputs > 0) & (outputs > 0)
    factors = np.ones_like(inputs, dtype=np.float64)
    factors[alive] = inputs[alive].astype(np.float64) ** alpha / outputs[alive].astype(np.float64) ** (1 - alpha)
    # What the whole tensor is scaled by does not matter; around 1 it stays far from the ends of float32
    factors[alive] /= np.exp(np.log(factors[alive]).mean()) if alive.any() else 1.0
    return factors.astype(np.float32)


def _matrix(node: ir.Node) -> Array:
    """The weight as float32[inputs, outputs]."""
    weight = operand(node, 1)
    return weight.T if _is_transposed(node) else weight


def _is_transposed(node: ir.Node) -> bool:
    return node.op_type == "Gemm" and attribute(node, "transB", 0) == 1


def _rounded(values: Array, scale: Scale) -> Array:
    lowest, highest = (0, 255) if scale.dtype == "uint8" else (-127, 127)
    stored = np.clip(np.rint(values / scale.scale) + scale.zero_point, lowest, highest)
    real: Array = ((stored - scale.zero_point) * scale.scale).astype(np.float32)
    return real


def _rounded_weight(node: ir.Node, factors: Array, policy: Int8Policy) -> Array:
    weight = _matrix(node) * factors[:, None]
    smallest: Array | float = 0.0
    if policy.sums_in_16_bits:
        smallest = pair_reach(node, weight.T if _is_transposed(node) else weight) / 127
    return quantize_weight(weight, 1, "max", smallest).dequantized


def _divide(graph: ir.Graph, readers: Sequence[ir.Node], factors: Array) -> str:
    """Divide what the readers read by the factors, and multiply their weights by them."""
    source = readers[0].inputs[0]
    assert source is not None  # a group has a tensor that it reads
    norm = source.producer()
    reads = [(use.node, use.idx) for use in source.uses()]
    only_readers = all(node in readers and index == 0 for node, index in reads) and not source.is_graph_output()
    if norm is not None and _takes(norm) and only_readers:
        for index in (1, 2):
            if len(norm.inputs) > index and norm.inputs[index] is not None:
                norm.replace_input_with(
                    index, add_initializer(graph, f"{norm.name}_{index}", operand(norm, index) / factors)
                )
        how = f"folded into {norm.name}"
    else:
        divided = _inserted_mul(graph, source, readers, factors)
        for reader in readers:
            reader.replace_input_with(0, divided)
        how = "with a Mul of its own"
    for reader in readers:
        weight = operand(reader, 1) * (factors[None, :] if _is_transposed(reader) else factors[:, None])
        reader.replace_input_with(1, add_initializer(graph, f"{reader.name}_smoothed", weight))
    return how


def _takes(node: ir.Node) -> bool:
    """Whether a factor per channel of the last axis can be folded into a node's constants."""
    return (
        node.op_type == "LayerNormalization"
        and attribute(node, "axis", -1) == -1
        and all(value is None or constant(value) is not None for value in node.inputs[1:])
    )


def _inserted_mul(graph: ir.Graph, source: ir.Value, readers: Sequence[ir.Node], factors: Array) -> ir.Value:
    import onnx_ir as ir

    inverse = add_initializer(graph, f"{source.name}_smoothing", 1 / factors)
    mul = ir.node("Mul", [source, inverse], num_outputs=1, name=f"{source.name}_smooth")
    smoothed = mul.outputs[0]
    smoothed.name, smoothed.type, smoothed.shape = f"{source.name}_smoothed", source.type, source.shape
    producer = source.producer()
    if producer is not None:
        graph.insert_after(producer, mul)
    else:
        graph.insert_before(graph[0], mul)
    return smoothed
