"""Activation statistics in one streaming pass: exact ranges, and histograms on grids that merge exactly.

A histogram's bins have a width of 2**e and edges at its multiples. When the range grows past the capacity, e grows
and neighbours merge; nothing is ever split, so the histogram depends on the samples and not on their order or on how
they were batched, and two histograms add up without interpolation.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from optkit.errors import DataError, PassError, UsageError
from optkit.models import Feeds, OnnxModel
from optkit.targets.onnxruntime import OrtRunner, open_onnx

if TYPE_CHECKING:
    from optkit.data import Batch

log = logging.getLogger("optkit.quantize")

Array = np.ndarray[Any, Any]

CAPACITY = 4096
"""Most bins of a histogram. Doubling the width halves the bins in use, so at least 2048 are used after that."""

COUNTED = 1 << 15
"""Most elements of one tensor of one batch that are binned. More are thinned evenly; ranges always see all of them."""

FEW_SAMPLES = 32


@dataclass(frozen=True)
class Statistics:
    """What was seen of one tensor.

    Attributes:
        low: smallest value.
        high: largest value.
        exponent: the bins are 2**exponent wide.
        start: bin i reaches from (start + i) to (start + i + 1) widths.
        counts: int64[bins].
        channels: smallest and largest value of each channel of the last axis, float32[2, channels], if asked for.
    """

    low: float
    high: float
    exponent: int
    start: int
    counts: Array
    channels: Array | None = None

    @property
    def width(self) -> float:
        """The width of a bin."""
        return math.ldexp(1.0, self.exponent)

    @property
    def centers(self) -> Array:
        """The middle of every bin, never outside of what was seen; float64[bins]."""
        middles = (self.start + np.arange(len(self.counts)) + 0.5) * self.width
        clipped: Array = np.clip(middles, self.low, self.high)
        return clipped

    def merge(self, other: Statistics) -> Statistics:
        """The statistics of both tensors together, as if they were one."""
        low, high = min(self.low, other.low), max(self.high, other.high)
        exponent = _exponent(low, high)
        start, stop = _bin(low, exponent), _bin(high, exponent) + 1
        counts = np.zeros(stop - start, np.int64)
        for part in (self, other):
            _add(counts, start, part.counts, part.start, exponent - part.exponent)
        return Statistics(low, high, exponent, start, counts, _merged_channels(self.channels, other.channels))


class Observer:
    """Gathers the statistics of one tensor, batch by batch, in constant memory."""

    def __init__(self, channels: bool = False) -> None:
        self._seen: Statistics | None = None
        self._channels = channels

    def update(self, array: Array) -> None:
        """Take in one batch.

        Raises:
            FloatingPointError: the array holds NaN or infinity, or nothing at all.
        """
        seen = _statistics(array, self._channels)
        self._seen = seen if self._seen is None else self._seen.merge(seen)

    def statistics(self) -> Statistics:
        """Everything seen so far.

        Raises:
            DataError: nothing was.
        """
        if self._seen is None:
            raise DataError("the calibration split is empty: it has no samples to observe")
        return self._seen


def observe(
    model: OnnxModel, names: Iterable[str], batches: Iterable[Batch], threads: int = 1, channels: Iterable[str] = ()
) -> dict[str, Statistics]:
    """Run the model over the batches once and gather the statistics of the named tensors.

    Args:
        model: a float model; it is not changed.
        names: float tensors of the main graph.
        batches: calibration samples.
        threads: intra-op threads of the runtime.
        channels: tensors whose last axis is also observed channel by channel.

    Raises:
        DataError: there is no sample, or one does not fit the signature.
        PassError: a tensor is NaN or infinite; the message names it and its node.
    """
    wanted = sorted(set(names))
    by_channel = set(channels)
    observers = {name: Observer(name in by_channel) for name in wanted}
    probed = with_probes(model, wanted)
    count = 0
    with open_onnx(probed, threads) as runner:
        for batch in batches:
            values = {**batch.feeds, **values_of(runner, batch)}
            for name in wanted:
                try:
                    observers[name].update(values[name])
                except FloatingPointError as error:
                    raise PassError(_origin(name, model, str(error), count)) from error
            count += len(batch)
    if count == 0:
        raise DataError("the calibration split is empty: give it samples, or another split")
    if count < FEW_SAMPLES:
        log.warning("calibrating on %d samples only: ranges will be rough, %d or more are advised", count, FEW_SAMPLES)
    return {name: observer.statistics() for name, observer in observers.items()}


def with_probes(model: OnnxModel, names: Iterable[str]) -> OnnxModel:
    """The same model with the named tensors as further outputs of its graph."""
    probed = model.clone()
    graph = probed.ir.graph
    present = {value.name for value in (*graph.inputs, *graph.outputs)}
    values = {value.name: value for node in graph for value in node.outputs}
    graph.outputs.extend(values[name] for name in names if name not in present)
    return probed


def values_of(runner: OrtRunner, batch: Batch) -> Feeds:
    """What a model with probes writes for a batch of calibration samples; views, to be read before the next batch.

    Raises:
        DataError: the batch does not fit the model.
    """
    try:
        return runner.view(batch.feeds)
    except UsageError as error:
        raise DataError(f"the samples do not fit the model: {error}: mend the data spec") from error


def _origin(name: str, model: OnnxModel, problem: str, count: int) -> str:
    producer = next((node.name for node in model.ir.graph if any(v.name == name for v in node.outputs)), None)
    where = f"the output of node {producer!r}" if producer else "an input"
    return (
        f"calibration: tensor {name!r}, {where}, {problem} in the batch after sample {count}: "
        "look for broken weights or samples there"
    )


def _statistics(array: Array, channels: bool) -> Statistics:
    flat = np.ascontiguousarray(array, np.float32).reshape(-1)
    if flat.size == 0:
        raise FloatingPointError("is empty")
    low, high = float(flat.min()), float(flat.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise FloatingPointError("is not finite (NaN or infinity)")
    exponent = _exponent(low, high)
    start, stop = _bin(low, exponent), _bin(high, exponent) + 1
    # A power of two: the product is exact (denormals aside), so an element's bin does not depend on its batch
    index = np.floor(_thinned(flat) * np.float32(math.ldexp(1.0, -exponent))).astype(np.int64)
    counts = np.bincount(index - start, minlength=stop - start)
    return Statistics(low, high, exponent, start, counts, _channel_ranges(array) if channels else None)


def _channel_ranges(array: Array) -> Array:
    rows = array.reshape(-1, array.shape[-1])
    return np.stack([rows.min(axis=0), rows.max(axis=0)])


def _merged_channels(one: Array | None, other: Array | None) -> Array | None:
    if one is None or other is None:
        return None
    return np.stack([np.minimum(one[0], other[0]), np.maximum(one[1], other[1])])


def _thinned(flat: Array) -> Array:
    step = -(-flat.size // COUNTED)
    if step == 1:
        return flat
    # A step that shares no factor with the size walks through all rows and channels alike
    while math.gcd(step, flat.size) != 1:
        step += 1
    return flat[::step]


def _bin(value: float, exponent: int) -> int:
    return math.floor(math.ldexp(value, -exponent))


def _exponent(low: float, high: float) -> int:
    """The smallest e whose bins hold the range within the capacity, and within float32's exact integers."""
    reach = max(abs(low), abs(high))
    # Below 2**-100 nothing is worth a bin of its own, and a tensor of zeros needs some width
    exponent = max(-100, math.frexp(reach)[1] - 22) if reach else -100
    if high > low:
        # Narrower bins cannot hold the range; that wide, one too many may begin
        exponent = max(exponent, math.frexp((high - low) / CAPACITY)[1] - 1)
    while _bin(high, exponent) - _bin(low, exponent) >= CAPACITY:
        exponent += 1
    return exponent


def _add(counts: Array, start: int, part: Array, part_start: int, shift: int) -> None:
    """Add a part's counts, 2**shift of its bins to one, to counts that begin at bin ``start``."""
    if shift == 0:
        counts[part_start - start : part_start - start + len(part)] += part
        return
    index = ((part_start + np.arange(len(part))) >> shift) - start
    counts += np.bincount(index, weights=part, minlength=len(counts)).astype(np.int64)
