"""Ranks the INT8 layers of a network by the error that each adds: one is left in float, everything else stays INT8.

For node n and the signal to quantization noise ratio of the model's outputs on held-out samples,

    gain(n) = SQNR(all in INT8 but n) - SQNR(all in INT8)    [dB]

To restore one node is what a rollback would do, so its interplay with the other nodes counts, which is lost where one
node alone is quantized. Every scale is that of the full quantization. Gains do not add up: the errors of layers may
cancel out, and then a gain is negative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from optkit.context import Context
from optkit.errors import PreconditionError
from optkit.quantize.calibrated import Calibrated
from optkit.quantize.macs import macs
from optkit.quantize.measure import Judge, decibels
from optkit.quantize.qdq import write

if TYPE_CHECKING:
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


def sensitivity(calibrated: Calibrated, context: Context, exclude: Sequence[str] = ()) -> Sensitivity:
    """Measure what each INT8 layer costs, on at most ``JUDGED`` held-out samples; each layer takes one run over them.

    Args:
        calibrated: a float model with the scales of its INT8 layers (``QuantizeInt8.calibrated``); it is not changed.
        context: its threads and progress bar are used.
        exclude: names or patterns of nodes that are in float anyway.

    Raises:
        PreconditionError: there is no float output to compare.
    """
    model = calibrated.model
    if not any(spec.dtype.startswith("float") for spec in model.signature.outputs):
        raise PreconditionError(
            "sensitivity compares float outputs, and this model has none: cut it before what rounds or picks (ArgMax)"
        )
    judged = _few(calibrated.held_out)
    judge = Judge(model, judged, calibrated.policy, context.threads)
    all_int8 = _sqnr(judge, calibrated)
    ranked: list[NodeSensitivity] = []
    for name in context.progress([use.node for use in calibrated.quantization.weights], "leaving one layer in float"):
        node = model.ir.graph.node(name)
        without = _sqnr(judge, calibrated.without((*exclude, name)))
        gain = round(without - all_int8, 2)
        ranked.append(NodeSensitivity(name, node.op_type, macs(node, model.signature), round(without, 2), gain))
    ranked.sort(key=lambda node: node.gain_db, reverse=True)
    return Sensitivity(round(all_int8, 2), sum(map(len, judged)), tuple(ranked))


def _few(batches: Sequence[Batch]) -> list[Batch]:
    few: list[Batch] = []
    for batch in batches:
        if sum(map(len, few)) < JUDGED:
            few.append(batch)
    return few


def _sqnr(judge: Judge, calibrated: Calibrated) -> float:
    return max(_LEAST_SQNR, decibels(judge.error(write(calibrated.model, calibrated.quantization))))
