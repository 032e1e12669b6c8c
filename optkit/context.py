"""What a pass may use beside the model: the target, the data, a scratch folder, a seed, threads and a progress bar."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np

if TYPE_CHECKING:
    from optkit.data import Data
    from optkit.models import OnnxModel, TorchModel
    from optkit.targets.base import Target

T = TypeVar("T")


class Progress(Protocol):
    """Yields what it is given and shows how far it is; the command line draws a bar, everyone else stays silent.

    A description that changes on the way is a function, asked after every item.
    """

    def __call__(  # noqa: D102
        self, items: Iterable[T], description: str | Callable[[], str], total: int | None = None
    ) -> Iterator[T]: ...


def silent(items: Iterable[T], description: str | Callable[[], str], total: int | None = None) -> Iterator[T]:
    """The progress that shows nothing."""
    return iter(items)


@dataclass(frozen=True)
class Context:
    """The surroundings of one run, the same for every pass.

    Attributes:
        target: what the engine will run on; passes ask it what it wants and never test its name.
        scratch: a folder that is deleted at the end of the run.
        data: calibration and validation samples; None if the recipe has no ``data``.
        seed: the only source of randomness.
        threads: intra-op threads of whatever runs on the CPU.
        progress: wraps long loops.
        original: the PyTorch model that came into the pipeline, which no pass changes: the teacher of those that train.
        original_onnx: the ONNX model that came into the pipeline, where it was one.
        resume: a folder that outlives the process, for what an interrupted training needs to go on; it need not exist.
    """

    target: Target
    scratch: Path
    data: Data | None = None
    seed: int = 0
    threads: int = 1
    progress: Progress = silent
    original: TorchModel | None = None
    original_onnx: OnnxModel | None = None
    resume: Path | None = None

    def rng(self, purpose: str) -> np.random.Generator:
        """A generator that depends on the seed and the purpose only, not on who drew before."""
        return np.random.default_rng([self.seed, zlib.crc32(purpose.encode())])
