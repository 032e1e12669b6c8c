"""Cross-layer equalization: channels of a tensor with one scale are brought to like ranges by the layers around it.

A tensor X that is quantized with one scale for all channels spends most levels on its largest channel. Where what is
between the layers that write X and those that read it is positively homogeneous, f(s x) = s f(x) for s > 0 (Relu,
poolings, additions of such tensors), channel c is divided by s[c] where it is written, and multiplied where it is read:

    s[c] = max|X[c]| ** alpha / max|W[c]| ** (1 - alpha)        W[c]: the weights that read channel c

Writers have a scale per output channel, so that costs them nothing; readers share scales among their inputs, which is
what alpha weighs, unless they are depthwise. After Nagel et al., "Data-Free Quantization Through Weight Equalization
and Bias Correction", 2019, section 4.1, with SmoothQuant's weighing of activations against weights.

A bounded Clip (ReLU6) is not homogeneous: its bound would have to differ by channel. To keep the bound, and let it cut
where samples never reached, holds on the samples and loses 10 dB on others (EfficientNet-Lite0): it is declined.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from optkit.models import OnnxModel
from optkit.quantize.initializers import add_initializer, drop_unused_initializers, operand
from optkit.quantize.observers import values_of, with_probes
from optkit.quantize.placement import Placement
from optkit.quantize.placement.graph import attribute, constant, weight_axis, weight_problem
from optkit.quantize.rows import as_table, from_table
from optkit.targets.onnxruntime import open_onnx

if TYPE_CHECKING:
    import onnx_ir as ir

    from optkit.data import Batch

log = logging.getLogger("optkit.quantize")

Array = np.ndarray[Any, Any]

ALPHA = 0.6

_HOMOGENEOUS = frozenset(
    {"Add", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Identity", "LeakyRelu", "MaxPool", "Relu", "Sum"}
)
_REDUCES = frozenset({"ReduceMax", "ReduceMean", "ReduceSum"})
_MOVES = frozenset({"Flatten", "Reshape", "Squeeze"})
"""Ops that keep channels where they are if there is one value of each."""

_MOST = 8.0
"""How far a channel's factor may be from 1: samples that never excite a channel say nothing about its range."""


def equalize(model: OnnxModel, placement: Placement, batches: Sequence[Batch], threads: int = 1) -> OnnxModel:
    """The same function with channels of like ranges, or the model itself if no tensor can be equalized.

    Args:
        model: a float model whose nodes have names and whose graph is sorted.
        placement: what will be quantized.
        batches: some samples; the function stays the same whatever they are.
        threads: intra-op threads.
    """
    groups = [group for group in _groups(model.ir.graph) if group.quantized(placement)]
    if not groups:
        return model
    reach = _reach(model, [name for group in groups for name in group.quantized(placement)], batches, threads)
    constants = _Constants()
    for group in groups:
        largest = np.max([reach[name] for name in group.quantized(placement)], axis=0)
        factors = constants.factors(group, largest)
        log.debug("equalize: %s by %.3g to %.3g", group.quantized(placement), factors.min(), factors.max())
        constants.divide(group, factors)
    return constants.written_to(model)


@dataclass
class _Group:
    """Tensors with the same channels, and the layers that write and read them.

    Attributes:
        tensors: values of the graph.
        writers: whose outputs are such tensors.
        readers: whose first inputs are.
        obstacle: a node that is neither and would not commute with a factor, or what else is in the way.
    """

    tensors: list[ir.Value] = field(default_factory=list)
    writers: list[ir.Node] = field(default_factory=list)
    readers: list[ir.Node] = field(default_factory=list)
    obstacle: str | None = None

    def quantized(self, placement: Placement) -> list[str]:
        """Names of those that calibration looks at."""
        return [str(value.name) for value in self.tensors if value.name in placement.observed]


def _groups(graph: ir.Graph) -> Iterator[_Group]:
    """Those that can be equalized."""
    found = _Finder(graph).groups()
    for group in found:
        if group.writers and group.readers and group.obstacle is None and _fits(group):
            yield group
        elif group.writers:
            names = ", ".join(str(node.name) for node in group.writers)
            log.debug(
                "equalize: what %s writes stays as it is: %s", names, group.obstacle or "nothing fits that reads it"
            )


class _Finder:
    """Joins tensors that must have the same factors, node by node."""

    def __init__(self, graph: ir.Graph) -> None:
        self._of: dict[ir.Value, _Group] = {}
        for value in graph.inputs:
            self._group(value).obstacle = "it is an input of the model"
        for node in graph:
            self._visit(node)
        for value in graph.outputs:
            self._group(value).obstacle = "it is an output of the model"
        for value in list(self._of):
            if any(use.node.graph is not graph for use in value.uses()):
                self._group(value).obstacle = f"{value.name} is read inside of an If, Loop or Scan"

    def groups(self) -> list[_Group]:
        """Every group once, in the order of the graph."""
        return list({id(group): group for group in self._of.values()}.values())

    def _group(self, value: ir.Value) -> _Group:
        return self._of.setdefault(value, _Group([value]))

    def _visit(self, node: ir.Node) -> None:
        inputs = [value for value in node.inputs if value is not None and constant(value) is None]
        if _is_layer(node):
            self._group(node.outputs[0]).writers.append(node)
            self._group(inputs[0]).readers.append(node)
        elif _is_homogeneous(node, inputs):
            for value in inputs:
                self._join(value, node.outputs[0])
        else:
            for value in (*inputs, *node.outputs):
                self._group(value).obstacle = f"{node.name} ({node.op_type}) is not positively homogeneous"

    def _join(self, one: ir.Value, other: ir.Value) -> None:
        kept, gone = self._group(one), self._group(other)
        if kept is gone:
            return
        kept.tensors += gone.tensors
        kept.writers += gone.writers
        kept.readers += gone.readers
        kept.obstacle = kept.obstacle or gone.obstacle
        self._of.update(dict.fromkeys(gone.tensors, kept))


def _is_layer(node: ir.Node) -> bool:
    """A convolution or Gemm whose constants can be scaled by channel."""
    return node.op_type in ("Conv", "Gemm") and weight_problem(node) is None


def _is_homogeneous(node: ir.Node, inputs: Sequence[ir.Value]) -> bool:
    """In each channel of its own: f(s x) = s f(x) for every s > 0."""
    if node.op_type in _REDUCES:
        axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
        return axes is not None and attribute(node, "keepdims", 1) == 1 and bool((axes.numpy() > 1).all())
    if node.op_type in _MOVES:
        # [batch, channels, 1, 1] to [batch, channels], or nothing moves
        before, after = _sizes(inputs[0]), _sizes(node.outputs[0])
        if before is None or after is None:
            return False
        return before == after or (before[0] == after[0] and {*before[1:], *after[1:]} <= {1})
    constants = len([value for value in node.inputs if value is not None]) - len(inputs)
    channels = {sizes[0] for value in inputs if (sizes := _sizes(value)) is not None}
    return node.op_type in _HOMOGENEOUS and constants == 0 and len(channels) == 1


def _sizes(value: ir.Value) -> tuple[object, ...] | None:
    """A shape from its channels on."""
    return None if value.shape is None or len(value.shape) < 2 else tuple(value.shape)[1:]


def _fits(group: _Group) -> bool:
    written = {operand(node, 1).shape[weight_axis(node)] for node in group.writers}
    return len(written | {_channels_read(node) * _groups_of(node) for node in group.readers}) == 1


def _channels_read(node: ir.Node) -> int:
    """By each output of a layer."""
    return int(operand(node, 1).shape[1 - weight_axis(node)])


def _groups_of(node: ir.Node) -> int:
    return attribute(node, "group", 1) if node.op_type == "Conv" else 1


def _reach(model: OnnxModel, names: Sequence[str], batches: Sequence[Batch], threads: int) -> Mapping[str, Array]:
    """The largest absolute value of every channel."""
    largest: dict[str, Array] = {}
    with open_onnx(with_probes(model, names), threads) as runner:
        for batch in batches:
            values = values_of(runner, batch)
            for name in names:
                array = np.moveaxis(values[name], 1, 0)
                seen = np.abs(array.reshape(len(array), -1)).max(axis=1)
                largest[name] = np.maximum(largest.get(name, seen), seen)
    return largest


class _Constants:
    """Weights and biases as they become; a layer's change twice if it reads one group and writes another."""

    def __init__(self) -> None:
        self._arrays: dict[tuple[str, int], Array] = {}

    def factors(self, group: _Group, largest: Array) -> Array:
        """What to divide each channel by, given its largest absolute value; float64[channels]."""
        weights = np.max([self._reach(node) for node in group.readers], axis=0)
        # A reader that is depthwise has a scale for each channel
        alpha = 1.0 if all(_channels_read(node) == 1 for node in group.readers) else ALPHA
        alive = (largest > 0) & (weights > 0)
        factors = np.ones(len(largest))
        factors[alive] = largest[alive].astype(np.float64) ** alpha / weights[alive] ** (1 - alpha)
        # What all channels are scaled by together does not matter
        factors[alive] /= np.exp(np.log(factors[alive]).mean()) if alive.any() else 1.0
        return np.clip(factors, 1 / _MOST, _MOST)

    def divide(self, group: _Group, factors: Array) -> None:
        """Divide what the group's writers write by the factors, and multiply it where it is read."""
        for node in group.writers:
            table = as_table(node, self._get(node, 1))
            self._arrays[str(node.name), 1] = self._weight(node, table / factors.reshape(*table.shape[:2], 1))
            if len(node.inputs) > 2 and node.inputs[2] is not None:
                self._arrays[str(node.name), 2] = self._get(node, 2) / factors
        for node in group.readers:
            split = self._by_channel(node)
            self._arrays[str(node.name), 1] = self._weight(node, split * factors.reshape(len(split), 1, 1, -1))

    def written_to(self, model: OnnxModel) -> OnnxModel:
        """The model with these constants."""
        equalized = model.clone()
        graph = equalized.ir.graph
        for (name, index), array in self._arrays.items():
            stored = add_initializer(graph, f"{name}_equalized_{index}", array.astype(np.float32))
            graph.node(name).replace_input_with(index, stored)
        drop_unused_initializers(graph)
        return equalized

    def _reach(self, node: ir.Node) -> Array:
        """The largest weight that reads each channel."""
        reach: Array = np.abs(self._by_channel(node)).max(axis=(1, 2)).reshape(-1)
        return reach

    def _by_channel(self, node: ir.Node) -> Array:
        """The weight as [groups, outputs of a group, places of the kernel, channels of a group]."""
        table = as_table(node, self._get(node, 1))
        return table.reshape(*table.shape[:2], -1, _channels_read(node))

    def _get(self, node: ir.Node, index: int) -> Array:
        found = self._arrays.get((str(node.name), index))
        return operand(node, index).astype(np.float64) if found is None else found

    def _weight(self, node: ir.Node, table: Array) -> Array:
        return from_table(node, table, operand(node, 1).shape)
