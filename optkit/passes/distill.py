"""Trains a model on what the model that came into the pipeline knows: what pruning lost comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from optkit.context import Context
from optkit.errors import PreconditionError
from optkit.functions import absolute
from optkit.models import TorchModel
from optkit.passes.base import TorchPass
from optkit.training import Objective, Training, load_hooks, train


class Distill(TorchPass):
    """The student is the model as the passes before this one left it, the teacher the one that they began with.

    The data's training split teaches, a part of it that is held out chooses the best epoch, and the validator's samples
    are never seen. The class ``Hooks`` says what a class of the user's may change.
    """

    use: Literal["distill"] = "distill"
    loss: Objective = Field(default=Objective())
    """What the student learns."""
    train: Training = Field(default=Training())
    """How it learns."""
    hooks: str | None = None
    """``path.py:Class`` or ``module:Class``, derived from ``optkit.Hooks``; a path is relative to the recipe."""

    def relative_to(self, folder: Path) -> Distill:
        """The same pass with the path of its hooks resolved."""
        return self.model_copy(update={"hooks": absolute(self.hooks, folder) if self.hooks else None})

    def requires(self, model: TorchModel, context: Context) -> None:
        """Training data, and a model that came in."""
        if context.data is None:
            raise PreconditionError("distill needs training data: add a `data:` section to the recipe")
        if context.original is None:
            raise PreconditionError("distill needs a PyTorch model to learn from: give the recipe a PyTorch checkpoint")

    def run(self, model: TorchModel, context: Context) -> TorchModel:
        """The trained student."""
        hooks = load_hooks(self.hooks, context)
        return train(
            model, self.train, context, objective=self.loss, teacher=context.original, hooks=hooks, name=self.use
        )
