"""optkit compiles a PyTorch checkpoint to a fast inference engine and proves that it is still right."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optkit.benchmark import bench
    from optkit.bundle import Bundle, load
    from optkit.compiler import compile, validate
    from optkit.errors import OptkitError
    from optkit.recipe import Recipe
    from optkit.training.hooks import Hooks

__version__ = "0.1.0"

__all__ = ["Bundle", "Hooks", "OptkitError", "Recipe", "__version__", "bench", "compile", "load", "validate"]

# Nothing heavy is imported before it is used: `import optkit` loads neither torch nor onnx
_HOMES = {
    "Bundle": "optkit.bundle",
    "Hooks": "optkit.training.hooks",
    "OptkitError": "optkit.errors",
    "Recipe": "optkit.recipe",
    "bench": "optkit.benchmark",
    "compile": "optkit.compiler",
    "load": "optkit.bundle",
    "validate": "optkit.compiler",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'optkit' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
