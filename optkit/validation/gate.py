"""The gate: passed, missed or inconclusive, and why, in sentences with numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from optkit.recipe import Gate
from optkit.validation.accuracy import Accuracy
from optkit.validation.contest import Contest
from optkit.validation.latency import Latency
from optkit.validation.statistics import Interval, rounds_needed

Status: TypeAlias = Literal["passed", "missed", "inconclusive"]


@dataclass(frozen=True)
class Verdict:
    """The gate's answer. Only ``passed`` lets a bundle appear."""

    status: Status
    reasons: tuple[str, ...]


def judge(contest: Contest, accuracy: Accuracy, latency: Latency, gate: Gate) -> Verdict:
    """The worst of what accuracy and speed say."""
    verdicts = [judge_accuracy(contest, accuracy, gate)]
    if gate.min_speedup is not None:
        verdicts.append(judge_speed(contest, latency, gate.min_speedup, gate.confidence))
    return worst(verdicts)


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """Missed if one is missed, else inconclusive if one is, else passed; with the reasons of all."""
    statuses = [verdict.status for verdict in verdicts]
    status: Status = "missed" if "missed" in statuses else "inconclusive" if "inconclusive" in statuses else "passed"
    return Verdict(status, tuple(reason for verdict in verdicts for reason in verdict.reasons))


def judge_accuracy(contest: Contest, accuracy: Accuracy, gate: Gate) -> Verdict:
    """Whether the drop against the reference is at most ``max_drop`` points."""
    if accuracy.broken is not None:
        return Verdict("missed", (f"{accuracy.broken}.",))
    reference, candidate = contest.reference.name, contest.candidate.name
    drop, limit = accuracy.drops[reference], gate.max_drop / 100
    scores = f"{100 * accuracy.scores[reference]:.2f} ({reference}) and {100 * accuracy.scores[candidate]:.2f}"
    facts = (
        f"{accuracy.metric} is {scores} ({candidate}) on {accuracy.samples} samples: a drop of "
        f"{100 * drop.estimate:.2f} points, with {100 * gate.confidence:g} % confidence from {100 * drop.low:.2f} to "
        f"{100 * drop.high:.2f}"
    )
    if drop.reliable and drop.high <= limit:
        return Verdict("passed", (f"{facts}; {gate.max_drop:g} is allowed.",))
    if drop.reliable and drop.low > limit:
        return Verdict("missed", (f"{facts}; only {gate.max_drop:g} is allowed.",))
    return Verdict(
        "inconclusive",
        (f"{facts}, which does not decide on the {gate.max_drop:g} that is allowed.", _more(drop, limit)),
    )


def _more(drop: Interval, limit: float) -> str:
    needed = drop.needed(limit)
    # Rounded up: the limit as it is printed has to pass
    allowed = math.ceil(1e4 * drop.high) / 100
    wider = f"gate.max_drop {allowed:.2f} would pass with these." if drop.reliable else ""
    if needed is None:
        return f"No number of samples like these would decide it. {wider}".strip()
    return f"About {needed} samples like these would decide it (there were {drop.n}). {wider}".strip()


def judge_speed(contest: Contest, latency: Latency, wanted: float, confidence: float) -> Verdict:
    """Whether the candidate is at least ``wanted`` times faster than the rival."""
    if contest.why_not is not None:
        return Verdict(
            "inconclusive",
            (f"The engine did not run here, so whether it is {wanted:g} times faster cannot be judged.",),
        )
    if not contest.same_device:
        return Verdict(
            "inconclusive",
            (f"{contest.rival} ran on another device, so that it is {wanted:g} times faster is not judged.",),
        )
    speedup = latency.speedups[contest.rival]
    facts = (
        f"{contest.candidate.name} is {speedup.estimate:.2f} times as fast as {contest.rival}, with "
        f"{100 * confidence:g} % confidence from {speedup.low:.2f} to {speedup.high:.2f} ({speedup.n} rounds)"
    )
    if not speedup.reliable:
        least = rounds_needed(confidence)
        return Verdict("inconclusive", (f"{facts}: too few rounds to tell; at least {least} are needed.",))
    if speedup.low >= wanted:
        return Verdict("passed", (f"{facts}; {wanted:g} is wanted.",))
    if speedup.high < wanted:
        return Verdict("missed", (f"{facts}; {wanted:g} is wanted.",))
    needed = speedup.needed(wanted)
    more = f"about {needed} rounds like these would" if needed else "no number of rounds like these would"
    return Verdict("inconclusive", (f"{facts}, which does not decide on the {wanted:g} that is wanted; {more}.",))
