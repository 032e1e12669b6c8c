"""Checkpoints in: whatever the user has becomes a ``TorchModel`` or an ``OnnxModel`` with a known signature.

What a file is gets decided by its content. Nothing in it runs unless the user trusts it, and a live module is copied,
never changed. ``formats`` says what a file is, one module for each format reads it, and ``torch_module`` and
``onnx_file`` settle the signature.

``TorchModel.module`` takes the inputs by position, in the order of ``signature.inputs``, and returns a tensor, a flat
tuple or list, or a flat dict of tensors in the order of ``signature.outputs``. A module that wants or gives anything
else is wrapped until it does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optkit.errors import CheckpointError
from optkit.models import OnnxModel, TensorSpec, TorchModel
from optkit.source.formats import recognise
from optkit.source.huggingface import read_huggingface
from optkit.source.onnx_file import onnx_model, read_onnx, refuse_nan
from optkit.source.reading import Read
from optkit.source.state_dict import read_safetensors
from optkit.source.torch_export import read_export
from optkit.source.torch_module import copied, torch_model
from optkit.source.torch_save import RefusedPickleError, read_pickle, unpickle
from optkit.source.torchscript import read_torchscript

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from optkit.recipe import ModelSource, Recipe

__all__ = ["Loaded", "RefusedPickleError", "load_model", "recognise", "unpickle"]


@dataclass(frozen=True)
class Loaded:
    """A model ready for the pipeline, and where it came from (JSON-serializable, for the manifest)."""

    model: TorchModel | OnnxModel
    provenance: dict[str, Any]


def load_model(
    source: str | Path | torch.nn.Module | ir.Model | OnnxModel,
    recipe: Recipe,
    data_inputs: tuple[TensorSpec, ...] = (),
) -> Loaded:
    """Read a checkpoint, or take a model that is already in memory; the caller's object is never changed.

    Args:
        source: a file, a Hugging Face model folder, a module, or an ONNX model.
        recipe: ``model`` tells the factory and what to trust, ``inputs`` and ``dims`` the signature.
        data_inputs: the inputs that the data produces, for where neither recipe nor checkpoint say.

    Raises:
        CheckpointError: the source cannot be read, or does not fit its factory or its inputs.
        UnavailableError: a package that the source needs is not installed.
    """
    import onnx_ir as ir
    import torch

    if isinstance(source, (str, Path)):
        if not str(source):
            raise CheckpointError("no model: name a checkpoint, or set model.checkpoint in the recipe")
        return _from_path(Path(source).expanduser(), recipe, data_inputs)
    where = type(source).__name__
    if isinstance(source, torch.nn.Module):
        model = torch_model(Read(copied(source), "module"), recipe, data_inputs, where)
        return Loaded(model, _provenance("module", recipe.model))
    if isinstance(source, OnnxModel):
        if not recipe.inputs and not recipe.dims:
            refuse_nan(source.ir, where)
            return Loaded(source, _provenance("onnx", recipe.model))
        # Cloned: settling the signature renames dimensions in the graph
        changed = onnx_model(source.ir.clone(), recipe, data_inputs, where)
        return Loaded(replace(changed, records=source.records), _provenance("onnx", recipe.model))
    if isinstance(source, ir.Model):
        return Loaded(onnx_model(source.clone(), recipe, data_inputs, where), _provenance("onnx", recipe.model))
    raise CheckpointError(f"{where}: not a model; hand over a path, a torch.nn.Module or an onnx_ir.Model")


def _from_path(path: Path, recipe: Recipe, data_inputs: tuple[TensorSpec, ...]) -> Loaded:
    kind = recognise(path)
    if kind == "onnx":
        model, external = read_onnx(path, recipe, data_inputs)
        hashes = {file.name: _sha256(file) for file in external}
        return Loaded(model, {**_provenance(kind, recipe.model, path), "external_data": hashes})
    readers: dict[str, Callable[[Path, ModelSource], Read]] = {
        "torch.export": read_export,
        "torchscript": read_torchscript,
        "torch.save": read_pickle,
        "safetensors": read_safetensors,
        "huggingface": read_huggingface,
    }
    read = readers[kind](path, recipe.model)
    live = torch_model(read, recipe, data_inputs, str(path))
    return Loaded(live, _provenance(read.kind, recipe.model, path, trusted_pickle=read.trusted_pickle))


def _provenance(
    kind: str, source: ModelSource, path: Path | None = None, *, trusted_pickle: bool = False
) -> dict[str, Any]:
    by_factory = kind in ("state_dict", "safetensors")
    return {
        "kind": kind,
        "path": None if path is None else str(path),
        "sha256": None if path is None else _sha256(path),
        "factory": source.factory if by_factory else None,
        "arguments": dict(source.arguments) if by_factory else {},
        "trusted_pickle": trusted_pickle,
    }


def _sha256(path: Path) -> str:
    """The hash of a file; of a folder, the hash of the hashes of its files, as ``sha256sum *`` lists them."""
    digest = hashlib.sha256()
    if path.is_dir():
        for part in sorted(part for part in path.iterdir() if part.is_file()):
            digest.update(f"{_sha256(part)}  {part.name}\n".encode())
        return digest.hexdigest()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
