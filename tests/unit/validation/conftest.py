"""Data, metrics and runners small enough to know every answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from optkit.context import Context
from optkit.data import Batch
from optkit.metrics import Top1
from optkit.models import Signature, TensorSpec
from optkit.recipe import LatencySettings
from optkit.targets.base import Environment
from optkit.validation import Contest, Entrant

SIGNATURE = Signature((TensorSpec("x", "float32", ("batch", 3)),), (TensorSpec("y", "float32", ("batch", 3)),))

QUICK = LatencySettings(rounds=6, seconds=0.001, warmup=0)


@dataclass
class Arrays:
    """Samples that are in memory."""

    x: Any
    labels: Any = None
    metric: Any = field(default_factory=Top1)
    inputs: tuple[TensorSpec, ...] = SIGNATURE.inputs

    def batches(self, split: str, size: int, limit: int | None = None) -> Iterator[Batch]:
        count = min(len(self.x), limit or len(self.x))
        for start in range(0, count, size):
            rows = slice(start, min(start + size, count))
            yield Batch({"x": self.x[rows]}, None if self.labels is None else self.labels[rows])

    def fingerprint(self, split: str) -> dict[str, Any]:
        return {"source": {"kind": "arrays"}, "split": split, "count": len(self.x)}


class Function:
    """A runner that is a Python function of ``x``, and takes as long as it is told."""

    def __init__(self, function: Callable[[Any], Any], seconds: float = 1e-3, signature: Signature = SIGNATURE) -> None:
        self.signature = signature
        self.environment = Environment("nowhere", "Python", {"threads": 1})
        self.sizes: list[int] = []
        self.turns: list[int] = []
        self._function = function
        self._seconds = seconds

    def run(self, feeds):
        self.sizes.append(len(feeds["x"]))
        return {"y": self._function(feeds["x"])}

    def time(self, feeds, rounds):
        self.turns.append(rounds)
        return np.full(rounds, self._seconds)

    def close(self) -> None: ...

    def __enter__(self):
        return self

    def __exit__(self, *exc: object) -> None: ...


def contest_of(candidate: Callable[[Any], Any], baseline: Callable[[Any], Any] = np.copy, **changes: Any) -> Contest:
    """A function against another one, as a rule the identity."""
    return Contest((Entrant("base", Function(baseline)),), Entrant("new", Function(candidate)), "base", **changes)


@pytest.fixture
def samples() -> Arrays:
    """Two hundred samples whose label is the place of their largest value, so that the identity is always right."""
    x = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
    return Arrays(x, x.argmax(axis=1))


@pytest.fixture
def on_samples(context: Context, samples: Arrays) -> Context:
    """A context that validates on ``samples``."""
    return Context(context.target, context.scratch, samples)
