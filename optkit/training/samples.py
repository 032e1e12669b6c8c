"""Which samples are trained on, which only judge, and in which order they come."""

from __future__ import annotations

import math
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from optkit.data import Batch, Samples
from optkit.errors import DataError
from optkit.training.settings import Training

T = TypeVar("T")
Positions = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Course:
    """The samples of a training, parted once and shuffled anew for every epoch, all by the seed.

    Attributes:
        samples: where they come from.
        training: positions of those to learn from.
        held_out: positions of those that only judge.
        size: how many make a step.
        seed: decides every order.
    """

    samples: Samples
    training: Positions
    held_out: Positions
    size: int
    seed: int

    @property
    def steps(self) -> int:
        """How many steps an epoch has; samples that do not fill a batch are left for another epoch."""
        return len(self.training) // self.size

    def epoch(self, number: int, skip: int = 0) -> Iterator[Batch]:
        """The batches of an epoch without the first ``skip``, read as they are asked for."""
        order = np.random.default_rng([self.seed, zlib.crc32(b"epoch"), number]).permutation(self.training)
        return self.samples.batches(order[: self.steps * self.size].tolist(), self.size, skip * self.size)

    def judging(self) -> Iterator[Batch]:
        """The held-out batches."""
        return self.samples.batches(self.held_out.tolist(), self.size)


def part(samples: Samples, settings: Training, static: int | None, seed: int) -> Course:
    """Hold samples out and keep the others to learn from; ``static`` is the one size that a model takes, if it does.

    Raises:
        DataError: there are not as many as a step takes.
    """
    order = np.random.default_rng([seed, zlib.crc32(b"held out")]).permutation(len(samples))[: settings.samples]
    size = static or settings.batch_size
    count = math.ceil(len(order) * settings.held_out)
    if static:
        count = math.ceil(count / static) * static
    course = Course(samples, order[count:], order[:count], size, seed)
    if not course.steps:
        held = f" beside the {count} that are held out" if count else ""
        raise DataError(
            f"there are {len(course.training)} training samples{held}, fewer than the {size} of a batch: lower "
            "batch_size, give the data spec a larger training split, or hold out fewer"
        )
    return course


def ahead(items: Iterator[T], depth: int = 1) -> Iterator[T]:
    """The same items, each made in a thread of its own while those before it are used; ``depth`` wait at most."""
    with ThreadPoolExecutor(1) as pool:
        waiting = deque(pool.submit(next, items, None) for _ in range(depth))
        while (item := waiting.popleft().result()) is not None:
            waiting.append(pool.submit(next, items, None))
            yield item
