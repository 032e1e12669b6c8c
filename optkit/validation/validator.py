"""Runs the whole comparison and puts everything that was measured into one JSON-serializable document."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optkit.context import Context
from optkit.data import Data, RandomData
from optkit.emulation import has_halves
from optkit.errors import DataError, UnavailableError
from optkit.journal import collected_warnings
from optkit.models import Engine, OnnxModel, Signature, TorchModel
from optkit.numerics import Difference
from optkit.pipeline import Stage, run_passes
from optkit.recipe import Gate, Recipe, ValidationSettings
from optkit.targets.base import Runner
from optkit.targets.onnxruntime import open_onnx
from optkit.targets.pytorch import open_torch
from optkit.validation.accuracy import Accuracy, batch_size_for, measure_accuracy, whole_batches
from optkit.validation.contest import Contest, Entrant
from optkit.validation.gate import Verdict, judge, judge_accuracy
from optkit.validation.latency import latency_document, measure_latency
from optkit.validation.memory import Memory
from optkit.validation.stages import (
    TOLERANCES,
    StageError,
    compare_stages,
    first_past_tolerance,
    open_as_meant,
    precision_of,
)
from optkit.validation.statistics import Interval
from optkit.validation.twin import QUANTIZED, NoTwin, Twin

log = logging.getLogger("optkit.validation")

SCHEMA_VERSION = 1

PYTORCH, ONNX, OPTIMIZED = "PyTorch", "FP32 ONNX", "optimized FP32 ONNX"
WHOLE = "optimized FP32 checkpoint"
ENGINE, STAND_IN = "engine", "ONNX (not the engine)"
"""How reports name the entrants of a recipe's validation."""

KEPT = "kept_float32"
"""The record of a cast to FP16 or BF16: which nodes stay in float32, and why."""

PRUNED = ("pruning", "sparsity")
"""The records of what went from a PyTorch model, and of what became zero."""

INSPECTOR = "inspector"
"""The record of an engine whose layers were read: what computes in which precision, and from which nodes."""


@dataclass(frozen=True)
class Report:
    """What the validator found.

    Attributes:
        verdict: the gate's answer.
        document: everything, JSON-serializable: numbers, raw latency samples, settings.
    """

    verdict: Verdict
    document: dict[str, Any]


def validate(
    stages: Sequence[Stage],
    recipe: Recipe,
    context: Context,
    twin: Twin | NoTwin | None = None,
    memory: Memory | None = None,
) -> Report:
    """Validate what a recipe's passes made.

    The baselines are the PyTorch checkpoint, if there is one, and the ONNX model that came in or that the checkpoint
    gives when it is exported as it is. What optimizing the float graph gains is no merit of a pass that prunes or
    lowers the precision, so what the recipe makes without that pass is timed too and is what ``gate.min_speedup``
    counts from: the twin of an INT8 engine, else the optimized checkpoint if it was pruned or trained, else the last
    float32 ONNX model. The candidate is the engine; if it cannot run on this machine, the ONNX model that it was built
    from stands in for it, and the report says so.

    Args:
        stages: the checkpoint first, the engine (or the last ONNX model) last.
        recipe: its ``validation``, ``gate`` and ``target``.
        context: the data, the seed, the threads.
        twin: of the INT8 engine, if it is one.
        memory: of what the scored baselines gave, where several results are compared with the same ones.

    Raises:
        CheckpointError: the checkpoint itself gives NaN.
        DataError: there are fewer validation samples than the model takes at a time.
    """
    data, settings = _data(context), recipe.validation
    with contextlib.ExitStack() as opened, collected_warnings(log.name) as warnings:
        contest = _contest(stages, recipe, context, twin, memory or Memory(0), opened)
        engine = contest.candidate.runner if contest.candidate.name == ENGINE else None
        size = batch_size_for(contest.signature, settings.batch_size)
        whole = -(-settings.stage_samples // size) * size  # a static batch has to be full
        few = list(whole_batches(data, contest.signature, size, whole))
        errors = compare_stages(stages, few, context, engine, contest.why_not)
        report = compare_entrants(contest, context, settings, recipe.gate, recipe.name, errors)
    report.document["warnings"] = warnings
    for name in (KEPT, *PRUNED, INSPECTOR):
        record = next((dict(s.model.records[name]) for s in reversed(stages) if name in s.model.records), None)
        if record is not None:
            report.document[name] = record
    return report


def compare_entrants(
    contest: Contest,
    context: Context,
    settings: ValidationSettings,
    gate: Gate,
    name: str = "comparison",
    stages: Sequence[StageError] = (),
) -> Report:
    """Compare runners that are already open: accuracy, latency, gate.

    Args:
        contest: the entrants.
        context: the data, the seed, the threads.
        settings: how much is measured.
        gate: what must hold.
        name: what the report calls the comparison.
        stages: the error of each stage of the pipeline, if there was one.
    """
    data = _data(context)
    with collected_warnings(log.name) as warnings:
        accuracy = measure_accuracy(contest, data, context, settings.batch_size, settings.samples, gate.confidence)
        latency = measure_latency(contest, data, context, settings.latency, gate.confidence)
        verdict = judge(contest, accuracy, latency, gate)
        past = first_past_tolerance(stages)
        _warn(contest, accuracy, data, past)
    document = {
        "schema_version": SCHEMA_VERSION,
        "recipe": name,
        "model": _signature_document(contest.signature),
        "samples": {**data.fingerprint("validation"), "count": accuracy.samples},
        "candidate": {
            "name": contest.candidate.name,
            "what": contest.what,
            "engine_ran": contest.why_not is None,
            "why_not": contest.why_not,
        },
        "accuracy": _accuracy_document(contest, accuracy, gate),
        "stages": [_stage_document(stage) for stage in stages],
        "first_past_tolerance": past.name if past else None,
        "latency": latency_document(latency, settings.latency),
        "gate": gate.model_dump(mode="json"),
        "verdict": {"status": verdict.status, "reasons": list(verdict.reasons)},
        "warnings": warnings,
        "environment": _environment_document(contest, context),
    }
    return Report(verdict, document)


def _data(context: Context) -> Data:
    if context.data is None:
        raise DataError(
            "there is nothing to validate on: add a `data:` section to the recipe, or hand over random data"
        )
    return context.data


def _contest(
    stages: Sequence[Stage],
    recipe: Recipe,
    context: Context,
    twin: Twin | NoTwin | None,
    memory: Memory,
    opened: contextlib.ExitStack,
) -> Contest:
    onnx_models = [stage.model for stage in stages if isinstance(stage.model, OnnxModel)]
    baselines = []
    if isinstance(stages[0].model, TorchModel):
        eager = opened.enter_context(open_torch(stages[0].model, context.threads))
        baselines.append(Entrant(PYTORCH, memory.of(PYTORCH, eager)))
    whole = _floats_of_checkpoint(stages, recipe, context)
    given = whole[0] if whole else onnx_models[0]
    precision = precision_of(given)
    rival = ONNX if precision == "float32" else f"ONNX as given ({precision})"
    # Fused INT8 kernels that saturate are right for engines of ONNX Runtime, which have them too
    fused = precision != "int8" or recipe.target.name == "onnxruntime"
    source = opened.enter_context(open_onnx(given, context.threads, optimize=fused))
    baselines.append(Entrant(rival, memory.of(rival, source)))
    candidate, what, why_not = _candidate(stages[-1].model, onnx_models[-1], recipe, context)
    opened.enter_context(candidate.runner)
    if len(whole) > 1:
        rival = WHOLE
        baselines.append(Entrant(rival, opened.enter_context(open_onnx(whole[-1], context.threads)), scored=False))
    optimized = None if whole else _last_float(onnx_models)
    quantized = any(stage.name == QUANTIZED for stage in stages)
    if isinstance(twin, Twin) and quantized and why_not is None:
        rival = twin.name
        baselines.append(Entrant(rival, opened.enter_context(twin.open(context.threads)), scored=False))
    elif optimized is not None:
        rival = OPTIMIZED
        baselines.append(Entrant(rival, opened.enter_context(open_onnx(optimized, context.threads)), scored=False))
    return Contest(tuple(baselines), candidate, rival, what, why_not)


def _floats_of_checkpoint(stages: Sequence[Stage], recipe: Recipe, context: Context) -> tuple[OnnxModel, ...]:
    """What the recipe's float passes make of the checkpoint itself, where others changed it before the export.

    What pruning gains counts from the last of them: what optimizing the graph gains is no merit of pruning either.
    """
    checkpoint = stages[0].model
    if not any(isinstance(stage.model, TorchModel) and stage.model is not checkpoint for stage in stages):
        return ()
    floats = [
        step
        for step, stage in zip(recipe.passes, stages[1:], strict=False)
        if isinstance(stage.model, OnnxModel) and precision_of(stage.model) == "float32"
    ]
    made = (stage.model for stage in run_passes(floats, checkpoint, context))
    models = [model for model in made if isinstance(model, OnnxModel)]
    return tuple({id(model): model for model in models}.values())


def _last_float(models: Sequence[OnnxModel]) -> OnnxModel | None:
    """The last float32 model before the precision fell, unless that is the first one or it never fell."""
    floats = [model for model in models if precision_of(model) == "float32"]
    fell = bool(floats) and floats[-1] is not models[-1]
    return floats[-1] if fell and floats[-1] is not models[0] else None


def _candidate(last: Any, source: OnnxModel, recipe: Recipe, context: Context) -> tuple[Entrant, str, str | None]:
    """Who is judged, what that is, and why it is not the engine, if it is not."""
    precision = precision_of(source)
    if not isinstance(last, Engine):
        return Entrant("ONNX", open_onnx(source, context.threads)), f"{precision} ONNX on ONNX Runtime", None
    try:
        runner: Runner = recipe.target.open(last, context.threads)
    except UnavailableError as error:
        how = "on ONNX Runtime"
        if has_halves(source):
            how += " in float32 with every half-precision value rounded"
        what = f"the {precision} ONNX model that the {last.target} engine was built from, {how}"
        return Entrant(STAND_IN, open_as_meant(source, recipe.target, context.threads)), what, str(error)
    return Entrant(ENGINE, runner), f"{precision} engine for {last.target}", None


def _warn(contest: Contest, accuracy: Accuracy, data: Data, past: StageError | None) -> None:
    if contest.why_not is not None:
        log.warning("the engine did not run here (%s): the accuracy is that of %s", contest.why_not, contest.what)
    if isinstance(data, RandomData):
        log.warning("the inputs are random numbers, which prove little: give the recipe data of the model's own kind")
    elif not accuracy.labelled:
        log.warning(
            "%s looks at no labels: it tells how alike the outputs are, not how right they are", accuracy.metric
        )
    if past is not None and past.error is not None:
        tolerance = TOLERANCES[past.precision]
        log.warning(
            "stage %s is the first past tolerance for %s: SQNR %.1f dB (%g wanted), cosine %.5f (%g wanted)%s",
            past.name,
            past.precision,
            past.error.sqnr_db,
            tolerance.sqnr_db,
            past.error.cosine,
            tolerance.cosine,
            f", worst in output {past.error.worst!r}" if len(past.error.outputs) > 1 else "",
        )


def _signature_document(signature: Signature) -> dict[str, Any]:
    return {
        "inputs": {spec.name: str(spec) for spec in signature.inputs},
        "outputs": {spec.name: str(spec) for spec in signature.outputs},
    }


def _accuracy_document(contest: Contest, accuracy: Accuracy, gate: Gate) -> dict[str, Any]:
    reference, candidate = contest.reference.name, contest.candidate.name
    drop = accuracy.drops.get(reference)
    return {
        "metric": accuracy.metric,
        "labelled": accuracy.labelled,
        "n": accuracy.samples,
        "reference": reference,
        "baseline": _finite(accuracy.scores.get(reference)),
        "candidate": _finite(accuracy.scores.get(candidate)),
        "confidence": gate.confidence,
        **(_drop_document(drop) if drop else {"drop_points": None, "interval": None, "method": None}),
        "others": {
            baseline.name: {
                "score": _finite(accuracy.scores[baseline.name]),
                **_drop_document(accuracy.drops[baseline.name]),
            }
            for baseline in contest.baselines[1:]
            if baseline.name in accuracy.drops
        },
        "broken": accuracy.broken,
        "status": judge_accuracy(contest, accuracy, gate).status,
        "reachable": bool(accuracy.no_drop is None or accuracy.no_drop.high <= gate.max_drop / 100),
        "per_output": _outputs_document(accuracy.outputs) if accuracy.outputs else {},
    }


def _drop_document(drop: Interval) -> dict[str, Any]:
    return {
        "drop_points": _finite(100 * drop.estimate),
        "interval": [_finite(100 * drop.low), _finite(100 * drop.high)],
        "method": drop.method,
    }


def _stage_document(stage: StageError) -> dict[str, Any]:
    tolerance = stage.tolerance
    return {
        "name": stage.name,
        "precision": stage.precision,
        "reference": stage.reference,
        "tolerance": {"sqnr_db": tolerance.sqnr_db, "cosine": tolerance.cosine} if tolerance else None,
        "within": stage.within,
        "why_not": stage.why_not,
        "error": _difference_document(stage.error) if stage.error else None,
        "per_output": _outputs_document(stage.error) if stage.error else {},
    }


def _outputs_document(error: Difference) -> dict[str, Any]:
    return {name: _difference_document(output) for name, output in error.outputs.items()}


def _difference_document(error: Difference) -> dict[str, Any]:
    """JSON has no infinity: an SQNR of null is told apart by ``equal``."""
    return {
        "equal": error.sqnr_db == math.inf,
        "sqnr_db": _finite(error.sqnr_db),
        "cosine": _finite(error.cosine),
        "max_abs": _finite(error.max_abs),
        "max_rel": _finite(error.max_rel),
        "nonfinite": error.nonfinite,
    }


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _environment_document(contest: Contest, context: Context) -> dict[str, Any]:
    runners: Mapping[str, Runner] = {entrant.name: entrant.runner for entrant in contest.entrants}
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": context.threads,
        "seed": context.seed,
        "runners": {
            name: {
                "device": runner.environment.device,
                "runtime": runner.environment.runtime,
                "settings": dict(runner.environment.settings),
            }
            for name, runner in runners.items()
        },
    }
