"""The samples that every entrant gets: a folder with one memory-mapped ``.npy`` for each input. NumPy only."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


class Samples:
    """Inputs by name, without labels."""

    def __init__(self, arrays: dict[str, Array]) -> None:
        self.arrays = arrays

    @classmethod
    def load(cls, folder: Path) -> Samples:
        paths = sorted(folder.glob("*.npy"))
        return cls({path.stem: np.load(path, mmap_mode="r") for path in paths if path.stem != "labels"})

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def first(self, count: int) -> Samples:
        """The first ``count`` of these samples."""
        return Samples({name: array[:count] for name, array in self.arrays.items()})

    def batches(self, size: int = 1) -> Iterator[dict[str, Array]]:
        for start in range(0, len(self), size):
            yield {name: np.ascontiguousarray(array[start : start + size]) for name, array in self.arrays.items()}


def arguments() -> tuple[Path, Samples, Path, dict[str, Any]]:
    """The command line of every quantize_*.py: float model, samples, how many, where to write, options as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("samples", type=Path)
    parser.add_argument("count", type=int)
    parser.add_argument("out", type=Path)
    parser.add_argument("options", type=json.loads)
    given = parser.parse_args()
    return given.model, Samples.load(given.samples).first(given.count), given.out, given.options
