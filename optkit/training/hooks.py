"""Hooks: a Python class of the user's that changes or watches a training, and the calls to it."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from optkit.context import Context
from optkit.data import Batch, Samples
from optkit.errors import OptkitError, UsageError
from optkit.failures import blame, reason
from optkit.functions import find_function, importable
from optkit.rows import file_sha256

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Parts:
    """What a loss is made of. Tensors are on the device that computes; the student's have gradients.

    Attributes:
        inputs: in the order of the model's signature.
        labels: of the batch; None if the data have none.
        outputs: the student's, by name.
        teacher: the teacher's, by name; empty without a teacher.
        features: outputs of the student's module, projected, and of the teacher's, by the student's module.
        terms: what the objective's terms came to (``labels``, ``outputs``, ``features``), before their weights.
    """

    inputs: tuple[torch.Tensor, ...]
    labels: torch.Tensor | None
    outputs: Mapping[str, torch.Tensor]
    teacher: Mapping[str, torch.Tensor]
    features: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    terms: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class State:
    """Where a training is.

    Attributes:
        student: the module that is trained.
        optimizer: its optimizer.
        step: how many steps are done.
        steps: how many there are in all.
        epoch: how many epochs are done.
        loss: of the last step; the mean of the epoch in ``on_epoch``.
        score: of the held-out samples after the last whole epoch, from 0 to 1; None if there are none.
        best: the best score so far.
    """

    student: torch.nn.Module
    optimizer: torch.optim.Optimizer
    step: int
    steps: int
    epoch: int
    loss: float
    score: float | None
    best: float | None


class Hooks:
    """Derive from this class, override what you need, and name your class in the recipe: ``hooks: my.py:MyHooks``.

    Every method does nothing as it is. ``self.context`` is that of the pass: target, data, seed, threads, scratch
    folder, and ``original``, the model that came into the pipeline. Whatever a hook draws at random should come from
    ``rng``, ``self.context.rng`` or PyTorch's, NumPy's or Python's own generators, whose state is saved: then an
    interrupted run comes to the same weights.
    """

    def __init__(self, context: Context) -> None:
        self.context = context

    def student(self, module: torch.nn.Module) -> torch.nn.Module:
        """The module to train; it takes the same inputs by position and gives the same outputs. ``module`` is a copy
        of the one that came in, and may be changed."""
        return module

    def teacher(self, module: torch.nn.Module) -> torch.nn.Module:
        """The module to learn from; ``module`` is a copy of the teacher. Not called where there is none."""
        return module

    def data(self, samples: Samples) -> Samples:
        """The samples to learn from, held-out ones included: an object with ``__len__`` and ``batches``."""
        return samples

    def batch(self, batch: Batch, rng: np.random.Generator) -> Batch:
        """A training batch, changed at random by ``rng``; held-out batches do not come here."""
        return batch

    def loss(self, parts: Parts, loss: torch.Tensor) -> torch.Tensor:
        """The number to make smaller; ``loss`` is what the objective says. With several GPUs each calls it for its
        share of the batch."""
        return loss

    def on_step(self, state: State) -> bool | None:
        """Called after every step; True ends the training here."""

    def on_epoch(self, state: State) -> bool | None:
        """Called after every epoch, its score known; True ends the training here."""

    def on_end(self, state: State) -> None:
        """Called at the end; ``state.student`` holds the best weights, and what is done to it stays."""

    def state_dict(self) -> dict[str, Any]:
        """What these hooks have to remember over an interruption: tensors, numbers, text, lists and dicts of them."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""


@dataclass(frozen=True)
class HookCalls:
    """Hooks whose failures are told as the user's: which hook, what happened, and in which line."""

    hooks: Hooks
    reference: str = ""
    folder: Path = field(default_factory=Path)

    @property
    def identity(self) -> str:
        """What tells these hooks from others: the SHA-256 of their file."""
        path = self.folder / Path(self.reference.rpartition(":")[0]).name
        return f"{self.reference} {file_sha256(path)}" if path.suffix == ".py" and path.is_file() else self.reference

    def student(self, module: torch.nn.Module) -> torch.nn.Module:
        """As of ``Hooks``."""
        return self._module("student", module)

    def teacher(self, module: torch.nn.Module) -> torch.nn.Module:
        """As of ``Hooks``."""
        return self._module("teacher", module)

    def data(self, samples: Samples) -> Samples:
        """As of ``Hooks``; the result's own failures are told alike."""
        given: Samples = self._call("data", samples)
        if given is samples:
            return samples
        if not all(callable(getattr(given, name, None)) for name in ("__len__", "batches")):
            self._refuse("data", given, "an object with __len__ and batches(positions, size, skip)")
        return _HookSamples(self, given)

    @property
    def changes_batches(self) -> bool:
        """Whether there is a ``batch`` of the user's."""
        return type(self.hooks).batch is not Hooks.batch

    def batch(self, batch: Batch, rng: np.random.Generator) -> Batch:
        """As of ``Hooks``."""
        return self.checked("batch", self._call("batch", batch, rng))

    def checked(self, method: str, batch: Any) -> Batch:
        """Refuse what is no batch."""
        if not isinstance(batch, Batch) or not batch.feeds or not len(batch):
            self._refuse(method, batch, "an optkit.data.Batch with samples")
        return batch

    def loss(self, parts: Parts, loss: torch.Tensor) -> torch.Tensor:
        """As of ``Hooks``."""
        import torch

        given: torch.Tensor = self._call("loss", parts, loss)
        if given is loss:
            return loss
        if not isinstance(given, torch.Tensor) or given.numel() != 1 or not given.requires_grad:
            self._refuse("loss", given, "a tensor of one number that depends on the student's outputs")
        return given.reshape(())

    def on_step(self, state: State) -> bool:
        """As of ``Hooks``."""
        return self._verdict("on_step", state)

    def on_epoch(self, state: State) -> bool:
        """As of ``Hooks``."""
        return self._verdict("on_epoch", state)

    def on_end(self, state: State) -> None:
        """As of ``Hooks``."""
        self._call("on_end", state)

    def state_dict(self) -> dict[str, Any]:
        """As of ``Hooks``."""
        given = self._call("state_dict")
        return given if isinstance(given, dict) else self._refuse("state_dict", given, "a dict")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As of ``Hooks``."""
        self._call("load_state_dict", state)

    def failed(self, method: str, error: Exception) -> NoReturn:
        """Tell the failure of a hook."""
        if isinstance(error, OptkitError):
            raise error
        raise UsageError(f"hooks {self.reference}: {method} failed: {reason(error)}{blame(error)}") from error

    def _call(self, method: str, *arguments: Any) -> Any:
        try:
            with importable(self.folder):
                return getattr(self.hooks, method)(*arguments)
        except Exception as error:  # the user's own code
            self.failed(method, error)

    def _module(self, method: str, module: torch.nn.Module) -> torch.nn.Module:
        import torch

        given = self._call(method, module)
        if not isinstance(given, torch.nn.Module):
            self._refuse(method, given, "a torch.nn.Module")
        return given

    def _verdict(self, method: str, state: State) -> bool:
        given = self._call(method, state)
        if given is not None and not isinstance(given, bool):
            self._refuse(method, given, "None, or True to end the training")
        return bool(given)

    def _refuse(self, method: str, given: Any, wanted: str) -> NoReturn:
        what = "nothing" if given is None else f"{type(given).__name__} {_shown(given)}".strip()
        place = _place(getattr(type(self.hooks), method))
        raise UsageError(f"hooks {self.reference}: {method} ({place}) must return {wanted}, and it returned {what}")


NO_HOOKS = HookCalls(Hooks(None))  # type: ignore[arg-type]  # what does nothing looks at no context


@dataclass(frozen=True)
class _HookSamples:
    """Samples of a hook; what goes wrong in them is the hook's."""

    calls: HookCalls
    samples: Samples

    def __len__(self) -> int:
        return len(self.samples)

    def batches(self, positions: Sequence[int], size: int, skip: int = 0) -> Iterator[Batch]:
        try:
            for batch in self.samples.batches(positions, size, skip):
                yield self.calls.checked("data", batch)
        except Exception as error:  # the user's own code
            self.calls.failed("data", error)


def load_hooks(reference: str | None, context: Context) -> HookCalls:
    """Import and make the hooks that a recipe names; this runs the user's code.

    Raises:
        UsageError: they cannot be imported or made, are no ``Hooks``, or have a method that looks misspelt.
    """
    if reference is None:
        return NO_HOOKS
    found = find_function(reference, Path(), role="hooks", error=UsageError)
    kind = found.function
    if not (isinstance(kind, type) and issubclass(kind, Hooks)):
        raise UsageError(f"hooks {reference}: {found.place} is no class derived from optkit.Hooks: derive it")
    known = [name for name in vars(Hooks) if not name.startswith("_")]
    for name in vars(kind):
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
        if near and name not in known:
            raise UsageError(f"hooks {reference}: {found.place} has a method {name!r}: did you mean {near[0]!r}?")
    try:
        with importable(found.folder):
            return HookCalls(kind(context), reference, found.folder)
    except Exception as error:  # the user's own code
        raise UsageError(f"hooks {reference}: making them failed: {reason(error)}{blame(error)}") from error


def _place(function: Any) -> str:
    return f"{inspect.getsourcefile(function)}:{inspect.getsourcelines(function)[1]}"


def _shown(given: Any) -> str:
    return str(list(given.shape)) if hasattr(given, "shape") else repr(given)[:40]
