"""Data specs to batches of feeds and labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np

from optkit.models import Feeds, TensorSpec

Split: TypeAlias = Literal["calibration", "validation"]


@dataclass(frozen=True)
class Batch:
    """Samples that run together: ``feeds`` with the samples in the first dimension of every array, and their labels."""

    feeds: Feeds
    labels: np.ndarray[Any, Any] | None

    def __len__(self) -> int:
        return len(next(iter(self.feeds.values())))


class Metric(Protocol):
    """What the user cares about, measured per sample where that is possible.

    ``records`` turns one batch of outputs into one row per sample, small enough to keep; ``score`` turns rows into the
    metric, from 0 to 1 and higher is better. A paired bootstrap resamples the rows of baseline and candidate together.
    """

    name: str
    needs_labels: bool

    def records(self, outputs: Feeds, batch: Batch, baseline: Feeds) -> np.ndarray[Any, Any]:
        """Rows [n, ...] for one batch; ``baseline`` is the outputs of the baseline on the same batch."""

    def score(self, rows: np.ndarray[Any, Any]) -> float:
        """The metric over all rows."""


class Data(Protocol):
    """An opened data spec."""

    inputs: tuple[TensorSpec, ...]
    metric: Metric

    def batches(self, split: Split, size: int, limit: int | None = None) -> Iterator[Batch]:
        """Batches of at most ``size`` samples, the same ones in the same order at every call, NaN refused."""

    def fingerprint(self, split: Split) -> dict[str, Any]:
        """What identifies the samples: source, split, preprocessing, count, seed."""


def open_data(path: str | Path, seed: int = 0) -> Data:
    """Open a data spec."""
    raise NotImplementedError
