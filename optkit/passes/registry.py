"""Which passes a recipe may use: the built-in ones, and those that installed packages add."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points
from typing import Any

from optkit.errors import UnavailableError
from optkit.passes.base import Pass
from optkit.passes.build_engine import BuildEngine
from optkit.passes.cast_bf16 import CastBf16
from optkit.passes.cast_fp16 import CastFp16
from optkit.passes.distill import Distill
from optkit.passes.export_onnx import ExportOnnx
from optkit.passes.finetune_int8 import FinetuneInt8
from optkit.passes.optimize_graph import STEPS, OptimizeGraph
from optkit.passes.prune_channels import PruneChannels
from optkit.passes.prune_weights import PruneWeights
from optkit.passes.quantize_int8 import QuantizeInt8

BUILT_IN: tuple[type[Pass[Any, Any]], ...] = (
    PruneChannels,
    PruneWeights,
    Distill,
    ExportOnnx,
    OptimizeGraph,
    *map(type, STEPS),
    CastFp16,
    CastBf16,
    QuantizeInt8,
    FinetuneInt8,
    BuildEngine,
)

ENTRY_POINTS = "optkit.passes"


@cache
def passes() -> dict[str, type[Pass[Any, Any]]]:
    """Every pass by its ``use``. Third parties join through the entry-point group ``optkit.passes``."""
    known = {step.model_fields["use"].default: step for step in BUILT_IN}
    for entry in entry_points(group=ENTRY_POINTS):
        step = entry.load()
        if not (isinstance(step, type) and issubclass(step, Pass)):
            raise UnavailableError(
                f"the entry point {entry.name!r} of {ENTRY_POINTS} is not a Pass: uninstall its package"
            )
        name = step.model_fields["use"].default
        if name in known:
            raise UnavailableError(
                f"the pass {name!r} of {entry.value} has the name of another pass: uninstall its package"
            )
        known[name] = step
    return known
