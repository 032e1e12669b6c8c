"""Gives back to float as few INT8 layers as the accuracy gate asks for, by measured accuracy.

The layers are ranked once, by the noise that each adds on held-out calibration samples (``quantize.sensitivity``); a
choice is the first k of that order. The noise of layers nearly adds up, and what a metric loses goes about with the
root of it, so what everything in INT8 lost says where to begin: from there k takes doubling steps until one choice
fails and one passes, and then the interval between them is halved. That accuracy rises with k is likely, not certain.

An attempt is the rest of the pipeline and a validation. The scales are found once; bias correction and rounding depend
on what is in INT8 and run again. The first samples tell a choice that is hopeless, and only one that they do not
condemn is judged by all; baselines run once (``validation.memory``), and a choice is timed in as few rounds as give an
interval. The one that is chosen is compiled by its own recipe and validated in full. All of them together are the
trade-off that the report shows.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from optkit.context import Context
from optkit.models import OnnxModel
from optkit.passes.quantize_int8 import QuantizeInt8
from optkit.pipeline import Stage, run_passes
from optkit.quantize.calibrated import Calibrated
from optkit.quantize.sensitivity import Sensitivity, sensitivity
from optkit.recipe import Recipe
from optkit.validation import Report, Verdict
from optkit.validation.statistics import rounds_needed

log = logging.getLogger("optkit.search")

GLANCE = 256
"""Samples that condemn a choice, if its drop is past the limit with the gate's confidence on these alone."""


@dataclass(frozen=True)
class Attempt:
    """A recipe that was run: what its passes made of the model, and what the validator found."""

    recipe: Recipe
    stages: tuple[Stage, ...]
    report: Report

    @property
    def accurate(self) -> bool:
        """Whether the gate's accuracy passed, whatever its speed did."""
        status: str = self.report.document["accuracy"]["status"]
        return status == "passed"


Judge = Callable[[Sequence[Stage], Recipe], Report]


def can_help(attempt: Attempt) -> bool:
    """Whether INT8 layers may be what an attempt lost its accuracy by, and enough samples are there to tell."""
    if attempt.accurate or attempt.recipe.gate.lossy_int8 != "rollback":
        return False
    if not attempt.report.document["accuracy"]["reachable"]:
        log.info("no search for layers that cost accuracy: with so few samples not even the float model would pass")
        return False
    return attempt.recipe.int8 is not None


def roll_back(first: Attempt, context: Context, judge: Judge) -> Attempt:
    """Put the fewest layers back into float that let the gate's accuracy pass.

    Args:
        first: the attempt with everything in INT8 that its recipe allows, which lost too much.
        context: each attempt builds into a folder of its own in the scratch folder.
        judge: validates stages by a recipe.

    Returns:
        The attempt whose accuracy passed with the fewest layers in float, its recipe with their names in ``exclude``
        of ``quantize_int8``; or the first one, if none did. Its report has the section ``search``.
    """
    rest = _Rest.of(first, context, judge)
    status = first.report.document["accuracy"]["status"]
    log.info("accuracy is %s: looking for the layers that cost it, of %d in INT8", status, len(rest.order))
    tried: dict[int, Attempt] = {0: first}

    def passes(count: int) -> bool:
        tried[count] = rest.attempt(count)
        return tried[count].accurate

    def holds(count: int) -> bool:
        tried[count] = rest.compiled(count)
        return tried[count].accurate

    most = next(count for count in reversed(range(len(rest.order))) if rest.int8(count))
    chosen = fewest(most, passes, rest.guess())
    if chosen is not None and not holds(chosen):
        chosen = fewest(most, holds, chosen + 1, chosen)
    for count in tried:
        if count not in (0, chosen):
            shutil.rmtree(rest.folder(count))  # an engine that nobody wants
    return _explained(rest, tried, chosen)


def fewest(most: int, passes: Callable[[int], bool], guess: int = 1, known: int = 0) -> int | None:
    """The least count up to ``most`` that passes, if to pass is monotone; None if ``most`` does not pass.

    Counts are tried from the guess on, in steps that double, and between one that fails and one that passes by halves.
    That ``known`` fails is known.
    """
    failing, passing = known, most + 1
    count, step = max(1, min(guess, most)), 1
    while passing - failing > 1:
        if passes(count):
            passing = count
        else:
            failing = count
        if passing > most:
            count = min(failing + step, most)
        elif failing == known:
            count = max(passing - step, known + 1)
        else:
            count = (failing + passing) // 2
        step *= 2
    return passing if passing <= most else None


@dataclass(frozen=True)
class _Rest:
    """What is the same in all attempts, and how to make one."""

    first: Attempt
    index: int  # of quantize_int8 in the recipe
    before: tuple[Stage, ...]
    step: QuantizeInt8
    calibrated: Calibrated
    ranking: Sensitivity
    context: Context
    judge: Judge

    @classmethod
    def of(cls, first: Attempt, context: Context, judge: Judge) -> _Rest:
        assert first.recipe.int8 is not None  # can_help asks for it
        index, step = first.recipe.int8
        stage = next(i for i, one in enumerate(first.stages) if one.name == step.use)
        floats = first.stages[stage - 1].model
        assert isinstance(floats, OnnxModel)  # what quantize_int8 took
        calibrated = step.calibrated(floats, context)
        ranking = sensitivity(calibrated, context)
        return cls(first, index, first.stages[:stage], step, calibrated, ranking, context, judge)

    @property
    def order(self) -> tuple[str, ...]:
        return tuple(node.name for node in self.ranking.nodes)

    def int8(self, count: int) -> tuple[str, ...]:
        """What is in INT8 with the first ``count`` layers of the order in float: others may go with them."""
        placement = self.calibrated.without(self._excluded(count)).quantization.placement
        placed = {use.node for use in placement.weights}
        return tuple(name for name in self.order if name in placed)

    def in_float(self, count: int) -> int:
        """How many layers that makes in float."""
        return len(self.order) - len(self.int8(count))

    def guess(self) -> int:
        """How many layers to begin with: as many as leave half of the allowed drop, the rest being the interval's."""
        drop, allowed = self.first.report.document["accuracy"]["drop_points"], self.first.recipe.gate.max_drop / 2
        if drop is None or drop <= allowed:
            return 1
        noise = np.cumsum([node.noise for node in self.ranking.nodes])
        return 1 + int(np.searchsorted(noise, 1 - (allowed / drop) ** 2))

    def attempt(self, count: int) -> Attempt:
        """The recipe with the first ``count`` layers of the order in float too, with the scales that were found."""
        start = time.perf_counter()
        recipe, context = self._recipe(count), self._context(count)
        assert recipe.int8 is not None  # it has the first one's
        step, after = recipe.int8[1], recipe.passes[self.index + 1 :]
        quantized = step.written(self.calibrated.without(step.exclude), context)
        step.ensures(self.calibrated.model, quantized, context)
        seconds = time.perf_counter() - start
        made = run_passes(after, quantized, context)[1:] if after else ()
        stages = (*self.before, Stage(step.use, quantized, seconds), *made)
        return self._told(count, Attempt(recipe, stages, self._judged(stages, recipe)))

    def compiled(self, count: int) -> Attempt:
        """The same as whoever compiles by this recipe gets it, validated in full.

        What was smoothed and which ranges were chosen may depend on what is in INT8.
        """
        recipe, floats = self._recipe(count), self.before[-1].model
        stages = (*self.before, *run_passes(recipe.passes[self.index :], floats, self._context(count))[1:])
        return self._told(count, Attempt(recipe, stages, self.judge(stages, recipe)))

    def _recipe(self, count: int) -> Recipe:
        recipe = self.first.recipe
        step = self.step.model_copy(update={"exclude": self._excluded(count)})
        passes = (*recipe.passes[: self.index], step, *recipe.passes[self.index + 1 :])
        return recipe.model_copy(update={"passes": passes})

    def _excluded(self, count: int) -> tuple[str, ...]:
        return (*self.step.exclude, *self.order[:count])

    def _context(self, count: int) -> Context:
        shutil.rmtree(self.folder(count), ignore_errors=True)
        self.folder(count).mkdir()
        return replace(self.context, scratch=self.folder(count))

    def _told(self, count: int, attempt: Attempt) -> Attempt:
        log.info("%d of %d layers in float: %s", self.in_float(count), len(self.order), _outcome(attempt))
        return attempt

    def _judged(self, stages: Sequence[Stage], recipe: Recipe) -> Report:
        """The report of a choice among others: less of what says nothing of its accuracy, and a glance at it first."""
        settings = recipe.validation
        rounds = min(settings.latency.rounds, rounds_needed(recipe.gate.confidence))
        latency = settings.latency.model_copy(update={"rounds": rounds})
        quick = settings.model_copy(update={"stage_samples": 1, "latency": latency})
        if self.first.report.document["accuracy"]["n"] > 2 * GLANCE:
            glance = recipe.model_copy(update={"validation": quick.model_copy(update={"samples": GLANCE})})
            report = self.judge(stages, glance)
            if report.document["accuracy"]["status"] == "missed":
                return report
        return self.judge(stages, recipe.model_copy(update={"validation": quick}))

    def folder(self, count: int) -> Path:
        """Where an attempt builds."""
        return self.context.scratch / f"{count}-in-float"


def _outcome(attempt: Attempt) -> str:
    accuracy = attempt.report.document["accuracy"]
    drop = accuracy["drop_points"]
    return accuracy["status"] if drop is None else f"{accuracy['status']}, a drop of {drop:.2f} points"


def _explained(rest: _Rest, tried: dict[int, Attempt], chosen: int | None) -> Attempt:
    """The chosen attempt, its report with everything that was tried."""
    attempt = tried[chosen or 0]
    limit = attempt.recipe.gate.max_drop
    if chosen is None:
        why = _why_not(rest, tried, limit)
    else:
        why = (
            f"{rest.in_float(chosen)} of {len(rest.order)} INT8 layers went back to float: the fewest of {len(tried)} "
            f"choices that keep the drop within {limit:g}. The choices were compared on the samples that judge it."
        )
    verdict = Verdict(attempt.report.verdict.status, (*attempt.report.verdict.reasons, why))
    document = {
        **attempt.report.document,
        "verdict": {"status": verdict.status, "reasons": list(verdict.reasons)},
        "search": {
            "chosen": chosen,
            "excluded": list(rest.order[: chosen or 0]),
            "order": list(rest.order),
            "points": [_point(rest, count, tried[count]) for count in sorted(tried)],
        },
    }
    return replace(attempt, report=Report(verdict, document))


def _why_not(rest: _Rest, tried: dict[int, Attempt], limit: float) -> str:
    """Why no choice was chosen, by the one with the fewest layers in INT8."""
    last, left = tried[max(tried)], ", ".join(rest.int8(max(tried)))
    accuracy = last.report.document["accuracy"]
    if accuracy["status"] == "missed":
        return (
            f"No choice of layers keeps the drop within {limit:g}: not even with only {left} in INT8. "
            "Raise gate.max_drop, or compile without quantize_int8."
        )
    low, high = accuracy["interval"]
    return (
        f"No choice of layers is shown to keep the drop within {limit:g}, and {accuracy['n']} samples are too few to "
        f"rule it out: with only {left} in INT8 it is {accuracy['drop_points']:.2f} points, from {low:.2f} "
        f"to {high:.2f}. Bring more validation samples, raise gate.max_drop, or compile without quantize_int8."
    )


def _point(rest: _Rest, count: int, attempt: Attempt) -> dict[str, Any]:
    accuracy, latency = attempt.report.document["accuracy"], attempt.report.document["latency"]
    left = rest.int8(count)
    macs = {node.name: node.macs for node in rest.ranking.nodes}
    known = [number for number in macs.values() if number is not None]
    share = sum(macs[name] or 0 for name in left) / sum(known) if len(known) == len(macs) and any(known) else None
    timed = latency["runners"].get(attempt.report.document["candidate"]["name"])
    return {
        "in_float": len(rest.order) - len(left),
        "in_int8": len(left),
        "int8_macs": share,
        "drop_points": accuracy["drop_points"],
        "interval": accuracy["interval"],
        "accuracy": accuracy["status"],
        "samples": accuracy["n"],
        "p50_ms": timed["p50_ms"] if timed else None,
        "ratios": {name: ratio["ratio"] for name, ratio in latency["ratios"].items()},
    }
