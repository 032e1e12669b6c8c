"""The bundle: the folder that a run leaves, complete or not at all.

::

    model.onnx        what the engine was built from (weights in model.onnx.data if they exceed 2 GB)
    engine.plan | …   what the target built; manifest.json names it
    recipe.yaml       the resolved recipe; compiling with it again makes the same bundle
    ranges.json       calibration ranges and where they came from (INT8 only)
    report.json       everything that was measured, raw samples included
    summary.txt       the same for a reader
    manifest.json     format version, SHA-256 of every file and of the checkpoint, versions, device, signature, verdict
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

import optkit
from optkit.errors import OptkitError, OutputError, UnavailableError, UsageError
from optkit.models import Engine, Feeds, OnnxModel, Signature
from optkit.recipe import Recipe
from optkit.report.text import render
from optkit.targets.cpu import this_cpu

if TYPE_CHECKING:
    from optkit.data import Data
    from optkit.pipeline import Stage
    from optkit.targets.base import Runner
    from optkit.validation import Report

FORMAT_VERSION = 1
EXTERNAL_DATA_BYTES = 1_900_000_000
"""Above this the weights go beside the ONNX file: protobuf ends at 2 GB."""

_SIGNATURE = TypeAdapter(Signature)


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk. Call it with arrays to run its engine.

    Attributes:
        path: the folder.
        manifest: what ``manifest.json`` holds.
    """

    path: Path
    manifest: Mapping[str, Any]

    @property
    def report(self) -> dict[str, Any]:
        """Everything that was measured."""
        document: dict[str, Any] = json.loads((self.path / "report.json").read_text(encoding="utf-8"))
        return document

    @property
    def summary(self) -> str:
        """The report as text for a reader."""
        return (self.path / "summary.txt").read_text(encoding="utf-8")

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe."""
        return Recipe.load(self.path / "recipe.yaml")

    @property
    def signature(self) -> Signature:
        """Inputs and outputs, with the ranges of dynamic dimensions."""
        return _SIGNATURE.validate_python(self.manifest["signature"])

    @cached_property
    def runner(self) -> Runner:
        """The engine, opened by its target; the recipe's threads apply.

        Raises:
            UnavailableError: the engine cannot run on this machine.
        """
        recipe = self.recipe
        engine = Engine(self.path / self.manifest["engine"], recipe.target.name, self.signature)
        return recipe.target.open(engine, recipe.threads or self.manifest["threads"])

    def __call__(self, *inputs: Any, **named: Any) -> dict[str, np.ndarray[Any, Any]]:
        """Run the engine.

        Args:
            inputs: one mapping of arrays by name, or the arrays in the order of the signature; anything that NumPy
                can view (NumPy arrays, CPU tensors). Shapes and dtypes are those of ``signature``.
            named: arrays by name.

        Returns:
            The outputs by name.
        """
        names = [spec.name for spec in self.signature.inputs]
        if len(inputs) == 1 and isinstance(inputs[0], Mapping):
            feeds = dict(inputs[0])
        elif len(inputs) <= len(names):
            feeds = dict(zip(names, inputs, strict=False))
        else:
            raise UsageError(f"the model has {len(names)} inputs ({', '.join(names)}), not {len(inputs)}")
        arrays: Feeds = {name: np.asarray(value) for name, value in {**feeds, **named}.items()}
        return self.runner.run(arrays)


def is_bundle(path: Path) -> bool:
    """Whether a folder looks like one that optkit wrote."""
    return (path / "manifest.json").is_file()


def write(
    folder: Path,
    stages: Sequence[Stage],
    recipe: Recipe,
    report: Report,
    provenance: Mapping[str, Any],
    data: Data | None,
    threads: int,
) -> Bundle:
    """Write a bundle into a new folder.

    Args:
        folder: does not exist yet; the caller moves it to where it belongs.
        stages: what the pipeline gave; the last ONNX model and the engine go into the bundle.
        provenance: where the checkpoint came from.
        data: its calibration and validation fingerprints go into the manifest.
        threads: what the recipe's threads came to.
    """
    folder.mkdir()
    onnx_models = [stage.model for stage in stages if isinstance(stage.model, OnnxModel)]
    final = stages[-1].model
    records: dict[str, Any] = {}
    if onnx_models:
        save_onnx(onnx_models[-1], folder / "model.onnx")
        records.update(onnx_models[-1].records)
    if isinstance(final, Engine):
        for file in (final.path, *(final.path.parent / name for name in final.records.get("files", ()))):
            shutil.move(file, folder / file.name)
        records["engine"] = dict(final.records)
    if "ranges" in records:
        _write_json(folder / "ranges.json", records.pop("ranges"))
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    _write_json(folder / "report.json", report.document)
    (folder / "summary.txt").write_text(render(report.document), encoding="utf-8")
    manifest = {
        "format_version": FORMAT_VERSION,
        "name": recipe.name,
        "verdict": report.verdict.status,
        "target": recipe.target.name,
        "engine": final.path.name if isinstance(final, Engine) else "model.onnx",
        "signature": _SIGNATURE.dump_python(final.signature, mode="json"),
        "checkpoint": _absolute(provenance),
        "data": {split: data.fingerprint(split) for split in ("calibration", "validation")} if data else None,
        "seed": recipe.seed,
        "threads": threads,
        "records": records,
        "versions": {**_versions(), **recipe.target.versions()},
        "machine": {"platform": platform.platform(), "processor": this_cpu().name},
        "files": {file.name: _digest(file) for file in sorted(folder.iterdir())},
    }
    _write_json(folder / "manifest.json", manifest)
    return Bundle(folder, manifest)


def _absolute(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The path as `optkit validate` can follow it from any folder."""
    path = provenance.get("path")
    return {**provenance, "path": str(Path(path).resolve()) if path else None}


def save_onnx(model: OnnxModel, path: Path) -> None:
    """Write an ONNX file, with its weights beside it where they exceed what protobuf holds."""
    import onnx_ir as ir

    size = sum(value.const_value.nbytes for value in model.ir.graph.initializers.values() if value.const_value)
    external = f"{path.name}.data" if size > EXTERNAL_DATA_BYTES else None
    ir.save(model.ir, path, external_data=external)


def load(path: str | Path) -> Bundle:
    """Open a bundle; ``verify`` checks it.

    Raises:
        UsageError: the folder is not a bundle, or one of another format version.
    """
    path = Path(path)
    if not path.is_dir():
        raise UsageError(f"{path}: there is no such bundle")
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        found = manifest["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: not an optkit bundle: its manifest.json cannot be read ({error})") from error
    if found != FORMAT_VERSION:
        raise UsageError(
            f"{path}: bundle format {found}, but this optkit reads format {FORMAT_VERSION}: compile it again"
        )
    return Bundle(path, manifest)


def move(folder: Path, to: Path, force: bool) -> None:
    """Put a finished bundle where it belongs, in one rename.

    Raises:
        OutputError: something is there, and it is not a bundle that may be replaced.
    """
    old = None
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        if to.exists():
            if not (force and is_bundle(to)):
                raise OutputError(f"{to} exists already: choose another --out")
            old = folder.with_name(f"{folder.name}.old")
            to.rename(old)
        folder.rename(to)
    except OSError as error:
        raise OutputError(f"{to} cannot be written: {error.strerror}; choose another --out") from error
    finally:
        # Also after Ctrl-C between the two renames
        if old is not None and old.exists() and not to.exists():
            old.rename(to)


@dataclass(frozen=True)
class Problem:
    """What ``verify`` found, how to mend it, and the exit code it stands for."""

    what: str
    mend: str
    exit_code: int = 2


def verify(path: str | Path) -> list[Problem]:
    """Check a bundle on the machine where it will run: every file's hash, the versions, and that the engine answers.

    Returns:
        The problems, none if all is well.

    Raises:
        UsageError: the folder is not a bundle.
    """
    bundle = load(path)
    problems = _check_files(bundle)
    if problems:
        return problems
    problems = _check_versions(bundle)
    try:
        signature = bundle.signature
        feeds = signature.random_feeds(np.random.default_rng(0))
        outputs = bundle(feeds)
    except (ValidationError, OptkitError) as error:
        unavailable = isinstance(error, UnavailableError)
        what = f"the engine does not run here: {error}"
        return [*problems, Problem(what, "run it where its target is", 4) if unavailable else Problem(what, _AGAIN)]
    for spec in signature.outputs:
        if spec.name not in outputs:
            problems.append(Problem(f"the engine does not give the output {spec.name!r}", _AGAIN))
        elif not np.isfinite(outputs[spec.name].astype(np.float64)).all():
            problems.append(Problem(f"the output {spec.name!r} is not finite on random inputs", _AGAIN))
    return problems


_AGAIN = "compile it again from its checkpoint with its recipe.yaml"


def _check_files(bundle: Bundle) -> list[Problem]:
    problems = []
    listed = dict(bundle.manifest["files"])
    for name, expected in listed.items():
        file = bundle.path / name
        if not file.is_file():
            problems.append(Problem(f"{name} is missing", _AGAIN))
        elif _digest(file) != expected:
            problems.append(Problem(f"{name} is not the file that was written: its SHA-256 differs", _AGAIN))
    for file in sorted(bundle.path.iterdir()):
        if file.name not in (*listed, "manifest.json"):
            problems.append(Problem(f"{file.name} does not belong to the bundle", "delete it"))
    return problems


def _check_versions(bundle: Bundle) -> list[Problem]:
    """A plan or an optimized graph belongs to the runtime that made it."""
    problems = []
    here = bundle.recipe.target.versions()
    for package, found in here.items():
        built = bundle.manifest["versions"].get(package)
        if built is not None and built != found:
            problems.append(
                Problem(
                    f"the engine was built by {package} {built}, but {found} is here",
                    f"{_AGAIN}, or install {package}=={built}",
                )
            )
    return problems


def _digest(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"sha256": digest.hexdigest(), "bytes": path.stat().st_size}


def _versions() -> dict[str, str]:
    found = {"optkit": optkit.__version__, "python": platform.python_version()}
    for package in ("torch", "onnx", "onnx-ir", "onnxscript", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _write_json(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
