"""The twin of an INT8 engine: what the same recipe makes without INT8, for the same target with the same settings."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from optkit.context import Context
from optkit.errors import OptkitError
from optkit.models import Engine, OnnxModel
from optkit.passes.build_engine import BuildEngine
from optkit.passes.cast_fp16 import CastFp16
from optkit.passes.finetune_int8 import FinetuneInt8
from optkit.passes.float_cast import FloatCast
from optkit.pipeline import Stage, run_passes
from optkit.quantize.placement import name_nodes
from optkit.recipe import AnyPass, Recipe
from optkit.targets.base import Runner
from optkit.targets.onnxruntime import open_onnx
from optkit.validation.stages import precision_of

log = logging.getLogger("optkit.validation")

QUANTIZED = "quantize_int8"
"""The stage that a twin does without."""

_SHORT = {"float32": "FP32", "float16": "FP16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Twin:
    """An INT8 recipe's twin.

    Attributes:
        recipe: the recipe without INT8.
        stages: the checkpoint first, the engine (or the last ONNX model) last.
        floats: the model that was quantized, its nodes named as quantization names them.
    """

    recipe: Recipe
    stages: tuple[Stage, ...]
    floats: OnnxModel

    @property
    def model(self) -> OnnxModel:
        """What its engine was built from."""
        return [stage.model for stage in self.stages if isinstance(stage.model, OnnxModel)][-1]

    @property
    def engine(self) -> Engine | None:
        """Its engine, if the recipe builds one."""
        last = self.stages[-1].model
        return last if isinstance(last, Engine) else None

    @property
    def precision(self) -> str:
        """The lowest that it computes in."""
        return precision_of(self.model)

    @property
    def name(self) -> str:
        """What reports call it."""
        return f"{_SHORT.get(self.precision, self.precision)} twin"

    def open(self, threads: int) -> Runner:
        """Open it to run.

        Raises:
            UnavailableError: it cannot run on this machine.
        """
        return self.recipe.target.open(self.engine, threads) if self.engine else open_onnx(self.model, threads)


@dataclass(frozen=True)
class NoTwin:
    """Why an INT8 recipe has no twin to be measured beside it."""

    why: str


def build_twin(stages: Sequence[Stage], recipe: Recipe, context: Context) -> Twin | NoTwin | None:
    """Build the twin of what a recipe made, from the model that was quantized; None if none was.

    Args:
        stages: what the recipe's passes made, the checkpoint first.
        recipe: with ``quantize_int8`` in it, or there is no twin.
        context: that of the passes; the twin is built in a folder of its own in the scratch folder.
    """
    place = next((i for i, stage in enumerate(stages) if stage.name == QUANTIZED), None)
    if recipe.int8 is None or place is None:
        return None
    split, _ = recipe.int8
    available = recipe.target.can_run()
    if not available.ok:
        return NoTwin(f"{recipe.target.name} does not run on this machine: {available.reason}")
    floats = stages[place - 1].model
    assert isinstance(floats, OnnxModel)  # what quantize_int8 took
    floats = floats.clone()
    name_nodes(floats)
    after = twin_passes(recipe, recipe.passes[split + 1 :])
    twin = recipe.model_copy(update={"passes": (*recipe.passes[:split], *after)})
    start = (*stages[: place - 1], replace(stages[place - 1], model=floats))
    try:
        made = run_passes(after, floats, replace(context, scratch=_folder(context))) if after else ()
    except OptkitError as error:
        return NoTwin(f"it could not be built: {error}")
    return Twin(twin, (*start, *made[1:]), floats)


def twin_passes(recipe: Recipe, after: Sequence[AnyPass]) -> tuple[AnyPass, ...]:
    """What follows ``quantize_int8`` but fine-tuning; before the build a cast to FP16 if the target computes in it."""
    after = [step for step in after if not isinstance(step, FinetuneInt8)]
    halves = "float16" in recipe.target.dialect.floats
    if not halves or any(isinstance(step, FloatCast) for step in recipe.passes):
        return tuple(after)
    build = next((i for i, step in enumerate(after) if isinstance(step, BuildEngine)), len(after))
    return (*after[:build], CastFp16(), *after[build:])


def _folder(context: Context) -> Path:
    folder = context.scratch / "twin"
    folder.mkdir(exist_ok=True)
    return folder
