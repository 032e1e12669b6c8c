"""Ranks the INT8 layers of a network by the error that each adds: one is left in float, everything else stays INT8.

For node n and the signal to quantization noise ratio of the model's outputs on held-out samples,

    gain(n) = SQNR(all in INT8 but n) - SQNR(all in INT8)    [dB]

To restore one node is what a rollback would do, so its interplay with the other nodes counts, which is lost where one
node alone is quantized. Every scale is that of the full quantization. Gains do not add up: the errors of layers may
cancel out, and then a gain is negative.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from optkit.context import Context
from optkit.errors import PreconditionError
from optkit.models import OnnxModel, Signature
from optkit.quantize.calibration import Calibration, Split, choose
from optkit.quantize.measure import Judge, decibels
from optkit.quantize.observers import observe
from optkit.quantize.placement import name_nodes, place
from optkit.quantize.placement.graph import constant
from optkit.quantize.qdq import Quantization, write
from optkit.quantize.scales import WeightMethod
from optkit.targets.base import Int8Policy

if TYPE_CHECKING:
    import onnx_ir as ir

    from optkit.data import Batch

JUDGED = 16
"""Most samples that a node is judged by: ranks need fewer than decisions do."""

_LEAST_SQNR = -200.0
"""Stands for outputs that are not finite; JSON has no infinity."""


@dataclass(frozen=True)
class NodeSensitivity:
    """What it brings to leave one node in float.

    Attributes:
        name: the node.
        op: its type.
        macs: multiplications for one sample, dynamic dimensions at their ``opt``; None where shapes are not known.
        sqnr_db_without: SQNR of the outputs with everything but this node in INT8.
        gain_db: how much more that is than with this node in INT8 too.
    """

    name: str
    op: str
    macs: int | None
    sqnr_db_without: float
    gain_db: float


@dataclass(frozen=True)
class Sensitivity:
    """The ranking of a model's INT8 layers.

    Attributes:
        sqnr_db: SQNR of the outputs with all of them in INT8.
        samples: how many samples judged.
        nodes: the layers, the one that gains the most first.
    """

    sqnr_db: float
    samples: int
    nodes: tuple[NodeSensitivity, ...]


def sensitivity(
    model: OnnxModel,
    policy: Int8Policy,
    context: Context,
    settings: Calibration,
    weights: WeightMethod = "max",
    exclude: Sequence[str] = (),
) -> Sensitivity:
    """Measure what each INT8 layer costs.

    The samples are calibration samples. All but a few are observed, and those few judge; with less than two batches
    the same samples do both. Each layer costs one run over at most ``JUDGED`` samples.

    Args:
        model: a float model; it is not changed.
        policy: what the target wants.
        context: its data, threads and progress bar are used.
        settings: how ranges are found, and from how many samples.
        weights: how ranges of weights are found.
        exclude: names or patterns of nodes that are in float anyway.

    Raises:
        PreconditionError: there is no data, nothing to quantize, or no float output to compare.
        DataError: the calibration split is empty or does not fit the model.
    """
    if not any(spec.dtype.startswith("float") for spec in model.signature.outputs):
        raise PreconditionError(
            "sensitivity compares float outputs, and this model has none: cut it before what rounds or picks (ArgMax)"
        )
    named = model.clone()
    name_nodes(named)
    placement = place(named, policy, exclude)
    if not placement.weights:
        raise PreconditionError("nothing to rank: the target's INT8 takes no layer of this model")
    samples = Split(holds_out=True)
    batches = context.progress(samples.observe(_batches(named, context, settings)), "calibrating")
    statistics = observe(named, placement.observed, batches, context.threads)
    judged = _few(samples.held_out or samples.first)
    full, _ = choose(named, placement, statistics, policy, settings, weights, judged, context.threads)
    judge = Judge(named, judged, policy, context.threads)
    all_int8 = _sqnr(judge, named, full)
    ranked: list[NodeSensitivity] = []
    for name in context.progress([use.node for use in full.weights], "leaving one layer in float"):
        node = named.ir.graph.node(name)
        without = _sqnr(judge, named, _restored(named, full, policy, (*exclude, name)))
        gain = round(without - all_int8, 2)
        ranked.append(NodeSensitivity(name, node.op_type, _macs(node, named.signature), round(without, 2), gain))
    ranked.sort(key=lambda node: node.gain_db, reverse=True)
    return Sensitivity(round(all_int8, 2), sum(map(len, judged)), tuple(ranked))


def _batches(model: OnnxModel, context: Context, settings: Calibration) -> Iterator[Batch]:
    if context.data is None:
        raise PreconditionError("sensitivity needs data: name a data spec with --data")
    front = model.signature.inputs[0].shape[:1]
    # A model with a fixed batch cannot take the rest that does not fill one
    fixed = front[0] if front and isinstance(front[0], int) and model.signature.batch is None else None
    size = fixed or min(settings.batch_size, JUDGED)
    for batch in context.data.batches("calibration", size, max(settings.samples, size)):
        if fixed is None or len(batch) == fixed:
            yield batch


def _few(batches: Sequence[Batch]) -> list[Batch]:
    few: list[Batch] = []
    for batch in batches:
        if sum(map(len, few)) < JUDGED:
            few.append(batch)
    return few


def _sqnr(judge: Judge, model: OnnxModel, quantization: Quantization) -> float:
    return max(_LEAST_SQNR, decibels(judge.error(write(model, quantization))))


def _restored(model: OnnxModel, full: Quantization, policy: Int8Policy, exclude: Sequence[str]) -> Quantization:
    """The same quantization without some nodes. To exclude a node only takes away, so nothing is found anew."""
    placement = place(model, policy, exclude)
    return replace(full, placement=placement, weights={use: full.weights[use] for use in placement.weights})


def _macs(node: ir.Node, signature: Signature) -> int | None:
    """Every weight is used once for each position: of the output, or of the input that ConvTranspose spreads."""
    weight = constant(node.inputs[1])
    value = node.inputs[0] if node.op_type == "ConvTranspose" else node.outputs[0]
    if weight is None or value is None or value.shape is None:
        return None
    sizes = signature.sizes(**({signature.batch: 1} if signature.batch else {}))
    dims = [dim if isinstance(dim, int) else sizes.get(str(dim.value)) for dim in value.shape]
    del dims[1 if node.op_type.startswith("Conv") else -1]  # channels
    known = [dim for dim in dims if dim is not None]
    return math.prod(known) * math.prod(weight.numpy().shape) if len(known) == len(dims) else None
