"""Everyone who can run a model on this machine, timed side by side: one interleaved run for every batch size.

The rounds, the warm-up and the intervals are the validator's (``validation.latency``). Each contestant opens at exactly
the batch size that is measured, so an engine that is tuned for shapes is tuned for that one.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from optkit.compiler import cpu_threads, fit_to_data
from optkit.context import Context, Progress, silent
from optkit.data import Data, open_data, random_data
from optkit.errors import OptkitError, UnavailableError, UsageError, did_you_mean
from optkit.failures import reason
from optkit.models import DimRange, Engine, Feeds, OnnxModel, Signature, TorchModel
from optkit.numerics import compare
from optkit.passes.base import Pass
from optkit.passes.build_engine import BuildEngine
from optkit.pipeline import run_passes
from optkit.recipe import Recipe
from optkit.report.benchmark import render
from optkit.source import load_model
from optkit.targets import AnyTarget
from optkit.targets.base import Runner
from optkit.targets.pytorch import open_torch
from optkit.targets.pytorch_cuda import Mode, TorchCudaRunner
from optkit.targets.tensorrt_runner import TensorRtRunner
from optkit.validation.contest import Contest, Entrant
from optkit.validation.latency import Timings, latency_document, latency_feeds, measure_latency
from optkit.validation.statistics import Interval, median_of_rounds, percentile_needs, ratio_of_rounds

if TYPE_CHECKING:
    import torch

SCHEMA_VERSION = 1

TORCH = "torch"

PLATFORMS = (TORCH, "onnxruntime", "onnxruntime-cuda", "tensorrt", "tensorrt-rtx")
"""Whom a model can be timed on: PyTorch, and every target."""

BATCHES = (1, 8, 32, 128)

BOUND_PERCENTILE = 95
"""What a latency bound is a bound of: one call in twenty may take longer."""

_TARGET: TypeAdapter[Any] = TypeAdapter(AnyTarget)


@dataclass(frozen=True)
class Contestant:
    """Who is timed.

    Attributes:
        name: in the table.
        open: opens it for the sizes of a signature; raises an ``OptkitError`` where it cannot run.
    """

    name: str
    open: Callable[[Signature], Runner]


@dataclass(frozen=True)
class Row:
    """What one contestant's calls took at one batch size.

    Attributes:
        median: of a call, in seconds.
        p95: in seconds; None with too few calls for it.
        speed: how many times as fast as ``against``; None for the first on its device, which the others are held to.
        cosine: of the outputs with those of the first contestant.
        calls_at_once: how many calls were under way while each was timed.
    """

    contestant: str
    batch: int
    device: str
    calls: int
    median: Interval
    p95: float | None
    against: str
    speed: Interval | None
    cosine: float
    calls_at_once: int = 1

    @property
    def throughput(self) -> float:
        """Samples per second."""
        return self.calls_at_once * self.batch / self.median.estimate

    def meets(self, bound: float) -> bool | None:
        """Whether the 95th percentile is within a bound in seconds; None if there are too few calls to tell."""
        if self.p95 is not None:
            return self.p95 <= bound
        return False if self.median.low > bound else None


@dataclass(frozen=True)
class Bench:
    """What was measured.

    Attributes:
        rows: by batch size, then in the order of the contestants.
        not_run: why a contestant has no row, by its name, by its name and the batch size, or by the batch size.
        document: everything, JSON-serializable, raw samples included.
        interrupted: whether Ctrl-C came before the last batch size was done.
    """

    rows: tuple[Row, ...]
    not_run: Mapping[str, str]
    document: dict[str, Any]
    interrupted: bool = False

    @property
    def summary(self) -> str:
        """The tables, for a reader."""
        return render(self.document)

    def best_within(self, bound: float) -> dict[str, Row | None]:
        """By contestant: the row with the highest throughput that meets a latency bound in seconds, if one does."""
        found: dict[str, Row | None] = dict.fromkeys(row.contestant for row in self.rows)
        for row in self.rows:
            best = found[row.contestant]
            if row.meets(bound) and (best is None or row.throughput > best.throughput):
                found[row.contestant] = row
        return found


def bench(
    model: str | Path | torch.nn.Module | OnnxModel | None,
    recipes: Sequence[Recipe | str | Path] = ("fp32",),
    *,
    on: Sequence[str] = PLATFORMS,
    batches: Sequence[int] | None = None,
    contexts: Sequence[int] = (1,),
    transfers: bool = False,
    bound: float | None = None,
    progress: Progress = silent,
) -> Bench:
    """Time a model on several platforms, in several precisions, at several batch sizes.

    PyTorch runs eagerly in float32; where there is a GPU it runs there, and in FP16 with the channels last too, as a
    CUDA graph and compiled. Every other platform is a target, which takes part once with every recipe. Who cannot run
    here is left out with the reason. Ctrl-C after the first batch size gives what has been measured by then.

    Args:
        model: whatever ``compile`` takes.
        recipes: what is made of the model, as recipes or names of presets; a recipe's options for a target apply there.
            The first one's ``data``, ``inputs``, ``dims``, ``model``, ``seed``, ``threads``, ``validation.latency`` and
            ``gate.confidence`` apply to everyone.
        on: names from ``PLATFORMS``; the first that runs is what the others on its device are held to.
        batches: the sizes of the batch; None for ``BATCHES``, or for the only one that the model takes.
        contexts: how many calls at once, on targets that have execution contexts (TensorRT); each number is a
            contestant.
        transfers: a row more for what can be timed with its copies from and to pinned host memory (TensorRT).
        bound: a latency in seconds; the table then says which batch keeps to it.
        progress: draws a progress bar over long loops.

    Raises:
        UnavailableError: nobody can run here.
        UsageError: the model does not take one of the batch sizes, or a platform is not known.
        OptkitError: the model, the data or a recipe cannot be read.
    """
    for platform in on:
        if platform not in PLATFORMS:
            raise UsageError(f"there is nothing called {platform!r} to run on: {did_you_mean(platform, PLATFORMS)}")
    loaded = [recipe if isinstance(recipe, Recipe) else Recipe.load(recipe) for recipe in recipes]
    if not loaded:
        raise UsageError("there is no recipe: name one, or a precision")
    names = [recipe.name for recipe in loaded]
    if len(set(names)) < len(names) or len(set(on)) < len(on):
        raise UsageError(
            f"each row needs a name of its own, not {', '.join((*names, *on))}: give every recipe a `name`"
        )
    first = loaded[0]
    source = model or first.model.checkpoint
    if source is None:
        raise UsageError("there is no model: name a checkpoint, or set model.checkpoint in the recipe")
    with tempfile.TemporaryDirectory() as scratch, cpu_threads(first.threads) as threads:
        data = open_data(first.data, first.seed) if first.data else None
        start, sizes = _load(source, first, data, batches)
        context = Context(first.target, Path(scratch), data, first.seed, threads, progress)
        exports = _Exports(start)
        contestants = [one for platform in on for one in _contestants(platform, exports, loaded, contexts, context)]
        heats = _heats(contestants, start.signature, sizes, first, context, transfers)
    return _reported(heats, sizes[len(heats) :], contestants, first, start.signature, bound)


# Who takes part


def _contestants(
    platform: str, exports: _Exports, recipes: Sequence[Recipe], contexts: Sequence[int], context: Context
) -> Iterator[Contestant]:
    if platform == TORCH:
        yield from _torch(exports.start, context)
        return
    for recipe in recipes:
        target = recipe.target if recipe.target.name == platform else _TARGET.validate_python({"name": platform})
        name = f"{platform} {recipe.name}"
        if "contexts" not in type(target).model_fields:
            yield Contestant(name, _Graph(recipe, exports, replace(context, target=target)).open)
            continue
        most = target.model_copy(update={"contexts": max(contexts)})
        graph = _Graph(recipe, exports, replace(context, target=most))
        for count in contexts:
            opened = partial(graph.open, contexts=count)
            yield Contestant(name + (f", {count} at once" if count > 1 else ""), opened)


def _torch(start: TorchModel | OnnxModel, context: Context) -> Iterator[Contestant]:
    import torch

    if not torch.cuda.is_available():
        yield Contestant("PyTorch fp32", lambda signature: open_torch(_module(start, signature), context.threads))
        return
    images = any(len(spec.shape) == 4 for spec in start.signature.inputs)

    def on_gpu(name: str, half: bool, mode: Mode) -> Contestant:
        def opened(signature: Signature) -> Runner:
            return TorchCudaRunner(_module(start, signature), half, half and images, mode)

        return Contestant(name, opened)

    layout = " channels_last" if images else ""
    yield on_gpu("PyTorch fp32", False, "eager")
    yield on_gpu(f"PyTorch fp16{layout}", True, "eager")
    yield on_gpu(f"PyTorch fp16{layout} CUDA graph", True, "graph")
    yield on_gpu(f"PyTorch fp16{layout} compiled", True, "compile")


def _module(start: TorchModel | OnnxModel, signature: Signature) -> TorchModel:
    if isinstance(start, OnnxModel):
        raise UnavailableError("the model came as ONNX: PyTorch needs a checkpoint or a module")
    return replace(start, signature=signature)


class _Graph:
    """What a recipe makes of the model for a target: made when it is first wanted, built anew for every size."""

    def __init__(self, recipe: Recipe, exports: _Exports, context: Context) -> None:
        self._passes = [step for step in recipe.passes if not isinstance(step, BuildEngine)]
        self._exports, self._context = exports, context
        self._made: OnnxModel | OptkitError | None = None
        self._engine: Engine | None = None

    def open(self, signature: Signature, contexts: int | None = None) -> Runner:
        """Open the engine for these sizes, where the target has them with so many ``contexts`` of those it is for."""
        target = self._context.target
        available = target.can_run()
        if not available.ok:
            raise UnavailableError(f"{available.reason}; {available.mend}")
        if self._engine is None or self._engine.signature != signature:
            graph = replace(self._graph(), signature=signature)
            folder = Path(tempfile.mkdtemp(dir=self._context.scratch))
            self._engine = BuildEngine(target=target).run(graph, replace(self._context, scratch=folder))
        if contexts is not None:
            target = target.model_copy(update={"contexts": contexts})
        return target.open(self._engine, self._context.threads)

    def _graph(self) -> OnnxModel:
        if self._made is None:
            try:
                self._made = self._exports.after(self._passes, self._context)
            except OptkitError as error:
                self._made = error
        if isinstance(self._made, OptkitError):
            raise self._made
        return self._made


class _Exports:
    """What recipes make of one model. Recipes that begin with the same export share it."""

    def __init__(self, start: TorchModel | OnnxModel) -> None:
        self.start = start
        self._exported: dict[str, OnnxModel] = {}

    def after(self, passes: Sequence[Pass[Any, Any]], context: Context) -> OnnxModel:
        """The ONNX model after all passes."""
        if isinstance(self.start, OnnxModel) or not passes or passes[0].gives != "onnx":
            return _onnx(passes, self.start, context)
        head, rest = passes[0], passes[1:]
        head.requires(self.start, context)  # another target may refuse what the first one took
        key = head.model_dump_json()
        if key not in self._exported:
            self._exported[key] = _onnx([head], self.start, context)
        return _onnx(rest, self._exported[key], context)


def _onnx(passes: Sequence[Pass[Any, Any]], model: TorchModel | OnnxModel, context: Context) -> OnnxModel:
    if isinstance(model, OnnxModel) and not any(step.takes == "onnx" for step in passes):
        return model
    made = run_passes(passes, model, context)[-1].model
    assert isinstance(made, OnnxModel)  # recipes are refused whose build_engine gets anything else
    return made


# The model and its sizes


def _load(
    source: Any, recipe: Recipe, data: Data | None, batches: Sequence[int] | None
) -> tuple[TorchModel | OnnxModel, tuple[int, ...]]:
    """The model, and the batch sizes that it is to run at; its range is widened to them where the file allows."""
    inputs = data.inputs if data else ()
    model = load_model(source, recipe, inputs).model
    dim = model.signature.batch
    if dim is None:
        return model, _only_batch(model.signature, batches)
    sizes = tuple(dict.fromkeys(batches or BATCHES))
    if min(sizes) < 1:
        raise UsageError(f"a batch has at least one sample, not {min(sizes)}")
    known = model.signature.range(dim)
    if min(sizes) < known.min or max(sizes) > known.max:
        wide = DimRange(min(known.min, *sizes), known.opt, max(known.max, *sizes))
        model = load_model(source, recipe.model_copy(update={"dims": {**recipe.dims, dim: wide}}), inputs).model
    return (fit_to_data(model, data, recipe) if data else model), sizes


def _only_batch(signature: Signature, batches: Sequence[int] | None) -> tuple[int, ...]:
    fronts = {spec.shape[0] if spec.shape else 1 for spec in signature.inputs}
    front = fronts.pop() if len(fronts) == 1 else 1
    size = front if isinstance(front, int) else 1
    if batches and set(batches) != {size}:
        raise UsageError(
            f"the model's batch is fixed at {size}: ask for --batch {size}, or export it with a dynamic first dimension"
        )
    return (size,)


def _at(signature: Signature, batch: int) -> Signature:
    """The signature at one batch size."""
    if signature.batch is None:
        return signature
    return replace(signature, dims={**signature.dims, signature.batch: DimRange(batch, batch, batch)})


# One batch size


@dataclass(frozen=True)
class _Heat:
    rows: tuple[Row, ...]
    batch: int
    not_run: Mapping[str, str]
    latency: dict[str, Any] | None


def _heats(
    contestants: Sequence[Contestant],
    signature: Signature,
    sizes: Sequence[int],
    recipe: Recipe,
    context: Context,
    transfers: bool,
) -> list[_Heat]:
    """One batch size after the other, until Ctrl-C. Builds take minutes: what is measured by then is kept."""
    heats: list[_Heat] = []
    try:
        for batch in sizes:
            heats.append(_run(contestants, _at(signature, batch), recipe, context, transfers))
    except KeyboardInterrupt:
        if not any(heat.rows for heat in heats):
            raise
    return heats


def _run(
    contestants: Sequence[Contestant], signature: Signature, recipe: Recipe, context: Context, transfers: bool
) -> _Heat:
    """Open everyone who can run, and time them in the same interleaved rounds."""
    samples = context.data or random_data(signature, context.seed)
    feeds, _ = latency_feeds(signature, samples, context)
    not_run: dict[str, str] = {}
    outputs: dict[str, Feeds] = {}
    entrants = []
    with contextlib.ExitStack() as opened:
        for contestant in context.progress(contestants, "building engines", len(contestants)):
            try:
                runner = opened.enter_context(contestant.open(signature))
                outputs[contestant.name] = runner.run(feeds)
            except OptkitError as error:
                not_run[contestant.name] = str(error)
            except RuntimeError as error:  # whatever PyTorch says of a GPU that is full, or cannot compile
                not_run[contestant.name] = reason(error)
            else:
                entrants.append(Entrant(contestant.name, runner))
                if transfers and isinstance(runner, TensorRtRunner):
                    entrants.append(Entrant(f"{contestant.name}, with transfers", runner.with_transfers()))
                    outputs[entrants[-1].name] = outputs[contestant.name]
        batch = signature.range(signature.batch).opt if signature.batch else _only_batch(signature, None)[0]
        if not entrants:
            return _Heat((), batch, not_run, None)
        contest = Contest(tuple(entrants[1:]), entrants[0], entrants[0].name)
        settings, confidence = recipe.validation.latency, recipe.gate.confidence
        latency = measure_latency(contest, samples, context, settings, confidence)
    rows = tuple(_rows(entrants, latency.timings, outputs, batch, confidence, context))
    document = latency_document(latency, settings)
    if context.data is None:
        document["feeds"] = "random values"
    return _Heat(rows, batch, not_run, document)


def _rows(
    entrants: Sequence[Entrant],
    timings: Mapping[str, Timings],
    outputs: Mapping[str, Feeds],
    batch: int,
    confidence: float,
    context: Context,
) -> Iterator[Row]:
    leaders: dict[str, str] = {}  # by device: latencies of two devices make no ratio
    for name in (entrant.name for entrant in entrants):
        timed = timings[name]
        leader = leaders.setdefault(timed.environment.device, name)
        rng = context.rng(f"bench {name} {batch}")
        yield Row(
            contestant=name,
            batch=batch,
            device=timed.environment.device,
            calls=len(timed.samples),
            median=median_of_rounds(timed.rounds, confidence, rng),
            p95=timed.percentile(BOUND_PERCENTILE),
            against=leader,
            speed=None if leader == name else ratio_of_rounds(timings[leader].rounds, timed.rounds, confidence, rng),
            cosine=compare(outputs[entrants[0].name], outputs[name]).cosine,
            calls_at_once=timed.environment.calls_at_once,
        )


# The report


def _reported(
    heats: Sequence[_Heat],
    left: Sequence[int],
    contestants: Sequence[Contestant],
    recipe: Recipe,
    signature: Signature,
    bound: float | None,
) -> Bench:
    rows = tuple(row for heat in heats for row in heat.rows)
    not_run = _not_run(heats, contestants) | {f"batch {size}": "interrupted" for size in left}
    alike: dict[str, list[str]] = {}
    for name, why in not_run.items():
        alike.setdefault(why, []).append(name)
    if not rows:
        told = "; ".join(f"{', '.join(names)}: {why}" for why, names in alike.items())
        raise UnavailableError(f"nobody can run this model here: {told}")
    document = {
        "schema_version": SCHEMA_VERSION,
        "inputs": {spec.name: str(spec) for spec in signature.inputs},
        "confidence": recipe.gate.confidence,
        "heats": [
            {"batch": heat.batch, "rows": [_row_document(row) for row in heat.rows], "latency": heat.latency}
            for heat in heats
        ],
        "not_run": [{"contestants": names, "why": why} for why, names in alike.items()],
    }
    found = Bench(rows, not_run, document, interrupted=bool(left))
    if bound is not None:
        document["bound"] = _bound_document(found, bound)
    return found


def _not_run(heats: Sequence[_Heat], contestants: Sequence[Contestant]) -> dict[str, str]:
    """Why someone has no row: once if it is the same at every batch size."""
    told: dict[str, str] = {}
    for name in (contestant.name for contestant in contestants):
        reasons = {heat.batch: heat.not_run[name] for heat in heats if name in heat.not_run}
        if len(reasons) == len(heats) and len(set(reasons.values())) == 1:
            told[name] = next(iter(reasons.values()))
        else:
            told.update({f"{name}, batch {batch}": why for batch, why in reasons.items()})
    return told


def _row_document(row: Row) -> dict[str, Any]:
    return {
        "contestant": row.contestant,
        "device": row.device,
        "calls": row.calls,
        "median_ms": 1e3 * row.median.estimate,
        "interval_ms": [1e3 * row.median.low, 1e3 * row.median.high],
        "reliable": row.median.reliable,
        "method": row.median.method,
        "p95_ms": None if row.p95 is None else 1e3 * row.p95,
        "throughput_per_s": row.throughput,
        "against": row.against,
        "speed": None if row.speed is None else row.speed.estimate,
        "speed_interval": None if row.speed is None else [row.speed.low, row.speed.high],
        "cosine": row.cosine,
    }


def _bound_document(found: Bench, bound: float) -> dict[str, Any]:
    open_ones = [row for row in found.rows if row.meets(bound) is None]
    return {
        "ms": 1e3 * bound,
        "percentile": BOUND_PERCENTILE,
        "best": {
            name: {"batch": row.batch, "p95_ms": 1e3 * (row.p95 or 0), "throughput_per_s": row.throughput}
            if row
            else None
            for name, row in found.best_within(bound).items()
        },
        "undecided": [{"contestant": row.contestant, "batch": row.batch, "calls": row.calls} for row in open_ones],
        "calls_needed": percentile_needs(BOUND_PERCENTILE),
    }
