"""TorchScript, whose schema says what forward takes."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from optkit.failures import reason
from optkit.source.reading import Read, damaged

if TYPE_CHECKING:
    from optkit.recipe import ModelSource


def read_torchscript(path: Path, source: ModelSource) -> Read:
    """Read a file of ``torch.jit.save``."""
    import torch

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
            module = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise damaged(path, reason(error)) from error
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = (
        inspect.Parameter(a.name, kind, default=a.default_value if a.has_default_value() else inspect.Parameter.empty)
        for a in module.forward.schema.arguments[1:]
    )
    return Read(module, "torchscript", parameters=tuple(parameters))
