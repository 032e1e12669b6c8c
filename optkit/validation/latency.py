"""Latency: every entrant is timed in every round, in an order that alternates, and every sample is kept.

A round gives each entrant one turn of ``seconds`` (or ``MOST_CALLS`` calls, whichever ends first), so what slows the
machine down for a while slows all of them down. A percentile is given only with enough samples that the largest one is
above the true percentile with 99 % probability: ln 0.01 / ln q of them, which is 44 for p90, 90 for p95, 459 for p99.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from optkit.context import Context
from optkit.data import Data
from optkit.models import Feeds, Signature
from optkit.recipe import LatencySettings
from optkit.targets.base import Environment
from optkit.validation.contest import Contest, Entrant
from optkit.validation.statistics import Array, Interval, percentile_needs, ratio_of_rounds

log = logging.getLogger("optkit.validation")

MOST_CALLS = 500
"""Of one turn: what a report with raw samples can carry."""

PERCENTILES = (50, 90, 95, 99)

UNSTEADY = 0.05
"""Spread of the medians of rounds (standard deviation by mean) above which the report warns."""


@dataclass(frozen=True)
class Timings:
    """What one entrant's calls took.

    Attributes:
        rounds: seconds of each call, one array for each round.
        environment: where it ran.
    """

    rounds: tuple[Array, ...]
    environment: Environment

    @property
    def samples(self) -> Array:
        """Seconds of every call."""
        return np.concatenate(self.rounds)

    @property
    def spread(self) -> float:
        """The spread of the medians of rounds: their standard deviation by their mean."""
        medians = np.array([np.median(turn) for turn in self.rounds])
        return float(np.std(medians) / np.mean(medians))

    def percentile(self, q: int) -> float | None:
        """A percentile in seconds, or None with too few samples for it."""
        samples = self.samples
        return float(np.percentile(samples, q)) if len(samples) >= percentile_needs(q) else None


@dataclass(frozen=True)
class Latency:
    """What a contest of speed showed.

    Attributes:
        timings: by entrant.
        speedups: how many times faster the candidate is than each baseline; none if the engine did not run.
        sizes: the size of every dynamic dimension.
        batch: how many samples one call runs.
        feeds: what was fed, in words.
        load: the machine's load average before and after, where the system tells it.
    """

    timings: Mapping[str, Timings]
    speedups: Mapping[str, Interval]
    sizes: Mapping[str, int]
    batch: int
    feeds: str
    load: tuple[float | None, float | None]


def measure_latency(
    contest: Contest, data: Data, context: Context, settings: LatencySettings, confidence: float
) -> Latency:
    """Time everyone whose latency means something, at the ``opt`` sizes of the signature."""
    signature = contest.signature
    feeds, described = latency_feeds(signature, data, context)
    before = _load()
    calls = {entrant.name: _warmed_up(entrant, feeds, settings) for entrant in contest.timed}
    rounds: dict[str, list[Array]] = {entrant.name: [] for entrant in contest.timed}
    for number in context.progress(range(settings.rounds), "latency", settings.rounds):
        for entrant in contest.timed if number % 2 == 0 else reversed(contest.timed):
            rounds[entrant.name].append(_turn(entrant, feeds, calls[entrant.name]))
    timings = {e.name: Timings(tuple(rounds[e.name]), e.runner.environment) for e in contest.timed}
    for name, timing in timings.items():
        if timing.spread > UNSTEADY:
            log.warning(
                "%s: the median latency varied by %.0f %% between rounds: something else ran, or the clock changed",
                name,
                100 * timing.spread,
            )
    speedups = {
        baseline.name: ratio_of_rounds(
            timings[baseline.name].rounds,
            timings[contest.candidate.name].rounds,
            confidence,
            context.rng(f"validate latency {baseline.name}"),
        )
        for baseline in contest.baselines
        if contest.why_not is None
    }
    batch = _batch(signature, signature.sizes())
    return Latency(timings, speedups, signature.sizes(), batch, described, (before, _load()))


def _turn(entrant: Entrant, feeds: Feeds, calls: int) -> Array:
    if calls >= 10:  # the other entrants had the caches and the cores until now
        entrant.runner.time(feeds, calls // 10)
    return entrant.runner.time(feeds, calls)


def _warmed_up(entrant: Entrant, feeds: Feeds, settings: LatencySettings) -> int:
    """Run until two windows in a row take the same time, and say how many calls make a turn."""
    call = float(entrant.runner.time(feeds, 1)[0])
    spent, previous, settled = call, float("inf"), False
    while spent < settings.warmup or (not settled and spent < 5 * settings.warmup):
        window = entrant.runner.time(feeds, _calls(settings.warmup / 3, call))
        spent, previous, call = spent + float(window.sum()), call, float(np.median(window))
        settled = abs(call - previous) <= 0.05 * call
    if settings.warmup and not settled:
        log.warning("%s: latency had not settled after %.1f s of warm-up", entrant.name, spent)
    return _calls(settings.seconds, call)


def _calls(seconds: float, call: float) -> int:
    return min(max(round(seconds / max(call, 1e-9)), 1), MOST_CALLS)


def latency_feeds(signature: Signature, data: Data, context: Context) -> tuple[Feeds, str]:
    """Real samples if they come in the sizes that latency is measured at, else random values; and which, in words."""
    sizes = signature.sizes()
    wanted = {spec.name: spec.sized(sizes) for spec in signature.inputs}
    first = next(iter(data.batches("validation", _batch(signature, sizes), None)), None)
    if first is not None and {name: array.shape for name, array in first.feeds.items()} == wanted:
        return first.feeds, "validation samples"
    return signature.random_feeds(context.rng("validate latency feeds")), "random values"


def _batch(signature: Signature, sizes: Mapping[str, int]) -> int:
    """How many samples one call runs: the first dimension that all inputs share, else 1."""
    fronts = {spec.sized(sizes)[0] if spec.shape else 1 for spec in signature.inputs}
    return fronts.pop() if len(fronts) == 1 else 1


def _load() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def latency_document(latency: Latency, settings: LatencySettings) -> dict[str, Any]:
    """The report's ``latency``: times in milliseconds, raw samples in microseconds by round."""
    return {
        "batch": latency.batch,
        "sizes": dict(latency.sizes),
        "feeds": latency.feeds,
        "rounds": settings.rounds,
        "seconds_per_turn": settings.seconds,
        "warmup_seconds": settings.warmup,
        "load_average": {"before": latency.load[0], "after": latency.load[1]},
        "percentile_rule": "given with at least ln 0.01 / ln q samples: p90 44, p95 90, p99 459",
        "runners": {name: _timings_document(timings, latency.batch) for name, timings in latency.timings.items()},
        "ratios": {name: _speedup_document(speedup) for name, speedup in latency.speedups.items()},
    }


def _timings_document(timings: Timings, batch: int) -> dict[str, Any]:
    samples = timings.samples
    median = float(np.median(samples))
    percentiles = {f"p{q}_ms": timings.percentile(q) for q in PERCENTILES}
    return {
        "device": timings.environment.device,
        "runtime": timings.environment.runtime,
        "settings": dict(timings.environment.settings),
        "calls": len(samples),
        **{name: None if value is None else 1e3 * value for name, value in percentiles.items()},
        "median_ms": 1e3 * median,
        "mean_ms": 1e3 * float(np.mean(samples)),
        "cov": float(np.std(samples) / np.mean(samples)),
        "cov_of_rounds": timings.spread,
        "throughput_per_s": timings.environment.calls_at_once * batch / median,
        "samples_us": [np.round(1e6 * turn, 2).tolist() for turn in timings.rounds],
    }


def _speedup_document(speedup: Interval) -> dict[str, Any]:
    return {
        "ratio": speedup.estimate,
        "interval": [speedup.low, speedup.high],
        "verdict": speed_verdict(speedup),
        "method": speedup.method,
        "rounds": speedup.n,
        "reliable": speedup.reliable,
    }


def speed_verdict(speedup: Interval) -> str:
    """``faster`` or ``slower`` only if the interval excludes 1."""
    if speedup.reliable and speedup.low > 1:
        return "faster"
    return "slower" if speedup.reliable and speedup.high < 1 else "no difference shown"
