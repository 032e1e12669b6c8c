"""Functions that the user names in a document: ``path.py:function`` or ``module:function``."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from optkit.errors import DataError, did_you_mean


def find_function(reference: str, folder: Path) -> Callable[..., Any]:
    """Import what ``reference`` names; a path is relative to ``folder``. This runs the file.

    Raises:
        DataError: the reference is malformed, or there is no such file, module or function, or importing it fails.
    """
    place, _, name = reference.rpartition(":")
    if not place or not name:
        raise DataError(f"{reference!r} is not a function: write path.py:function or module:function")
    try:
        module = _run_file(folder / place) if place.endswith(".py") else importlib.import_module(place)
    except FileNotFoundError:
        raise DataError(f"{reference}: there is no file {folder / place}") from None
    except Exception as error:
        raise DataError(f"{reference}: importing it failed: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise DataError(f"{reference}: there is no function {name!r}, {did_you_mean(name, known)}")
    found: Callable[..., Any] = function
    return found


def _run_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # a .py file always has a loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
