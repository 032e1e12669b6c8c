"""The recipe: everything that a run does, as one strict YAML document."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

import yaml
from pydantic import BeforeValidator, Field, model_validator

from optkit.documents import Strict, parse_yaml, validate
from optkit.errors import RecipeError, did_you_mean
from optkit.functions import absolute
from optkit.models import DimRange, TensorSpec
from optkit.passes.base import Pass
from optkit.passes.build_engine import BuildEngine
from optkit.passes.quantize_int8 import QuantizeInt8
from optkit.passes.registry import passes as known_passes
from optkit.pipeline import misfit
from optkit.targets import AnyTarget
from optkit.targets.onnxruntime import OnnxRuntimeTarget

PRESETS = ("fp32", "fp16", "bf16", "int8")


class ModelSource(Strict):
    """Where the model comes from, if the command line or the caller does not say."""

    checkpoint: str | None = None
    """Path of the checkpoint, relative to the recipe."""
    factory: str | None = None
    """``module:function`` or ``path.py:function`` that returns the module a state_dict is loaded into."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the factory."""
    trust_pickle: bool = False
    """Load a pickled module, which runs whatever code it holds. The manifest records it."""


class LatencySettings(Strict):
    """How latency is measured."""

    rounds: int = Field(default=20, ge=2)
    """Interleaved rounds: in each, every runner is timed once, in an order that alternates."""
    seconds: float = Field(default=0.2, gt=0)
    """How long each runner is timed in each round, at least one call."""
    warmup: float = Field(default=0.3, ge=0)
    """Seconds that each runner runs before the first round."""


class ValidationSettings(Strict):
    """What the validator measures."""

    samples: int | None = Field(default=None, ge=1)
    """How many validation samples; all of the split if not given."""
    batch_size: int = Field(default=16, ge=1)
    """How many samples are run at a time for accuracy (1 where the batch dimension is static)."""
    stage_samples: int = Field(default=32, ge=1)
    """How many samples the stage-by-stage comparison uses."""
    latency: LatencySettings = LatencySettings()


class Gate(Strict):
    """What must hold before the bundle appears."""

    max_drop: float = Field(default=0.5, ge=0)
    """How many points (of 100) the metric may lose."""
    lossy_int8: Literal["rollback", "report"] = "rollback"
    """What to do if INT8 loses more: ``rollback`` puts the layers that cost the most back into float, as few as it
    takes, and ``report`` misses the gate."""
    min_speedup: float | None = Field(default=None, gt=0)
    """How many times as fast as the FP32 ONNX model the engine must be; not judged if not given. An INT8 engine is
    compared with its twin, which is what the recipe makes without INT8 (in FP16 where the target computes in it), and
    an FP16 or BF16 engine with the optimized FP32 model; a pruned or trained one with the optimized checkpoint."""
    slow_int8: Literal["report", "twin", "rollback"] = "report"
    """What to do if INT8 is not shown to be faster than its twin: ``report`` says so, ``twin`` gives the twin instead,
    and ``rollback`` puts back into float what loses time in those regions of the network that are not faster."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Of the intervals that the gate looks at."""


if TYPE_CHECKING:
    AnyPass = Pass[Any, Any]
else:
    # The registry is the union: a pass that a package adds is a valid `use` at once
    AnyPass = Annotated[Union[tuple(known_passes().values())], Field(discriminator="use")]  # noqa: UP007


def _as_step(value: Any) -> Any:
    """Let a recipe write a pass without options as its bare name."""
    return {"use": value} if isinstance(value, str) else value


def _as_range(value: Any) -> Any:
    """Let a recipe write a dimension's range as ``[min, opt, max]`` or as one fixed size."""
    if isinstance(value, int):
        return {"min": value, "opt": value, "max": value}
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 3:
        return dict(zip(("min", "opt", "max"), value, strict=True))
    return value


class Recipe(Strict):
    """A whole run. ``Recipe.load`` reads one from a file or takes a preset by its name."""

    version: Literal[1] = 1
    name: str = "unnamed"
    description: str = ""
    model: ModelSource = ModelSource()
    inputs: dict[str, str] = Field(default_factory=dict)
    """Inputs by name, as ``float32[batch,3,224,224]``, where neither checkpoint nor data say."""
    dims: dict[str, Annotated[DimRange, BeforeValidator(_as_range)]] = Field(default_factory=dict)
    """Ranges of dynamic dimensions by name: ``[min, opt, max]``."""
    data: str | None = None
    """Path of a data spec, relative to the recipe."""
    passes: tuple[Annotated[AnyPass, BeforeValidator(_as_step)], ...] = Field(min_length=1)
    validation: ValidationSettings = ValidationSettings()
    gate: Gate = Gate()
    seed: int = Field(default=0, ge=0)
    threads: int | None = Field(default=None, ge=1)
    """Intra-op threads for everything that runs on the CPU; the number of physical cores if not given."""

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        problem = misfit(self.passes)
        if problem is not None:
            raise ValueError(f"passes: {problem}")
        for name, text in self.inputs.items():
            TensorSpec.parse(name, text)
        return self

    @property
    def target(self) -> AnyTarget:
        """The target of the recipe's ``build_engine``, or ``onnxruntime`` if it builds none."""
        builds = [step for step in self.passes if isinstance(step, BuildEngine)]
        return builds[-1].target if builds else OnnxRuntimeTarget()

    @property
    def int8(self) -> tuple[int, QuantizeInt8] | None:
        """The recipe's ``quantize_int8`` and its place among the passes; None if it has none."""
        return next(((i, step) for i, step in enumerate(self.passes) if isinstance(step, QuantizeInt8)), None)

    @classmethod
    def load(cls, source: str | Path) -> Recipe:
        """Read a recipe file, or the preset of that name (``fp32``, ``fp16``, ``bf16``, ``int8``).

        Paths in a file are relative to it and come back absolute.

        Raises:
            RecipeError: the file cannot be read or does not fit the schema; the message names file, line and key.
        """
        if str(source) in PRESETS:
            text = resources.files("optkit").joinpath(f"presets/{source}.yaml").read_text(encoding="utf-8")
            return cls.parse(text, f"preset {source}")
        path = Path(source)
        if not path.exists() and path.suffix not in (".yaml", ".yml"):
            raise RecipeError(f"{source}: neither a preset nor a file; {did_you_mean(str(source), PRESETS)}")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{source}: cannot read the recipe: {error}") from error
        return cls.parse(text, str(source)).relative_to(path.resolve().parent)

    @classmethod
    def parse(cls, text: str, origin: str = "recipe") -> Recipe:
        """Read a recipe from YAML text; ``origin`` is what messages call it."""
        return parse_yaml(cls, text, origin)

    def relative_to(self, folder: Path) -> Recipe:
        """The same recipe with its paths resolved against ``folder``."""
        source = self.model
        changes = {
            "checkpoint": str(folder / source.checkpoint) if source.checkpoint else None,
            "factory": absolute(source.factory, folder) if source.factory else None,
        }
        return self.model_copy(
            update={
                "model": source.model_copy(update=changes),
                "data": str(folder / self.data) if self.data else None,
                "passes": tuple(step.relative_to(folder) for step in self.passes),
            }
        )

    def updated(self, *, target: Any = None, **changes: Any) -> Recipe:
        """The same recipe with fields replaced, validated anew; ``target`` replaces the one of ``build_engine``.

        Raises:
            RecipeError: a field does not exist or a value does not fit.
        """
        document = self.model_dump(mode="json")
        document.update(changes)
        if target is not None:
            for step in document["passes"]:
                if step["use"] == "build_engine":
                    step["target"] = target
        return validate(Recipe, document, "recipe")

    def to_yaml(self) -> str:
        """The resolved recipe with every default filled in; it loads back to an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def schema() -> dict[str, Any]:
    """The JSON schema of recipes, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}
