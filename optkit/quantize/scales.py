"""Scales and zero points: activations from one histogram by any method, weights per channel.

A real value x is stored as q = clip(round(x / scale) + zero_point). Symmetric INT8 uses [-127, 127] with zero point 0,
asymmetric UINT8 uses [0, 255]; zero is always exactly representable, for padding and ReLU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from optkit.quantize.observers import Statistics

Array = np.ndarray[Any, Any]

RangeMethod: TypeAlias = Literal["max", "percentile", "entropy", "mse"]
RANGE_METHODS: tuple[RangeMethod, ...] = ("max", "percentile", "entropy", "mse")

WeightMethod: TypeAlias = Literal["max", "mse"]

MIN_SCALE = 2.0**-60
"""Keeps the product of an activation's and a weight's scale, which a bias is divided by, a normal float32."""

_SHRINKAGE = np.linspace(1.0, 0.02, 99)
_WEIGHT_SHRINKAGE = np.linspace(1.0, 0.4, 61)


@dataclass(frozen=True)
class Scale:
    """How one activation tensor is quantized."""

    scale: np.float32
    zero_point: int
    dtype: Literal["uint8", "int8"]

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and largest value that does not saturate."""
        lowest, highest = (0, 255) if self.dtype == "uint8" else (-127, 127)
        return float(self.scale) * (lowest - self.zero_point), float(self.scale) * (highest - self.zero_point)


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight as it is stored: symmetric INT8 values and one float32 scale for each index along ``axis``."""

    values: Array
    scale: Array
    axis: int

    @property
    def dequantized(self) -> Array:
        """What the kernels compute with."""
        real: Array = self.values.astype(np.float32) * along(self.scale, self.values.ndim, self.axis)
        return real


def activation_scale(seen: Statistics, method: RangeMethod, symmetric: bool, percentile: float = 99.999) -> Scale:
    """The scale and zero point for a tensor with these statistics.

    Args:
        seen: the tensor's statistics.
        method: ``max`` takes all that was seen; ``percentile`` cuts off both tails together; ``entropy`` takes the
            range whose quantized histogram has the least Kullback-Leibler divergence from the whole one, as TensorRT
            8 did; ``mse`` the one with the least squared error.
        symmetric: INT8 around zero, or UINT8 with a zero point.
        percentile: of ``percentile``, 50 to 100.
    """
    if method == "percentile":
        low, high = _percentile_range(seen, percentile, symmetric)
    elif method == "entropy":
        low, high = _entropy_range(seen, symmetric)
    elif method == "mse":
        low, high = _mse_range(seen, symmetric)
    else:
        low, high = seen.low, seen.high
    return range_scale(low, high, symmetric)


def range_scale(low: float, high: float, symmetric: bool) -> Scale:
    """The scale that covers a range and zero."""
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        return Scale(_round_down(max(-low, high) / 127), 0, "int8")
    scale = _round_down((high - low) / 255)
    return Scale(scale, int(np.clip(np.rint(-low / float(scale)), 0, 255)), "uint8")


def _round_down(scale: float) -> np.float32:
    """The float32 that is not above ``scale``: a Clip that bounds the range stays provably redundant."""
    if scale < MIN_SCALE:
        # A tensor of zeros, or as good as: any scale keeps zero exact
        scale = MIN_SCALE if scale > 0 else 1.0
    rounded: np.float32 = np.float32(scale)
    if float(rounded) > scale:
        rounded = np.nextafter(rounded, np.float32(0))
    return rounded


def quantization_error(seen: Statistics, scale: Scale) -> float:
    """The mean squared error that quantizing a tensor with these statistics makes."""
    low, high = scale.range
    occupied = seen.counts > 0
    errors = _squared_errors(seen.centers[occupied], np.array([low]), np.array([high]), scale.dtype == "int8")
    weights = seen.counts[occupied]
    return float(errors[0] @ weights / weights.sum())


def _percentile_range(seen: Statistics, percentile: float, symmetric: bool) -> tuple[float, float]:
    tail = 1.0 - percentile / 100
    if symmetric:
        reach = _quantile(np.abs(seen.centers), seen.counts, 1 - tail)
        return -reach, reach
    return _quantile(seen.centers, seen.counts, tail / 2), _quantile(seen.centers, seen.counts, 1 - tail / 2)


def _quantile(values: Array, counts: Array, fraction: float) -> float:
    order = np.argsort(values, kind="stable")
    cumulated = np.cumsum(counts[order])
    return float(values[order][np.searchsorted(cumulated, fraction * cumulated[-1])])


def _mse_range(seen: Statistics, symmetric: bool) -> tuple[float, float]:
    occupied = seen.counts > 0
    values, weights = seen.centers[occupied], seen.counts[occupied].astype(np.float64)
    low, high = min(seen.low, 0.0), max(seen.high, 0.0)

    def best(reach: float, ends: Callable[[Array], tuple[Array, Array]]) -> float:
        def errors(indices: Array) -> Array:
            lows, highs = ends(reach * _SHRINKAGE[indices])
            total: Array = _squared_errors(values, lows, highs, symmetric).dot(weights)
            return total

        found: float = reach * _SHRINKAGE[_least(errors)]
        return found

    if symmetric:
        reach = best(max(-low, high), lambda reaches: (-reaches, reaches))
        return -reach, reach

    def best_high(low: float, high: float) -> float:
        return best(high, lambda highs: (np.full_like(highs, low), highs)) if high > 0 else high

    def best_low(low: float, high: float) -> float:
        return best(low, lambda lows: (lows, np.full_like(lows, high))) if low < 0 else low

    # The two ends in turn, twice: a grid over both would cost the square
    for _ in range(2):
        high = best_high(low, high)
        low = best_low(low, high)
    return low, high


def _least(errors: Callable[[Array], Array]) -> int:
    """Where on the grid of ranges the error is least: every fourth is tried, then those around the best."""
    coarse = np.arange(0, len(_SHRINKAGE), 4)
    found = int(coarse[errors(coarse).argmin()])
    fine = np.arange(max(found - 3, 0), min(found + 4, len(_SHRINKAGE)))
    return int(fine[errors(fine).argmin()])


def _squared_errors(values: Array, lows: Array, highs: Array, symmetric: bool) -> Array:
    """Squared errors of ``values`` quantized to each of the ranges; float32[ranges, values]."""
    if symmetric:
        scale, smallest, largest = highs / 127, np.full_like(highs, -127.0), np.full_like(highs, 127.0)
    else:
        scale = (highs - lows) / 255
        smallest = np.rint(lows / np.maximum(scale, MIN_SCALE))
        largest = smallest + 255
    step = np.maximum(scale, MIN_SCALE).astype(np.float32)[:, None]
    quantized: Array = np.rint(values.astype(np.float32)[None, :] / step)
    np.clip(quantized, smallest.astype(np.float32)[:, None], largest.astype(np.float32)[:, None], out=quantized)
    quantized *= step
    quantized -= values.astype(np.float32)
    np.square(quantized, out=quantized)
    return quantized


def _entropy_range(seen: Statistics, symmetric: bool) -> tuple[float, float]:
    counts = _without_zero_spike(seen)
    occupied = counts > 0
    values, counts = seen.centers[occupied], counts[occupied]
    low, high = min(seen.low, 0.0), max(seen.high, 0.0)
    reach = max(-low, high)
    if symmetric:
        low, high = -reach, reach

    def cut(index: int) -> tuple[float, float]:
        threshold = reach * float(_SHRINKAGE[index])
        return max(low, -threshold), min(high, threshold)

    def divergences(indices: Array) -> Array:
        steps = 254 if symmetric else 255
        return np.array([_divergence(values, counts, *cut(index), steps) for index in indices])

    return cut(_least(divergences))


def _without_zero_spike(seen: Statistics) -> Array:
    """The counts with the bin of zero as its neighbours are: every range holds zero exactly, so it must not count."""
    counts = seen.counts.astype(np.float64)
    zero = -seen.start
    neighbours = [i for i in (zero - 1, zero + 1) if 0 <= i < len(counts)]
    if 0 <= zero < len(counts) and neighbours:
        counts[zero] = min(counts[zero], max(counts[neighbours].max(), 1.0))
    return counts


def _divergence(values: Array, counts: Array, low: float, high: float, steps: int) -> float:
    """KL(P || Q): P is the histogram with its tails folded onto the ends, Q what ``steps`` steps leave of it."""
    first, last = np.searchsorted(values, low), np.searchsorted(values, high, "right")
    kept = counts[first:last]
    if len(kept) == 0 or high <= low:
        return float("inf")
    p = kept.copy()
    p[0] += counts[:first].sum()
    p[-1] += counts[last:].sum()
    level = np.rint((values[first:last] - low) * (steps / (high - low))).astype(np.int64)
    q = (np.bincount(level, weights=kept) / np.maximum(np.bincount(level), 1))[level]
    total = p.sum()
    return float(np.sum(p * np.log((p / total) / (q / q.sum()))) / total)


def quantize_weight(
    weight: Array, axis: int, method: WeightMethod = "max", smallest: Array | float = 0.0
) -> QuantizedWeight:
    """Quantize a weight to symmetric INT8, one scale for each channel along ``axis``.

    Args:
        weight: float array.
        axis: the output channels.
        method: ``max`` saturates nothing; ``mse`` shrinks each channel's range to its least squared error.
        smallest: least scales, one or one per channel.
    """
    rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1).astype(np.float32)
    reach = np.abs(rows).max(axis=1)
    if method == "mse":
        reach = reach * _best_shrinkage(rows, reach)
    alive = reach > 0
    # A dead channel stores zeros; its scale still grids its bias, so it gets one like the others
    usual = float(np.median(reach[alive])) if alive.any() else 1.0
    scale = np.maximum(np.where(alive, reach, usual) / 127, np.maximum(smallest, MIN_SCALE)).astype(np.float32)
    values = np.clip(np.rint(weight / along(scale, weight.ndim, axis)), -127, 127).astype(np.int8)
    return QuantizedWeight(values, scale, axis)


def _best_shrinkage(rows: Array, reach: Array) -> Array:
    best = np.ones(len(rows), np.float32)
    least = np.full(len(rows), np.inf)
    for shrink in _WEIGHT_SHRINKAGE:
        scale = np.maximum(reach * shrink / 127, MIN_SCALE)[:, None]
        error = np.square(np.clip(np.rint(rows / scale), -127, 127) * scale - rows).sum(axis=1)
        better = error < least
        best[better], least[better] = shrink, error[better]
    return best


def along(scale: Array, rank: int, axis: int) -> Array:
    """Scales, one for each index along an axis of a tensor of that rank, in a shape that multiplies with it."""
    shape = [1] * rank
    shape[axis] = -1
    return scale.reshape(shape)
