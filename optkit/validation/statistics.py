"""Intervals for what the gate looks at: paired differences of metrics, and ratios of latencies.

Baseline and candidate see the same samples, so only the samples on which they differ say anything about the drop.
The interval is chosen by what a sample's score is:

- right or wrong: Tango's score interval for a difference of paired proportions, which keeps a width when no pair
  differs at all (with z the normal quantile and n samples its limits are then -+ z^2 / (n + z^2));
- any other score per sample: the BCa bootstrap of the mean difference;
- a metric of all samples together (F1, Spearman): the percentile bootstrap over samples, both models resampled alike;
- latency: the percentile bootstrap over rounds, because the calls of one round are not independent.

Sources: T. Tango, "Equivalence test and confidence interval for the difference in proportions for the paired-sample
design", Statistics in Medicine 17 (1998) 891-908. B. Efron, "Better bootstrap confidence intervals", JASA 82 (1987)
171-185.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

RESAMPLES = 2000
"""Bootstrap resamples of a mean or a median."""

SCORE_RESAMPLES = 1000
"""Bootstrap resamples of a metric that has to be computed anew each time."""

_CHUNK = 2_000_000
"""How many drawn indices are held at a time."""

_MOST_SAMPLES = 10**9


@dataclass(frozen=True)
class Interval:
    """An estimate and its interval.

    Attributes:
        estimate: what was observed.
        low: lower limit.
        high: upper limit.
        method: how the limits were found, for the report.
        n: how many samples (or rounds) it rests on.
        shrinks: the width goes with n to the power of minus this.
        reliable: False if n is too small for any interval of the confidence that was asked for.
    """

    estimate: float
    low: float
    high: float
    method: str
    n: int
    shrinks: float = 0.5
    reliable: bool = True

    def decides(self, limit: float) -> bool:
        """Whether the whole interval is on one side of the limit."""
        return self.reliable and (self.high <= limit or self.low > limit)

    def with_samples(self, n: int) -> Interval:
        """What the interval would be with ``n`` samples that are like those seen."""
        scale = (self.n / n) ** self.shrinks
        low, high = (
            self.estimate - (self.estimate - self.low) * scale,
            self.estimate + (self.high - self.estimate) * scale,
        )
        return replace(self, low=low, high=high, n=n)

    def needed(self, limit: float) -> int | None:
        """How many samples like those seen would decide on which side of the limit the truth is; None if none would."""
        enough = max(self.n, 1)
        while not self.with_samples(enough).decides(limit):
            enough *= 2
            if enough > _MOST_SAMPLES:
                return None
        short = max(enough // 2, self.n - 1)
        while enough - short > 1:
            middle = (enough + short) // 2
            short, enough = (short, middle) if self.with_samples(middle).decides(limit) else (middle, enough)
        return enough


@dataclass(frozen=True)
class ProportionInterval(Interval):
    """An interval of paired proportions: it remembers the discordant pairs, of which more samples would show more."""

    lost: float = 0.0
    gained: float = 0.0
    confidence: float = 0.95

    def with_samples(self, n: int) -> ProportionInterval:
        """The interval with the discordant pairs scaled to ``n`` samples."""
        scale = n / self.n
        return paired_proportions(self.lost * scale, self.gained * scale, n, self.confidence)


def paired_proportions(lost: float, gained: float, n: int, confidence: float) -> ProportionInterval:
    """Tango's score interval of the drop ``(lost - gained) / n``.

    Args:
        lost: samples that only the baseline has right.
        gained: samples that only the candidate has right.
        n: all samples.
        confidence: of the two-sided interval.
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    estimate = (lost - gained) / n

    def statistic(drop: float) -> float:
        # q is the constrained maximum likelihood estimate of the probability of a gain
        b = -lost - gained + (2 * n - lost + gained) * drop
        q = (math.sqrt(max(b * b + 8 * n * gained * drop * (1 - drop), 0.0)) - b) / (4 * n)
        deviation = math.sqrt(max(n * (2 * q + drop * (1 - drop)), 0.0))
        distance = lost - gained - n * drop
        return distance / deviation if deviation else math.copysign(math.inf, distance)

    low = -1.0 if estimate == -1 else _crossing(statistic, z, -1.0, estimate)
    high = 1.0 if estimate == 1 else _crossing(statistic, -z, estimate, 1.0)
    method = "Tango score interval of paired proportions"
    return ProportionInterval(estimate, low, high, method, n, lost=lost, gained=gained, confidence=confidence)


def _crossing(falling: Callable[[float], float], level: float, left: float, right: float) -> float:
    """Where a falling function crosses a level, by bisection."""
    for _ in range(60):
        middle = (left + right) / 2
        left, right = (middle, right) if falling(middle) > level else (left, middle)
    return (left + right) / 2


def paired_scores(baseline: Array, candidate: Array, confidence: float, rng: np.random.Generator) -> Interval:
    """The interval of the mean drop from ``baseline`` to ``candidate``, a score from 0 to 1 for each sample in each."""
    drops = np.asarray(baseline, np.float64) - np.asarray(candidate, np.float64)
    if np.isin(baseline, (0, 1)).all() and np.isin(candidate, (0, 1)).all():
        lost, gained = int(np.count_nonzero(drops > 0)), int(np.count_nonzero(drops < 0))
        return paired_proportions(lost, gained, len(drops), confidence)
    if not drops.any():
        return unseen(len(drops), confidence)
    return _bca_of_mean(drops, confidence, rng)


def paired_metric(
    score: Callable[[Array], float], baseline: Array, candidate: Array, confidence: float, rng: np.random.Generator
) -> Interval:
    """The interval of the drop of a metric that only all samples together have; rows by sample in each."""
    n = len(baseline)
    if np.array_equal(baseline, candidate):
        return unseen(n, confidence)
    drops = np.concatenate(
        [
            [score(baseline[rows]) - score(candidate[rows]) for rows in drawn]
            for drawn in _resamples(n, SCORE_RESAMPLES, rng)
        ]
    )
    # A resample may lack what the metric needs (one class only): it says nothing about the drop
    drops = drops[np.isfinite(drops)]
    estimate = score(baseline) - score(candidate)
    if not len(drops):
        return Interval(estimate, -1.0, 1.0, "none: no resample has a score", n, reliable=False)
    low, high = np.quantile(drops, _tails(confidence))
    return Interval(estimate, float(low), float(high), "percentile bootstrap over samples", n)


def unseen(n: int, confidence: float) -> Interval:
    """The interval when not one of ``n`` samples differs: a bootstrap would give it no width.

    What occurs in a share p of all samples stays unseen n times with probability (1 - p)^n; each such sample may cost
    a whole point of score or gain it. For 95 % this is the "rule of three" with both tails: 3.7 / n.
    """
    bound = 1 - ((1 - confidence) / 2) ** (1 / n)
    return Interval(0.0, -bound, bound, "no sample differs: Clopper-Pearson bound of what was not seen", n, shrinks=1.0)


def identical(n: int) -> Interval:
    """The interval of a score that is a continuous function of the outputs, when it is the same for every sample."""
    return Interval(0.0, 0.0, 0.0, "no sample differs in a continuous score", n)


def _bca_of_mean(values: Array, confidence: float, rng: np.random.Generator) -> Interval:
    n, estimate = len(values), float(np.mean(values))
    method = "BCa bootstrap over samples"
    centred = values - estimate
    squares = float(centred @ centred)
    if squares == 0.0:
        return Interval(estimate, estimate, estimate, method, n)
    means = np.concatenate([values[drawn].mean(axis=1) for drawn in _resamples(n, RESAMPLES, rng)])
    normal = NormalDist()
    below = float(np.mean(means < estimate) + np.mean(means == estimate) / 2)
    bias = normal.inv_cdf(min(max(below, 0.5 / RESAMPLES), 1 - 0.5 / RESAMPLES))
    acceleration = float(np.sum(centred**3)) / (6 * squares**1.5)
    tails = []
    for tail in _tails(confidence):
        shifted = bias + normal.inv_cdf(tail)
        tails.append(normal.cdf(bias + shifted / (1 - acceleration * shifted)))
    low, high = np.quantile(means, tails)
    return Interval(estimate, float(low), float(high), method, n)


def ratio_of_rounds(
    baseline: Sequence[Array], candidate: Sequence[Array], confidence: float, rng: np.random.Generator
) -> Interval:
    """How many times faster the candidate is: the median over rounds of the ratio of the round's medians.

    Both were timed in the same round, so what slows the machine down for a while cancels. With too few rounds even
    the smallest and the largest ratio do not enclose the median with the confidence that was asked for (each is on the
    wrong side with probability 2^-rounds): the interval is then not reliable.

    Args:
        baseline: seconds of each call, by round.
        candidate: the same; the rounds correspond.
        confidence: of the two-sided interval.
        rng: draws the resamples.
    """
    ratios = np.array([np.median(b) / np.median(c) for b, c in zip(baseline, candidate, strict=True)])
    return _median(ratios, "percentile bootstrap of the median ratio over rounds", confidence, rng)


def median_of_rounds(rounds: Sequence[Array], confidence: float, rng: np.random.Generator) -> Interval:
    """Seconds of a call: the median over rounds of the round's median, with the interval of ``ratio_of_rounds``.

    What slows the machine down for a while does not cancel here as it does in a ratio: the interval says so.
    """
    medians = np.array([np.median(turn) for turn in rounds])
    return _median(medians, "percentile bootstrap of the median over rounds", confidence, rng)


def _median(values: Array, method: str, confidence: float, rng: np.random.Generator) -> Interval:
    n = len(values)
    medians = np.concatenate([np.median(values[drawn], axis=1) for drawn in _resamples(n, RESAMPLES, rng)])
    low, high = np.quantile(medians, _tails(confidence))
    reliable = n >= rounds_needed(confidence)
    return Interval(float(np.median(values)), float(low), float(high), method, n, reliable=reliable)


def rounds_needed(confidence: float) -> int:
    """How few rounds give ``ratio_of_rounds`` an interval of that confidence at all."""
    return math.ceil(math.log2(2 / (1 - confidence)))


def percentile_needs(q: float) -> int:
    """How many samples a percentile needs: then the largest is above the true one with 99 % probability."""
    return math.ceil(math.log(0.01) / math.log(q / 100))


def _tails(confidence: float) -> tuple[float, float]:
    return (1 - confidence) / 2, (1 + confidence) / 2


def _resamples(n: int, times: int, rng: np.random.Generator) -> Iterator[Array]:
    """Indices of bootstrap resamples, int64[some, n] at a time."""
    at_once = max(1, _CHUNK // n)
    for start in range(0, times, at_once):
        yield rng.integers(0, n, (min(at_once, times - start), n))
