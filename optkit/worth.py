"""Is INT8 worth it? Compares an engine with its twin, names the regions that do not pay, and does what the gate says.

The twin was timed in the same rounds as the engine. INT8 pays if the engine is faster with the gate's confidence; where
it does not, both are profiled in turns, and the regions between Quantize and Dequantize are judged in the same way.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from optkit.context import Context
from optkit.data import random_data
from optkit.errors import OptkitError, PreconditionError
from optkit.models import Engine, OnnxModel
from optkit.passes.quantize_int8 import QuantizeInt8
from optkit.pipeline import Stage, run_passes
from optkit.search import Attempt, Judge
from optkit.targets.profiling import LayerTime, Profiles
from optkit.validation import Report, Verdict
from optkit.validation.latency import latency_feeds, speed_verdict
from optkit.validation.regions import PartTime, RegionTime, find_regions, time_regions
from optkit.validation.statistics import rounds_needed
from optkit.validation.twin import QUANTIZED, NoTwin, Twin

log = logging.getLogger("optkit.worth")

MOST_ROLLBACKS = 2
"""How many times nodes of regions that do not pay go back to float."""

PROFILED_SECONDS = 0.1
"""How long an engine is profiled in each round, within the limits of calls."""

CALLS = (4, 50)
"""Fewest and most calls of a profile: each kernel of each call is a line in a file."""

_NAMED = 5
"""How many regions the verdict names."""


def weigh(attempt: Attempt, twin: Twin | NoTwin | None, context: Context, judge: Judge) -> Attempt:
    """Add to a report whether INT8 pays, and if it does not, do what ``gate.slow_int8`` says.

    Args:
        attempt: what the recipe made, validated with the twin beside it.
        twin: from ``build_twin``; with None there is no INT8 and nothing to weigh.
        context: that of the passes; a rollback builds into a folder of its own in the scratch folder.
        judge: validates stages by a recipe.

    Returns:
        The attempt or what takes its place, with the section ``int8`` in its report.
    """
    if twin is None:
        return attempt
    if isinstance(twin, NoTwin):
        return _unmeasured(attempt, _document(None, None, twin.why))
    weighed, wanted = _Weighed.of(attempt, twin, context), attempt.recipe.gate.slow_int8
    if weighed.pays is None:
        return _unmeasured(attempt, weighed.document)
    if weighed.pays:
        return weighed.explained()
    if wanted == "report":
        return weighed.explained([f"gate.slow_int8 can give the {twin.name} instead (twin){_rest(weighed.losing)}."])
    return _instead(weighed, judge) if wanted == "twin" else _rolled_back(weighed, context, judge)


def _rest(losing: Sequence[str]) -> str:
    return f", or put what loses time there, {_nodes(len(losing))}, back into float (rollback)" if losing else ""


def _nodes(count: int) -> str:
    return "1 node" if count == 1 else f"{count} nodes"


def _unmeasured(attempt: Attempt, section: Mapping[str, Any]) -> Attempt:
    why = f"gate.slow_int8 did nothing: INT8 was not timed beside its twin ({section['why_not']})."
    return _explained(attempt, section, () if attempt.recipe.gate.slow_int8 == "report" else (why,))


@dataclass(frozen=True)
class _Weighed:
    """An attempt beside its twin.

    Attributes:
        pays: whether INT8 is shown to be faster; None if that was not measured.
        why_not: why it was not.
        ratio: how many times as fast as the twin it is, as the report has it.
        regions: what profiles say of the regions, if INT8 does not pay.
        no_regions: why they say nothing.
    """

    attempt: Attempt
    twin: Twin
    pays: bool | None
    why_not: str | None = None
    ratio: Mapping[str, Any] | None = None
    regions: tuple[RegionTime, ...] = ()
    no_regions: str | None = None

    @classmethod
    def of(cls, attempt: Attempt, twin: Twin, context: Context) -> _Weighed:
        document = attempt.report.document
        ratio = document["latency"]["ratios"].get(twin.name)
        if ratio is None:
            return cls(attempt, twin, None, document["candidate"]["why_not"] or "it was not timed")
        if not ratio["reliable"]:
            least = rounds_needed(attempt.recipe.gate.confidence)
            return cls(attempt, twin, None, f"{ratio['rounds']} rounds tell nothing, {least} are needed", ratio)
        if ratio["verdict"] == "faster":
            return cls(attempt, twin, True, None, ratio)
        try:
            regions, no_regions = _profiled(attempt, twin, context), None
        except OptkitError as error:  # what is faster or slower is known; only where it is so is not
            regions, no_regions = (), str(error)
        if not regions and no_regions is None:
            no_regions = f"{attempt.recipe.target.name} tells no times of single layers"
        return cls(attempt, twin, False, None, ratio, regions, no_regions)

    @property
    def slow(self) -> tuple[RegionTime, ...]:
        """Regions that are not shown to be faster, the slowest first."""
        slow = [time for time in self.regions if speed_verdict(time.speedup) != "faster"]
        return tuple(sorted(slow, key=lambda time: time.speedup.estimate))

    @property
    def losing(self) -> tuple[str, ...]:
        """Nodes of these regions that are better off in float."""
        return tuple(name for time in self.slow for name in time.losing)

    @property
    def facts(self) -> str:
        """What was measured, as a sentence."""
        assert self.ratio is not None  # asked for only where it was measured
        low, high = self.ratio["interval"]
        how = "is slower than" if self.ratio["verdict"] == "slower" else "is not shown to be faster than"
        return (
            f"INT8 {how} its {self.twin.name}: {self.ratio['ratio']:.2f} times as fast, with "
            f"{100 * self.attempt.recipe.gate.confidence:g} % confidence from {low:.2f} to {high:.2f}"
        )

    @property
    def reasons(self) -> tuple[str, ...]:
        """What the verdict says if INT8 does not pay."""
        if self.pays is not False:
            return ()
        where = "" if not self.slow else f" Regions that do not pay: {_named(self.slow)}."
        if self.regions and not self.slow:
            where = " Each of its regions alone is faster: what they gain is lost around them."
        return (f"{self.facts}.{where}",)

    @property
    def document(self) -> dict[str, Any]:
        return _document(self.twin.name, self.pays, self.why_not) | {
            "ratio": self.ratio["ratio"] if self.ratio else None,
            "interval": list(self.ratio["interval"]) if self.ratio else None,
            "regions": [_region_document(time) for time in self.regions],
            "regions_why_not": self.no_regions,
        }

    def explained(self, more: Sequence[str] = (), **fields: Any) -> Attempt:
        """The attempt with all of this in its report."""
        return _explained(self.attempt, {**self.document, **fields}, (*self.reasons, *more))


def _document(twin: str | None, pays: bool | None, why_not: str | None) -> dict[str, Any]:
    return {
        "twin": twin,
        "pays": pays,
        "why_not": why_not,
        "ratio": None,
        "interval": None,
        "regions": [],
        "regions_why_not": None,
        "done": "report",
        "rollbacks": [],
    }


def _explained(attempt: Attempt, section: Mapping[str, Any], reasons: Sequence[str]) -> Attempt:
    before = attempt.report
    verdict = Verdict(before.verdict.status, (*before.verdict.reasons, *reasons))
    document = {
        **before.document,
        "verdict": {"status": verdict.status, "reasons": list(verdict.reasons)},
        "int8": dict(section),
    }
    return replace(attempt, report=Report(verdict, document))


# Where the time goes


def _profiled(attempt: Attempt, twin: Twin, context: Context) -> tuple[RegionTime, ...]:
    target, engine = attempt.recipe.target, attempt.stages[-1].model
    if not isinstance(target, Profiles) or not isinstance(engine, Engine) or twin.engine is None:
        return ()
    models = [stage.model for stage in attempt.stages if isinstance(stage.model, OnnxModel)]
    quantized = attempt.stages[_place(attempt.stages)].model
    assert isinstance(quantized, OnnxModel)  # quantize_int8 gives no other
    data = context.data or random_data(engine.signature, context.seed)
    feeds, _ = latency_feeds(engine.signature, data, context)
    calls = _calls(attempt)
    our_rounds: list[tuple[LayerTime, ...]] = []
    their_rounds: list[tuple[LayerTime, ...]] = []
    with (
        target.profiler(engine, models[-1], context.threads) as ours,
        target.profiler(twin.engine, twin.model, context.threads) as theirs,
    ):
        count = rounds_needed(attempt.recipe.gate.confidence)
        for number in context.progress(range(count), "time by layer", count):
            turns = [(ours, our_rounds), (theirs, their_rounds)]
            for profiler, kept in turns if number % 2 == 0 else reversed(turns):
                kept.append(profiler.layers(feeds, calls))
    regions, rng = find_regions(twin.floats, quantized), context.rng("time by layer")
    return time_regions(regions, our_rounds, their_rounds, attempt.recipe.gate.confidence, rng)


def _calls(attempt: Attempt) -> int:
    document = attempt.report.document
    seconds: float = 1e-3 * document["latency"]["runners"][document["candidate"]["name"]]["median_ms"]
    return min(max(round(PROFILED_SECONDS / seconds), CALLS[0]), CALLS[1])


def _place(stages: Sequence[Stage]) -> int:
    return next(i for i, stage in enumerate(stages) if stage.name == QUANTIZED)


def _named(times: Sequence[RegionTime]) -> str:
    shown = ", ".join(f"{time.region.name} ({time.speedup.estimate:.2f} times as fast)" for time in times[:_NAMED])
    return shown if len(times) <= _NAMED else f"{shown} and {len(times) - _NAMED} more"


def _region_document(time: RegionTime) -> dict[str, Any]:
    return {
        "name": time.region.name,
        "nodes": list(time.region.nodes),
        "pays": speed_verdict(time.speedup) == "faster",
        "int8_ms": 1e3 * time.int8,
        "twin_ms": 1e3 * time.twin,
        "ratio": time.speedup.estimate,
        "interval": [time.speedup.low, time.speedup.high],
        "better_in_float": list(time.losing) if speed_verdict(time.speedup) != "faster" else [],
        "parts": [_part_document(part, time) for part in time.parts],
    }


def _part_document(part: PartTime, time: RegionTime) -> dict[str, Any]:
    name = next((name for name in part.nodes if name in time.region.nodes), part.nodes[0])
    return {"name": name, "nodes": list(part.nodes), "int8_ms": 1e3 * part.int8, "twin_ms": 1e3 * part.twin}


# What is done about it


def _instead(weighed: _Weighed, judge: Judge, because: str = "") -> Attempt:
    """The twin, validated by its own gate."""
    twin = weighed.twin
    why = f"{weighed.facts}{because}, so this is the {twin.name}: the recipe without quantize_int8 (gate.slow_int8)"
    log.warning("%s", why)
    last = max(i for i, stage in enumerate(twin.stages) if isinstance(stage.model, OnnxModel))
    model = twin.model.with_record("instead_of_int8", {"why": why, **{k: weighed.document[k] for k in _SUMMARY}})
    stages = tuple(replace(stage, model=model) if i == last else stage for i, stage in enumerate(twin.stages))
    recipe = twin.recipe.model_copy(update={"description": f"{twin.recipe.description} [{why}]".strip()})
    made = _with_search(Attempt(recipe, stages, judge(stages, recipe)), weighed.attempt)
    return _explained(made, {**weighed.document, "done": "twin"}, (f"{why}.",))


_SUMMARY = ("twin", "pays", "ratio", "interval")


def _rolled_back(first: _Weighed, context: Context, judge: Judge) -> Attempt:
    """The fastest of what comes of putting what loses time in slow regions back into float, once or twice."""
    tried = [first]
    while len(tried) <= MOST_ROLLBACKS and tried[-1].pays is False and tried[-1].losing:
        if {*tried[-1].losing} == {name for time in tried[-1].regions for name in time.region.nodes}:
            return _instead(first, judge, ", and no part of it gains more than it costs to enter and leave INT8")
        try:
            again = _again(tried[-1], context, judge)
        except PreconditionError:  # what is left in INT8 makes no sense for the target without the others
            return _instead(first, judge, ", and without the nodes that lose time there is nothing left in INT8")
        tried.append(_Weighed.of(again, first.twin, context))
    if len(tried) == 1:
        return first.explained(["Nothing went back to float (gate.slow_int8): no layer is known to lose time."])
    rollbacks = [_rollback_document(one) for one in tried]
    chosen = max(tried, key=lambda one: one.ratio["interval"][0] if one.ratio else -math.inf)
    if chosen is first:
        why = "To put what loses time back into float was tried (gate.slow_int8), and made nothing faster."
        return first.explained([why], rollbacks=rollbacks)
    back = len(_step(chosen.attempt).exclude) - len(_step(first.attempt).exclude)
    why = f"{first.facts}, so {_nodes(back)} that lost time went back to float (gate.slow_int8)."
    return chosen.explained([why], done="rollback", rollbacks=rollbacks)


def _again(slow: _Weighed, context: Context, judge: Judge) -> Attempt:
    """Run the rest of the pipeline anew with what loses time left out of INT8."""
    recipe, stages = slow.attempt.recipe, slow.attempt.stages
    log.warning("%s: back to float with what loses time, %s", slow.facts, _nodes(len(slow.losing)))
    step = _step(slow.attempt)
    without = step.model_copy(update={"exclude": (*step.exclude, *slow.losing)})
    split = recipe.passes.index(step)
    recipe = recipe.model_copy(update={"passes": (*recipe.passes[:split], without, *recipe.passes[split + 1 :])})
    scratch = context.scratch / f"without-{len(without.exclude)}"
    scratch.mkdir()
    before = stages[: _place(stages)]
    made = run_passes(recipe.passes[split:], before[-1].model, replace(context, scratch=scratch))
    after = (*before, *made[1:])
    return _with_search(Attempt(recipe, after, judge(after, recipe)), slow.attempt)


def _step(attempt: Attempt) -> QuantizeInt8:
    assert attempt.recipe.int8 is not None  # only INT8 has a twin
    return attempt.recipe.int8[1]


def _rollback_document(one: _Weighed) -> dict[str, Any]:
    accuracy = one.attempt.report.document["accuracy"]
    drop = {"drop_points": accuracy["drop_points"], "accuracy": accuracy["status"]}
    return {"excluded": list(_step(one.attempt).exclude), **{k: one.document[k] for k in _SUMMARY}, **drop}


def _with_search(attempt: Attempt, before: Attempt) -> Attempt:
    """What the search for accuracy showed stays in the report."""
    search = before.report.document.get("search")
    if search is None:
        return attempt
    document = {**attempt.report.document, "search": search}
    return replace(attempt, report=Report(attempt.report.verdict, document))
