"""From the statistics of one pass to the scale of every tensor, by a method or by the one that measures best."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from pydantic import Field

from optkit.documents import Strict
from optkit.models import OnnxModel
from optkit.quantize.measure import Judge, decibels, ranking
from optkit.quantize.observers import Statistics
from optkit.quantize.placement import Placement
from optkit.quantize.qdq import Quantization, quantize_weights, write
from optkit.quantize.scales import RangeMethod, Scale, WeightMethod, activation_scale
from optkit.targets.base import Int8Policy
from optkit.tunable import Tunable

if TYPE_CHECKING:
    from optkit.data import Batch

log = logging.getLogger("optkit.quantize")

Method: TypeAlias = RangeMethod | Literal["auto"]

_AS_GOOD_DB = 0.5
_EVERY = 4
_MOST_HELD_OUT, _MOST_FIRST = 32, 64


class Calibration(Strict):
    """How ranges are found."""

    method: Annotated[Method, Tunable()] = "auto"
    """``max``, ``percentile``, ``entropy``, ``mse``, or ``auto``: the one with the least error on held-out samples."""
    percentile: Annotated[float, Tunable(choices=(99.9, 99.99, 99.999, 99.9999))] = Field(default=99.999, gt=50, le=100)
    """Of the method ``percentile``."""
    samples: Annotated[int, Tunable(choices=(64, 128, 256, 512, 1024))] = Field(default=512, ge=1)
    """How many samples of the calibration split."""
    batch_size: int = Field(default=32, ge=1)
    """How many samples are run at a time at most; fewer where their tensors would take more than 64 MiB."""
    ranges: str | None = None
    """A bundle, or a ``ranges.json``, whose ranges are used again instead of observing; it must have been made from the
    same model, samples and settings. Relative to the recipe."""

    def candidates(self) -> tuple[tuple[RangeMethod, float], ...]:
        """The methods to choose from, with their percentiles; as a rule each clips more than the one before it."""
        if self.method != "auto":
            return ((self.method, self.percentile),)
        return (
            ("max", self.percentile),
            ("percentile", 99.999),
            ("mse", self.percentile),
            ("percentile", 99.99),
            ("entropy", self.percentile),
        )


@dataclass
class Split:
    """Parts the calibration samples: most are observed, one batch of four, up to 32 samples, is held out to choose by.

    Attributes:
        holds_out: whether any are held out.
        observed: how many samples were passed on so far.
        held_out: the batches that were not.
        first: the first of the observed ones, up to 64 samples, for algorithms that need tensors and not ranges.
    """

    holds_out: bool
    observed: int = 0
    held_out: list[Batch] = field(default_factory=list)
    first: list[Batch] = field(default_factory=list)

    def observe(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches to observe."""
        for index, batch in enumerate(batches):
            if self.holds_out and index % _EVERY == 1 and sum(map(len, self.held_out)) < _MOST_HELD_OUT:
                self.held_out.append(batch)
            else:
                if sum(map(len, self.first)) < _MOST_FIRST:
                    self.first.append(batch)
                self.observed += len(batch)
                yield batch

    def read_ahead(self, stream: Iterator[Batch]) -> list[Batch]:
        """What ``observe`` gives until there are as many first samples, and as many held out, as there will be."""
        ahead: list[Batch] = []
        held_out = _MOST_HELD_OUT if self.holds_out else 0
        while sum(map(len, self.first)) < _MOST_FIRST or sum(map(len, self.held_out)) < held_out:
            batch = next(stream, None)
            if batch is None:
                break
            ahead.append(batch)
        return ahead


def scales(
    placement: Placement,
    statistics: Mapping[str, Statistics],
    policy: Int8Policy,
    method: RangeMethod,
    percentile: float = 99.999,
) -> dict[str, Scale]:
    """The scale of every tensor that the placement quantizes."""
    pooled = dict(statistics)
    for group in placement.one_scale:
        together = functools.reduce(Statistics.merge, (statistics[name] for name in sorted(group)))
        pooled.update(dict.fromkeys(group, together))
    chosen = {name: activation_scale(pooled[name], method, policy.symmetric, percentile) for name in placement.observed}
    return chosen | {name: chosen[source] for name, source in placement.same_scale.items()}


def least_clipping(methods: Sequence[tuple[str, float]]) -> str:
    """Of the methods within half a decibel of the best, the first; ``methods`` are in the order of how much they clip.

    Held-out samples come from where the observed ones come from, and what is clipped on neither may well appear in use.
    """
    best = max(sqnr for _, sqnr in methods)
    return next(name for name, sqnr in methods if sqnr >= best - _AS_GOOD_DB)


def choose(
    model: OnnxModel,
    placement: Placement,
    statistics: Mapping[str, Statistics],
    policy: Int8Policy,
    settings: Calibration,
    weights: WeightMethod,
    held_out: Sequence[Batch],
    corrects_bias: bool,
    threads: int,
) -> tuple[Quantization, dict[str, float]]:
    """The quantization by the method that is asked for, or by one whose outputs are near to the float model's.

    Mean errors of channels do not count where biases will be corrected: they can be most of what sets methods apart.

    Returns:
        the quantization, and the SQNR of each method in dB, the chosen one first and then the best; empty if there was
        nothing to choose.
    """

    def quantization(method: RangeMethod, percentile: float) -> Quantization:
        activations = scales(placement, statistics, policy, method, percentile)
        return Quantization(placement, activations, quantize_weights(model, placement, policy, activations, weights))

    candidates = settings.candidates()
    if len(candidates) == 1:
        return quantization(*candidates[0]), {}
    judge = Judge(model, held_out, policy, threads)
    measure = judge.scatter if corrects_bias else judge.error
    found: dict[str, Quantization] = {}
    errors: dict[str, float] = {}
    for method, percentile in candidates:
        name = f"{method} {percentile}" if method == "percentile" else method
        found[name] = quantization(method, percentile)
        errors[name] = measure(write(model, found[name]))
        log.debug("calibration by %s: %.2f dB", name, decibels(errors[name]))
    by_sqnr = ranking(errors)
    chosen = least_clipping([(name, by_sqnr[name]) for name in found])
    return found[chosen], {chosen: by_sqnr[chosen], **by_sqnr}
