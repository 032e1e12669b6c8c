"""Builds the engine: the last step of every pipeline."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from optkit.context import Context
from optkit.errors import UnavailableError
from optkit.models import Engine, OnnxModel
from optkit.passes.base import BuildPass
from optkit.passes.fix_sizes import fix_sizes
from optkit.passes.legalize import express
from optkit.targets import AnyTarget, named_target


class BuildEngine(BuildPass):
    """The target builds its engine from the ONNX model."""

    use: Literal["build_engine"] = "build_engine"
    target: Annotated[AnyTarget, BeforeValidator(named_target)] = Field(default=None, validate_default=True)
    """A target's name, or a mapping with its ``name`` and options."""

    def check_machine(self) -> None:
        """Refuse a target that cannot build on this machine."""
        availability = self.target.can_build()
        if not availability.ok:
            raise UnavailableError(f"target {self.target.name!r}: {availability.reason}. {availability.mend}")

    def run(self, model: OnnxModel, context: Context) -> Engine:
        """The engine, in the scratch folder, from the model as the target's builder reads it."""
        dialect = self.target.dialect
        sized = fix_sizes(model, context) if dialect.tunes_for_shapes else model
        legal = express(sized, dialect, context)
        with ThreadPoolExecutor(1) as beside:
            checked = beside.submit(legal.check)
            engine = self.target.build(legal.model, context.scratch, context)
            checked.result()
        return engine
