"""Builds the engine of a bundle anew, on the machine where it will run, from the ONNX model in the bundle."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optkit import bundle as bundles
from optkit.bundle import Bundle, Problem
from optkit.compiler import cpu_threads
from optkit.context import Context, Progress, silent
from optkit.emulation import halves_in_float32
from optkit.errors import BuildError, OutputError, UsageError
from optkit.models import Engine, OnnxModel
from optkit.numerics import compare
from optkit.passes.build_engine import BuildEngine
from optkit.pipeline import run_passes
from optkit.recipe import Recipe
from optkit.targets.onnxruntime import open_onnx
from optkit.validation.stages import TOLERANCES, precision_of

if TYPE_CHECKING:
    from optkit.targets.base import Target


def rebuild(path: str | Path, *, progress: Progress = silent) -> Bundle:
    """Build a bundle's engine again where ``verify`` finds that it does not fit; a bundle that fits stays as it is.

    The new engine takes the old one's place only when it is whole and, where it can run, computes what the ONNX model
    computes. Its manifest says under ``rebuilt`` what was there before: the report is still that of the first engine,
    and ``optkit validate`` judges the new one.

    Args:
        path: the bundle.
        progress: draws a progress bar over the build.

    Raises:
        UsageError: the bundle is damaged in a way that no build mends.
        UnavailableError: the target cannot build on this machine.
        BuildError: the engine cannot be built, or computes something else than its model.
        OutputError: the folder cannot be written.
    """
    path = Path(path).resolve()
    problems = bundles.verify(path)
    wanted = [problem for problem in problems if problem.changes is not None]
    if not wanted:
        return bundles.load(path)
    hopeless = [problem for problem in problems if problem.changes is None]
    if hopeless:
        told = "; ".join(f"{problem.what}; {problem.mend}" for problem in hopeless)
        raise UsageError(f"{path}: building the engine again does not mend it: {told}")
    old = bundles.load(path)
    recipe = _changed(old.recipe, wanted)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as aside:
            bundle = _built(old, recipe, Path(aside), wanted, progress)
            bundles.move(bundle.path, path, force=True)
    except OSError as error:
        raise OutputError(
            f"{path} cannot be replaced: {error.strerror or error}; make room in {path.parent}"
        ) from error
    return bundles.load(path)


def _changed(recipe: Recipe, problems: Sequence[Problem]) -> Recipe:
    changes: dict[str, Any] = {}
    for problem in problems:
        changes.update(problem.changes or {})
    return recipe.updated(target={**recipe.target.model_dump(mode="json"), **changes}) if changes else recipe


def _built(old: Bundle, recipe: Recipe, aside: Path, why: Sequence[Problem], progress: Progress) -> Bundle:
    """The whole new bundle in a folder aside."""
    folder, scratch = aside / "bundle", aside / "scratch"
    scratch.mkdir()
    former = bundles.engine_files(old)
    shutil.copytree(old.path, folder, ignore=lambda where, names: [name for name in names if name in former])
    with cpu_threads(recipe.threads or old.manifest["threads"]) as threads:
        model = bundles.read_onnx(old)
        context = Context(recipe.target, scratch, seed=recipe.seed, threads=threads, progress=progress)
        engine = run_passes([BuildEngine(target=recipe.target)], model, context)[-1].model
        assert isinstance(engine, Engine)  # that is what the pass gives
        _compare(engine, model, recipe.target, context)
    bundles.take_engine(engine, folder)
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    return bundles.seal(folder, _manifest(old.manifest, engine, recipe, why))


def _compare(engine: Engine, model: OnnxModel, target: Target, context: Context) -> None:
    """Refuse an engine that computes something else than its model, where this machine can tell."""
    if not target.can_run().ok:
        return
    feeds = engine.signature.random_feeds(context.rng("rebuild"))
    precision = precision_of(model)
    rounded = halves_in_float32(model)
    with target.open(engine, context.threads) as new, open_onnx(rounded, context.threads, optimize=False) as reference:
        found = compare(reference.run(feeds), new.run(feeds))
    if not TOLERANCES[precision].holds(found):
        raise BuildError(
            f"the engine that was built here differs from its {precision} ONNX model on random inputs ({found}), and "
            "was not taken: compile the checkpoint again on this machine"
        )


def _manifest(old: Mapping[str, Any], engine: Engine, recipe: Recipe, why: Sequence[Problem]) -> dict[str, Any]:
    tools = recipe.target.versions()
    before = {
        "why": [problem.what for problem in why],
        "versions": {name: old["versions"].get(name) for name in tools},
        "machine": old["machine"],
        "engine": old["records"].get("engine", {}),
    }
    return {
        **old,
        "engine": engine.path.name,
        "records": {**old["records"], "engine": dict(engine.records)},
        "versions": {**old["versions"], **tools},
        "machine": bundles.this_machine(),
        "rebuilt": [*old.get("rebuilt", ()), before],
    }
