"""The door: every way of using optkit makes a recipe and calls ``compile``."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from optkit import bundle as bundles
from optkit.bundle import Bundle
from optkit.context import Context, Progress, silent
from optkit.data import open_data, random_data
from optkit.errors import CheckpointError, GateError, OutputError, UsageError
from optkit.failures import reason
from optkit.journal import collected_warnings
from optkit.models import DimRange, OnnxModel, Signature, TorchModel
from optkit.passes.graph_edit import infer_missing_types
from optkit.pipeline import Stage, run_passes, with_original
from optkit.quantize.linter import Finding, is_quantized
from optkit.quantize.linter import lint as judge_pairs
from optkit.quantize.placement import name_nodes
from optkit.quantize.sensitivity import JUDGED, Sensitivity
from optkit.quantize.sensitivity import sensitivity as rank_layers
from optkit.recipe import Recipe
from optkit.search import Attempt, can_help, roll_back
from optkit.source import load_model, recognise
from optkit.source.reading import damaged
from optkit.targets.onnxruntime import open_onnx
from optkit.targets.pytorch import open_torch
from optkit.validation import Report
from optkit.validation import validate as judge
from optkit.validation.contest import Contest, Entrant
from optkit.validation.memory import Memory
from optkit.validation.twin import build_twin
from optkit.validation.validator import compare_entrants
from optkit.worth import weigh

if TYPE_CHECKING:
    import torch

    from optkit.data import Data
    from optkit.targets import AnyTarget
    from optkit.targets.base import Runner

M = TypeVar("M", bound=TorchModel | OnnxModel)


def compile(
    model: str | Path | torch.nn.Module | OnnxModel | None,
    recipe: Recipe | str | Path,
    out: str | Path,
    *,
    force: bool = False,
    progress: Progress = silent,
) -> Bundle:
    """Run a recipe on a model and write the bundle to ``out`` if the gate passes.

    Passes that train keep their state in the folder ``<out>.resume`` until the bundle is written: after a crash or a
    signal, the same call goes on where the last one was.

    Args:
        model: path of a checkpoint, a PyTorch module (it is not changed), or None for the recipe's own checkpoint.
        recipe: a recipe, the path of one, or a preset's name (``fp32``, ``fp16``, ``bf16``, ``int8``).
        out: the folder to write; its name must be free, unless ``force`` is given and it is an optkit bundle.
        force: replace the bundle that is at ``out``.
        progress: draws a progress bar over long loops.

    Returns:
        The bundle, with its report and its verdict.

    Raises:
        GateError: the gate was missed or is inconclusive. Nothing is at ``out``; the whole result, report included,
            is in the folder ``<out>.rejected``.
        OptkitError: anything else that went wrong; nothing was left behind.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    out = Path(out)
    _check_free(out, force)
    if model is None and recipe.model.checkpoint is None:
        raise UsageError("there is no model: name a checkpoint, or set model.checkpoint in the recipe")
    with _staging(out) as folder, collected_warnings() as warnings, cpu_threads(recipe.threads) as threads:
        data = open_data(recipe.data, recipe.seed) if recipe.data else None
        loaded = load_model(model or recipe.model.checkpoint or "", recipe, data.inputs if data else ())
        start = fit_to_data(loaded.model, data, recipe) if data else loaded.model
        scratch = folder / "scratch"
        scratch.mkdir()
        resume = out.with_name(f"{out.name}.resume")
        context = Context(recipe.target, scratch, data, recipe.seed, threads, progress, resume=resume)
        context = with_original(context, start)
        judging = replace(context, data=data or random_data(start.signature, recipe.seed))

        stages = run_passes(recipe.passes, start, context)
        twin, memory = build_twin(stages, recipe, context), Memory()

        def judged(stages: Sequence[Stage], by: Recipe) -> Report:
            return judge(stages, by, judging, twin, memory)

        before_judging = list(warnings)
        attempt = Attempt(recipe, stages, judged(stages, recipe))
        if can_help(attempt):
            attempt = roll_back(attempt, context, judged)
        attempt = weigh(attempt, twin, context, judged)
        recipe, stages, report = attempt.recipe, attempt.stages, attempt.report
        report.document["warnings"] = before_judging + report.document["warnings"]
        report.document["passes"] = [{"name": stage.name, "seconds": stage.seconds} for stage in stages[1:]]
        bundle = bundles.write(folder / "bundle", stages, recipe, report, loaded.provenance, data, threads)
        shutil.rmtree(resume, ignore_errors=True)
        if report.verdict.status != "passed":
            rejected = out.with_name(out.name + ".rejected")
            bundles.move(bundle.path, rejected, force=True)
            message = f"{_verdict(report)} The result is in {rejected}; nothing was written to {out}"
            raise GateError(message, bundles.load(rejected))
        bundles.move(bundle.path, out, force=force)
    return bundles.load(out)


def validate(
    candidate: str | Path | torch.nn.Module | OnnxModel,
    baseline: str | Path | torch.nn.Module | OnnxModel | None = None,
    recipe: Recipe | str | Path | None = None,
    *,
    progress: Progress = silent,
) -> Report:
    """Compare a bundle or a model with a baseline: accuracy, latency and the gate, without compiling anything.

    Args:
        candidate: a bundle, or whatever ``compile`` takes as a model.
        baseline: the model that says what is right; None for the checkpoint that the bundle was compiled from.
        recipe: its ``data``, ``validation``, ``gate``, ``model`` and ``inputs`` apply; None for the bundle's own.

    Returns:
        The report; ``report.verdict.status`` is ``passed``, ``missed`` or ``inconclusive``.

    Raises:
        OptkitError: one of the two cannot be opened, or they do not have the same inputs and outputs.
    """
    bundle = None
    if isinstance(candidate, str | Path) and bundles.is_bundle(Path(candidate)):
        bundle = bundles.load(candidate)
    if recipe is None:
        recipe = bundle.recipe if bundle else Recipe.load("fp32")
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    if baseline is None:
        baseline = bundle.manifest["checkpoint"].get("path") if bundle else None
        if baseline is None:
            raise UsageError("there is nothing to compare with: name a --baseline")
    with contextlib.ExitStack() as opened:
        threads = opened.enter_context(cpu_threads(recipe.threads))
        data = open_data(recipe.data, recipe.seed) if recipe.data else None

        def enter(name: str, model: Any) -> Entrant:
            loaded = load_model(model, recipe, data.inputs if data else ()).model
            runner: Runner = (
                open_onnx(loaded, threads) if isinstance(loaded, OnnxModel) else open_torch(loaded, threads)
            )
            return Entrant(name, opened.enter_context(runner))

        rival = enter("baseline", baseline)
        judged = Entrant("candidate", opened.enter_context(bundle.runner)) if bundle else enter("candidate", candidate)
        samples = data or random_data(rival.runner.signature, recipe.seed)
        context = Context(recipe.target, Path(), samples, recipe.seed, threads, progress)
        contest = Contest((rival,), judged, rival.name, what=str(candidate))
        return compare_entrants(contest, context, recipe.validation, recipe.gate, recipe.name)


def sensitivity(
    model: str | Path | torch.nn.Module | OnnxModel | None,
    recipe: Recipe | str | Path = "int8",
    *,
    samples: int | None = None,
    progress: Progress = silent,
) -> Sensitivity:
    """Rank the layers that a recipe's ``quantize_int8`` would put into INT8 by the error that each adds.

    The passes before it run first, so the names are those that its ``exclude`` takes. Of its accuracy algorithms only
    smoothing runs: rounding and bias correction depend on what is in INT8.

    Args:
        model: whatever ``compile`` takes.
        recipe: one with ``quantize_int8`` and ``data``.
        samples: how many calibration samples; None for as many as the recipe takes.
        progress: draws a progress bar over long loops.

    Raises:
        OptkitError: the recipe, the model or the data does not fit.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    if recipe.int8 is None:
        raise UsageError("the recipe has no quantize_int8 pass, so there is no INT8 layer to rank: add it")
    if model is None and recipe.model.checkpoint is None:
        raise UsageError("there is no model: name a checkpoint, or set model.checkpoint in the recipe")
    index, step = recipe.int8
    before = recipe.passes[:index]
    fewer = {} if samples is None else {"samples": samples}
    settings = {"batch_size": min(step.calibrate.batch_size, JUDGED), **fewer}
    step = step.model_copy(update={"calibrate": step.calibrate.model_copy(update=settings)})
    with tempfile.TemporaryDirectory() as scratch, cpu_threads(recipe.threads) as threads:
        data = open_data(recipe.data, recipe.seed) if recipe.data else None
        loaded = load_model(model or recipe.model.checkpoint or "", recipe, data.inputs if data else ()).model
        start = fit_to_data(loaded, data, recipe) if data else loaded
        context = Context(recipe.target, Path(scratch), data, recipe.seed, threads, progress)
        ready = isinstance(start, OnnxModel) and not any(one.takes == "onnx" for one in before)
        floats = start if ready else run_passes(before, start, context)[-1].model
        assert isinstance(floats, OnnxModel)  # recipes are refused whose quantize_int8 gets anything else
        step.requires(floats, context)
        return rank_layers(step.calibrated(floats, context), context)


def lint(path: str | Path, target: AnyTarget) -> tuple[Finding, ...]:
    """Judge the INT8 of an ONNX file, whoever quantized it, by what a target wants.

    Nodes without a name go by their type and their place in the graph, as ``Conv_12``.

    Args:
        path: an ONNX file, or a bundle.
        target: what the model is meant for.

    Raises:
        CheckpointError: the file cannot be read or is no ONNX.
        UsageError: the target has no INT8, or the model nothing quantized.
    """
    import onnx_ir as ir

    policy = target.dialect.int8
    if policy is None:
        raise UsageError(f"the target {target.name!r} has no INT8 to judge by: choose another --target")
    file = Path(path) / "model.onnx" if bundles.is_bundle(Path(path)) else Path(path)
    if (kind := recognise(file)) != "onnx":
        raise CheckpointError(f"{file}: is {kind}, and the linter reads ONNX: compile it first, or export it")
    try:
        model = OnnxModel(ir.load(file), Signature((), ()))
    except Exception as error:
        raise damaged(file, f"not a whole ONNX model ({reason(error)})") from error
    if not is_quantized(model):
        raise UsageError(f"{file}: nothing in it is quantized, so there is nothing to judge: quantize it first")
    name_nodes(model)
    try:
        infer_missing_types(model.ir)
        return judge_pairs(model, policy)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: its weights are in {error.filename}, which is not there; copy both") from error


def fit_to_data(model: M, data: Data, recipe: Recipe) -> M:
    """Tune dynamic dimensions that the recipe says nothing of for the sizes that the calibration samples have.

    The batch stays as it is: how many samples run together is not the data's business.
    """
    signature = model.signature
    free = [dim for dim in signature.dynamic if dim != signature.batch and dim not in recipe.dims]
    if not free:
        return model
    seen: dict[str, list[int]] = {dim: [] for dim in free}
    for batch in data.batches("calibration", 1, _SIZES_SEEN):
        for spec in signature.inputs:
            for dim, size in zip(spec.shape, batch.feeds[spec.name].shape, strict=True):
                if dim in seen:
                    seen[str(dim)].append(size)
    ranges = dict(signature.dims)
    for dim, sizes in seen.items():
        known = signature.range(dim)
        longest = max(known.max, *sizes)
        ranges[dim] = DimRange(known.min, min(max(int(np.median(sizes)), known.min), longest), longest)
    return replace(model, signature=replace(signature, dims=ranges))


_SIZES_SEEN = 32
"""How many calibration samples tell the sizes of dynamic dimensions."""


def _verdict(report: Report) -> str:
    what = {"missed": "the gate was missed", "inconclusive": "the gate is inconclusive"}[report.verdict.status]
    return f"{what}: {' '.join(reason.rstrip('.') + '.' for reason in report.verdict.reasons)}"


def _check_free(out: Path, force: bool) -> None:
    if not out.exists() and not out.is_symlink():
        return
    if not force:
        raise OutputError(f"{out} exists already: choose another --out, or replace it with --force")
    if not bundles.is_bundle(out):
        raise OutputError(
            f"{out} exists and is not an optkit bundle, so --force will not replace it: choose another --out"
        )


@contextlib.contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A folder beside ``out``, on the same file system, that is gone afterwards."""
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=parent))
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {parent}: {error.strerror}; choose another --out") from error
    try:
        yield folder
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OutputError(
                f"{out} cannot be written: {error.strerror}; make room in {parent}, or choose another --out"
            ) from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def cpu_threads(wanted: int | None) -> Iterator[int]:
    """How many threads to use, set for PyTorch while the run lasts."""
    import torch

    threads = wanted or _physical_cores()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield threads
    finally:
        torch.set_num_threads(before)


def _physical_cores() -> int:
    """Physical cores that this process may use: a second thread on a core slows matrix kernels down."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    allowed = os.sched_getaffinity(0)
    siblings = set()
    for cpu in allowed:
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(topology.read_text() if topology.exists() else str(cpu))
    return max(1, len(siblings))
