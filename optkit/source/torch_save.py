"""Files of ``torch.save``: a state_dict, or a pickled module for whoever trusts it."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optkit.errors import CheckpointError
from optkit.failures import blame, reason
from optkit.functions import importable
from optkit.source.reading import Read, damaged
from optkit.source.state_dict import built

if TYPE_CHECKING:
    from optkit.recipe import ModelSource


class RefusedPickleError(Exception):
    """``weights_only`` met this global, which is not on torch's list of harmless ones."""


def unpickle(file: Any) -> Any:
    """``torch.load`` that runs no code.

    Raises:
        RefusedPickleError: there is more than tensors in the file.
    """
    import torch

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]*\w)", str(error))
        raise RefusedPickleError(named[1] if named else "something other than tensors") from error


def read_pickle(path: Path, source: ModelSource) -> Read:
    """Read a file of ``torch.save``; more than tensors are loaded only from a file that the user trusts."""
    trusted = False
    try:
        content = unpickle(path)
    except RefusedPickleError as refused:
        if not source.trust_pickle:
            raise CheckpointError(
                f"{path}: the pickle names {refused}, and unpickling it could run code, so it was not loaded. Where "
                "the model was made, write torch.save(model.state_dict(), ...) and give --model module:factory here, "
                "or write torch.export.save(torch.export.export(...), ...). If you trust the file: --trust-pickle"
            ) from refused
        content, trusted = _unpickle_trusted(path), True
    except Exception as error:
        raise damaged(path, reason(error)) from error
    return _from_content(path, content, source, trusted)


def _unpickle_trusted(path: Path) -> Any:
    import torch

    with importable(Path.cwd()):
        try:
            return torch.load(path, map_location="cpu", weights_only=False)
        except Exception as error:
            raise CheckpointError(
                f"{path}: unpickling failed: {reason(error)}{blame(error)}; the code of a pickled module must be "
                "importable (PYTHONPATH)"
            ) from error


def _from_content(path: Path, content: Any, source: ModelSource, trusted: bool) -> Read:
    import torch

    inner = content
    for key in ("state_dict", "model_state_dict", "model", "module", "net"):
        if isinstance(content, Mapping) and isinstance(content.get(key), (Mapping, torch.nn.Module)):
            inner = content[key]
            break
    if isinstance(inner, torch.nn.Module):
        return Read(inner, "pickle", trusted)
    has_tensors = isinstance(inner, Mapping) and any(isinstance(value, torch.Tensor) for value in inner.values())
    if not has_tensors or not all(isinstance(key, str) for key in inner):
        what = f"a dict of {', '.join(map(str, list(content)[:5]))}" if isinstance(content, Mapping) else type(content)
        raise CheckpointError(f"{path}: holds {what}, but no state_dict; save model.state_dict()")
    return Read(built(path, dict(inner), getattr(inner, "_metadata", None), source), "state_dict", trusted)
