"""What the readers of all formats share: what they return, and how they say that a file is damaged."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from optkit.errors import CheckpointError
from optkit.models import Signature
from optkit.source.dimensions import Declared

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Read:
    """What a reader found: the module, and what the file says about its inputs."""

    module: torch.nn.Module
    kind: str
    trusted_pickle: bool = False
    declared: Declared | None = None
    """Inputs that the file fixes."""
    guessed: Signature | None = None
    """Inputs for when nobody says anything."""
    parameters: tuple[inspect.Parameter, ...] | None = None
    """What forward takes, where its Python signature does not tell."""


def damaged(path: Path, what: str) -> CheckpointError:
    """The error for a file that is no whole file of its kind."""
    return CheckpointError(f"{path}: truncated or damaged: {what}; save or download the checkpoint again")
