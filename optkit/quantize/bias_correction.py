"""Sequential bias correction: takes the mean error of every output channel out of the layer's bias.

Rounding a layer's weights and inputs shifts the mean of its outputs, and a network adds the shifts up. For layer l and
output channel c,

    b'[c] = b[c] + mean(y_float[c]) - mean(y_quantized[c])

where y_quantized is what the layer gives in the quantized network whose earlier layers are corrected already. To
correct all layers at once, from errors measured before any was corrected, overshoots and ruins depthwise networks.

Behind a Relu or Clip f the mean of y says little: most of it may come from where f is flat, and what shifts it right
there shifts it wrong where it counts. There the mean of what f writes is made right, to first order:

    b'[c] = b[c] + mean(f(y_float)[c] - f(y_quantized)[c]) / (share of y_float[c] where f is not flat)

After Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019, section 4.2.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from optkit.models import OnnxModel
from optkit.quantize.placement.draft import RECURRENT, Placement, Use
from optkit.quantize.placement.graph import after_activation, constant, only_consumer
from optkit.quantize.qdq import Quantization, write
from optkit.quantize.walk import walk
from optkit.targets.base import Int8Policy

if TYPE_CHECKING:
    import onnx_ir as ir

    from optkit.data import Batch

Array = np.ndarray[Any, Any]

_EVERYWHERE = (-math.inf, math.inf)

_LEAST_SHARE = 0.01
"""Added to the share where an activation is not flat: what a channel shows in a few places moves it little."""


def correct_biases(
    model: OnnxModel, quantization: Quantization, policy: Int8Policy, batches: Sequence[Batch], threads: int = 1
) -> Quantization:
    """The same quantization with the bias of every weighted layer corrected.

    Every node of the float and of the quantized graph runs once over the samples.

    Args:
        model: the float model.
        quantization: of that model.
        policy: what the target wants.
        batches: 16 to 64 samples that the result is not judged by.
        threads: intra-op threads.
    """
    biases = BiasCorrection(model, quantization)
    as_float = walk(model, biases.stops, batches, threads)
    as_int8 = walk(write(model, quantization), biases.stops, batches, threads)
    for (name, exact), (_, measured) in zip(as_float, as_int8, strict=True):
        biases.correct(name, exact, measured)
    return biases.added_to(quantization, policy)


class BiasCorrection:
    """The corrected biases of a quantization, gathered during a walk.

    Attributes:
        stops: the tensors with a bias in them, where a walk must stop.
    """

    def __init__(self, model: OnnxModel, quantization: Quantization) -> None:
        sums = [found for use in quantization.weights if (found := _sum(model, use.node)) is not None]
        self._layers = {layer.output: layer for layer in sums}
        self._biases = dict(quantization.biases)
        self.stops = list(self._layers)

    def correct(self, name: str, exact: Sequence[Array], measured: Sequence[Array]) -> None:
        """Take the mean error of a tensor into its bias, and out of what was measured: what follows reads that.

        Args:
            name: one of the stops.
            exact: the tensor in the float network, one array per batch.
            measured: in the quantized one; edited.
        """
        layer = self._layers[name]
        shift = _shift(exact, measured, layer.axis, layer.active)
        self._biases[layer.node] = (self._biases.get(layer.node, layer.bias) + shift).astype(np.float32)
        for array in measured:
            array += shift.astype(np.float32).reshape([-1] + [1] * (array.ndim - 1 - layer.axis))

    def added_to(self, quantization: Quantization, policy: Int8Policy) -> Quantization:
        """The quantization with these biases."""
        placement = _with_biases(quantization, self._layers.values(), policy)
        return replace(quantization, placement=placement, biases=self._biases)


@dataclass(frozen=True)
class _Sum:
    """Where a weighted layer's bias is added.

    Attributes:
        node: the layer itself, or the Add behind a MatMul.
        output: the tensor with the bias in it.
        axis: the channels of that tensor.
        bias: what is added so far, zero if nothing is.
        weighted: whether ``node`` is the layer itself.
        active: the range where the activation behind it, if there is one, is not flat.
    """

    node: str
    output: str
    axis: int
    bias: Array
    weighted: bool
    active: tuple[float, float]


def _sum(model: OnnxModel, name: str) -> _Sum | None:
    """None for a product whose bias is nowhere to be found, and for an LSTM, whose biases are inside."""
    node = model.ir.graph.node(name)
    if node.op_type in RECURRENT:
        return None
    if node.op_type == "MatMul":
        return _sum_behind(node)
    bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    axis = 1 if node.op_type != "Gemm" else _last_axis(node)
    values = np.zeros(1, np.float32) if bias is None else bias.numpy()
    return _Sum(name, str(node.outputs[0].name), axis, values, True, _active(node.outputs[0]))


def _sum_behind(matmul: ir.Node) -> _Sum | None:
    add = only_consumer(matmul.outputs[0])
    if add is None or add.op_type != "Add" or add.name is None or matmul.outputs[0].shape is None:
        return None
    biases = [tensor.numpy() for value in add.inputs if (tensor := constant(value)) is not None]
    if len(biases) != 1 or biases[0].ndim > 1:
        return None
    total = add.outputs[0]
    return _Sum(add.name, str(total.name), _last_axis(matmul), biases[0], False, _active(total))


def _active(value: ir.Value) -> tuple[float, float]:
    activated = after_activation(value)
    activation = activated.producer()
    if activated is value or activation is None:
        return _EVERYWHERE
    bounds = [constant(bound) for bound in activation.inputs[1:]]
    highest = bounds[1] if len(bounds) > 1 else None
    return 0.0, math.inf if highest is None else float(highest.numpy().item())


def _last_axis(node: ir.Node) -> int:
    shape = node.outputs[0].shape
    return 1 if shape is None else len(shape) - 1


def _shift(exact: Sequence[Array], measured: Sequence[Array], axis: int, active: tuple[float, float]) -> Array:
    """What to add to each channel so that the mean behind the activation is right."""
    others = tuple(i for i in range(exact[0].ndim) if i != axis)
    count = sum(array.size // array.shape[axis] for array in exact)
    written = ((np.clip(array, *active) for array in arrays) for arrays in (exact, measured))
    wanted, found = (sum(array.sum(axis=others, dtype=np.float64) for array in arrays) for arrays in written)
    shift: Array = (wanted - found) / count
    if active != _EVERYWHERE:
        moves = sum(((active[0] < array) & (array < active[1])).sum(axis=others) for array in exact)
        shift /= moves / count + _LEAST_SHARE
    return shift


def _with_biases(quantization: Quantization, layers: Iterable[_Sum], policy: Int8Policy) -> Placement:
    """A layer that had no bias gets one, and the target may want it as INT32."""
    placement = quantization.placement
    if policy.bias != "int32":
        return placement
    static = (layer.node for layer in layers if layer.weighted and layer.node not in placement.dynamic)
    return replace(placement, biases=placement.biases | {Use(node, 2) for node in static})
