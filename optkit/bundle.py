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
from optkit.errors import OptkitError, OutputError, UsageError
from optkit.models import Engine, OnnxModel, Signature
from optkit.recipe import Recipe
from optkit.report.text import render
from optkit.targets.arrays import as_numpy, lies_on_gpu
from optkit.targets.base import quote
from optkit.targets.cpu import recorded_cpu, this_cpu

if TYPE_CHECKING:
    from optkit.data import Data
    from optkit.pipeline import Stage
    from optkit.targets.base import Runner
    from optkit.validation import Report

FORMAT_VERSION = 1
MODEL_FILE = "model.onnx"

MANIFEST_FILE = "manifest.json"

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

    @property
    def engine(self) -> Engine:
        """The engine's file, with the records of its build."""
        records = self.manifest["records"].get("engine", {})
        return Engine(self.path / self.manifest["engine"], self.manifest["target"], self.signature, records)

    @cached_property
    def runner(self) -> Runner:
        """The engine, opened by its target; the recipe's threads apply.

        Raises:
            UnavailableError: the engine cannot run on this machine.
        """
        recipe = self.recipe
        return recipe.target.open(self.engine, recipe.threads or self.manifest["threads"])

    def __call__(self, *inputs: Any, **named: Any) -> dict[str, Any]:
        """Run the engine.

        Args:
            inputs: one mapping of arrays by name, or the arrays in the order of the signature: NumPy arrays, CPU
                tensors, whatever has ``__dlpack__``, and, where the engine runs on a GPU, what lies there and has
                ``__cuda_array_interface__`` (it is copied within the GPU where the system shares GPU memory between
                processes, else through host memory). Shapes and dtypes are those of ``signature``.
            named: arrays by name.

        Returns:
            The outputs by name: NumPy arrays, which speak DLPack too; if an input lies on the GPU, arrays there that
            have ``__cuda_array_interface__``, and ``get()`` for a copy in host memory.

        Raises:
            UsageError: an input is missing, unknown, no array, not of the signature's dtype and shape, or lies on a GPU
                and the engine does not.
        """
        names = [spec.name for spec in self.signature.inputs]
        if len(inputs) == 1 and isinstance(inputs[0], Mapping):
            feeds = dict(inputs[0])
        elif len(inputs) <= len(names):
            feeds = dict(zip(names, inputs, strict=False))
        else:
            raise UsageError(f"the model has {len(names)} inputs ({', '.join(names)}), not {len(inputs)}")
        given = {**feeds, **named}
        # What lies on a GPU is the runner's business: one on the CPU refuses it
        return self.runner.run({n: value if lies_on_gpu(value) else as_numpy(value, n) for n, value in given.items()})


def is_bundle(path: Path) -> bool:
    """Whether a folder looks like one that optkit wrote."""
    return (path / MANIFEST_FILE).is_file()


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
        save_onnx(onnx_models[-1], folder / MODEL_FILE)
        records.update(onnx_models[-1].records)
    if isinstance(final, Engine):
        take_engine(final, folder)
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
        "engine": final.path.name if isinstance(final, Engine) else MODEL_FILE,
        "signature": _SIGNATURE.dump_python(final.signature, mode="json"),
        "checkpoint": _absolute(provenance),
        "data": {split: data.fingerprint(split) for split in ("calibration", "validation")} if data else None,
        "seed": recipe.seed,
        "threads": threads,
        "records": records,
        "versions": {**_versions(), **recipe.target.versions()},
        "machine": this_machine(),
    }
    return seal(folder, manifest)


def seal(folder: Path, manifest: Mapping[str, Any]) -> Bundle:
    """Write the manifest of a bundle whose files are all there, with the hash of each."""
    files = {file.name: _digest(file) for file in sorted(folder.iterdir()) if file.name != MANIFEST_FILE}
    _write_json(folder / MANIFEST_FILE, {**manifest, "files": files})
    return Bundle(folder, {**manifest, "files": files})


def this_machine() -> dict[str, str]:
    """What the manifest says of the machine that an engine was built on."""
    return {"platform": platform.platform(), "processor": this_cpu().name}


def take_engine(engine: Engine, folder: Path) -> None:
    """Move the files of a new engine into a bundle's folder."""
    for file in (engine.path, *(engine.path.parent / name for name in engine.records.get("files", ()))):
        shutil.move(file, folder / file.name)


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
        manifest = json.loads((path / MANIFEST_FILE).read_text(encoding="utf-8"))
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
    """What ``verify`` found, how to mend it, and the exit code it stands for.

    Attributes:
        what: what is wrong.
        mend: what to do about it.
        exit_code: 2 for a damaged bundle, 4 for one that does not fit this machine.
        changes: options of the target with which a new build on this machine mends it (``optkit.rebuild``); None if
            no build does.
    """

    what: str
    mend: str
    exit_code: int = 2
    changes: Mapping[str, Any] | None = None


def verify(path: str | Path) -> list[Problem]:
    """Check a bundle on the machine where it will run.

    Every file is the one that was written, the engine is one for these versions, this GPU and this processor, and it
    answers.

    Returns:
        The problems, none if all is well.

    Raises:
        UsageError: the folder is not a bundle.
    """
    bundle = load(path)
    problems = _check_files(bundle)
    if problems:
        return problems
    try:
        problems = [*_check_versions(bundle), *_check_machine(bundle), *_check_sums(bundle)]
        return problems or _check_answer(bundle)
    except ValidationError as error:
        return [Problem(f"manifest.json does not fit: {error}", _AGAIN)]


_AGAIN = "compile it again from its checkpoint with its recipe.yaml"

_REBUILD = "`optkit verify --rebuild` builds it again on this machine"

_SAME: Mapping[str, Any] = {}
"""The changes of a problem that a new build mends without any."""

_OVERFLOW = "W12"
"""The linter's rule of neighbouring weights whose products overflow 16 bits."""


def _check_files(bundle: Bundle) -> list[Problem]:
    problems = []
    listed = dict(bundle.manifest["files"])
    for name, expected in listed.items():
        file = bundle.path / name
        of_engine = name in engine_files(bundle)  # a damaged engine can be built again from what is whole
        mend, changes = _REBUILD if of_engine else _AGAIN, _SAME if of_engine else None
        if not file.is_file():
            problems.append(Problem(f"{name} is missing", mend, changes=changes))
        elif _digest(file) != expected:
            what = f"{name} is not the file that was written: its SHA-256 differs"
            problems.append(Problem(what, mend, changes=changes))
    for file in sorted(bundle.path.iterdir()):
        if file.name not in (*listed, MANIFEST_FILE):
            problems.append(Problem(f"{file.name} does not belong to the bundle", "delete it"))
    return problems


def engine_files(bundle: Bundle) -> tuple[str, ...]:
    """The names of the files that the target built; none if the recipe built no engine."""
    name = bundle.manifest["engine"]
    beside = bundle.manifest["records"].get("engine", {}).get("files", ())
    return () if name == MODEL_FILE else (name, *beside)


def _check_versions(bundle: Bundle) -> list[Problem]:
    """A plan or an optimized graph belongs to the runtime that made it."""
    problems = []
    here = bundle.recipe.target.versions()
    for package, found in here.items():
        built = bundle.manifest["versions"].get(package)
        if built is not None and built != found:
            what = f"the engine was built by {package} {built}, but {found} is here"
            problems.append(Problem(what, f"{_REBUILD}, or install {package}=={built}", changes=_SAME))
    return problems


def _check_machine(bundle: Bundle) -> list[Problem]:
    """A plan belongs to a kind of GPU, an optimized graph may belong to a kind of processor."""
    misfit = bundle.recipe.target.misfit(bundle.engine)
    if misfit is None:
        return []
    mend = _AGAIN if misfit.changes is None else _REBUILD
    return [Problem(f"the engine does not fit this machine: {misfit.what}", mend, 4, misfit.changes)]


def _check_sums(bundle: Bundle) -> list[Problem]:
    """INT8 weights that were made where kernels sum exactly, on a processor whose kernels do not.

    Where the bundle was compiled on such a processor, what that costs is in its report already.
    """
    from optkit.quantize.linter import lint

    cpu = recorded_cpu(bundle.engine.records)
    if cpu is None or cpu.saturates_int8:
        return []
    target = bundle.recipe.target
    policy = target.dialect.int8
    if policy is None or not policy.sums_in_16_bits:
        return []
    found = [one.node for one in lint(read_onnx(bundle), policy) if one.rule == _OVERFLOW]
    if not found:
        return []
    what = (
        f"the INT8 weights of {quote(found)} were made for {cpu.name}, which sums their products exactly; the kernels "
        f"of {this_cpu().name} add them in 16 bits, where they overflow"
    )
    mend = f"{_REBUILD}, with exact and slower kernels; {_AGAIN} here to have fast ones"
    return [Problem(what, mend, 4, target.exact_sums)]


def _check_answer(bundle: Bundle) -> list[Problem]:
    signature = bundle.signature
    feeds = signature.random_feeds(np.random.default_rng(0))
    try:
        outputs = bundle(feeds)
    except OptkitError as error:
        what = f"the engine does not run here: {error}"
        available = bundle.recipe.target.can_run()
        if available.ok:
            return [Problem(what, _REBUILD, error.exit_code, _SAME)]
        return [Problem(what, available.mend, 4)]
    problems = []
    for spec in signature.outputs:
        if spec.name not in outputs:
            problems.append(Problem(f"the engine does not give the output {spec.name!r}", _REBUILD, changes=_SAME))
        elif not np.isfinite(outputs[spec.name].astype(np.float64)).all():
            problems.append(Problem(f"the output {spec.name!r} is not finite on random inputs", _AGAIN))
    return problems


def read_onnx(bundle: Bundle) -> OnnxModel:
    """The model that the engine was built from."""
    import onnx_ir as ir

    return OnnxModel(ir.load(bundle.path / MODEL_FILE), bundle.signature)


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
