"""Functions that the user names: ``path.py:function`` or ``module:function``, of a data set, a metric or a network."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optkit.errors import DataError, UsageError, did_you_mean
from optkit.failures import blame, reason


@dataclass(frozen=True)
class UserFunction:
    """A function of the user, which can import the files beside its own whenever it is called."""

    function: Callable[..., Any]
    folder: Path

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        with importable(self.folder):
            return self.function(*args, **kwargs)

    @property
    def place(self) -> str:
        """File and line of its definition."""
        try:
            return f"{inspect.getsourcefile(self.function)}:{inspect.getsourcelines(self.function)[1]}"
        except (TypeError, OSError):
            return "not written in Python"


def find_function(
    reference: str, folder: Path, *, role: str = "function", error: type[UsageError] = DataError
) -> UserFunction:
    """Import what ``reference`` names; a path is relative to ``folder``, where modules are found too. This runs code.

    Args:
        reference: ``path.py:function`` or ``module:function``.
        folder: the folder of the document that says so, or the working directory.
        role: what the function is for, as messages call it.
        error: what to raise if the reference is malformed, there is no such file, module or function, or importing
            it fails.
    """
    place, _, name = reference.rpartition(":")
    what = f"{role} {reference!r}"
    if not place or not name:
        raise error(f"{what}: write module:function or path.py:function")
    is_file = place.endswith(".py")
    path = (folder / Path(place).expanduser()).resolve()
    if is_file and not path.is_file():
        raise error(f"{what}: there is no file {path}")
    folder = path.parent if is_file else folder.resolve()
    try:
        with importable(folder):
            module = _run_file(path) if is_file else importlib.import_module(place)
    except (Exception, SystemExit) as failure:
        if not is_file and isinstance(failure, ModuleNotFoundError) and _leads_to(place, failure.name):
            hint = "install it, or write the path of the file: path.py:function"
            raise error(f"{what}: there is no module {failure.name!r}; {hint}") from failure
        raise error(f"{what}: importing it failed: {reason(failure)}{blame(failure)}") from failure
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise error(f"{what}: there is no function {name!r}, {did_you_mean(name, known)}")
    return UserFunction(function, folder)


def absolute(reference: str, folder: Path) -> str:
    """The same reference; if it names a file, by its path from ``folder``."""
    place, colon, name = reference.rpartition(":")
    return f"{folder / place}{colon}{name}" if place.endswith(".py") else reference


@contextlib.contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Let the user's code import from ``folder``, and only while it is needed."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))


def _run_file(path: Path) -> Any:
    name = f"_optkit_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # a .py file always has a loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and torch.export look their classes' module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _leads_to(module: str, missing: str | None) -> bool:
    """Whether it is the module itself that is missing, or a package around it, and not one that it imports."""
    return missing is not None and f"{module}.".startswith(f"{missing}.")
