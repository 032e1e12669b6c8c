"""What baselines gave to samples: every choice of a search is judged by the same baselines on the same samples."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from optkit.models import Feeds
from optkit.targets.base import Runner

MOST_BYTES = 1 << 28
"""Of outputs that are remembered; whatever does not fit is computed each time."""


class Memory:
    """Outputs by baseline and feeds, for as long as the baselines do not change."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._outputs: dict[tuple[str, bytes], dict[str, np.ndarray[Any, Any]]] = {}
        self._left = most_bytes

    def of(self, name: str, runner: Runner) -> Runner:
        """The baseline of that name as a runner that is asked only for what is not remembered."""
        return _Remembering(self, name, runner)

    def run(self, name: str, runner: Runner, feeds: Feeds) -> dict[str, np.ndarray[Any, Any]]:
        """What a baseline gives or gave."""
        key = name, _digest(feeds)
        if key not in self._outputs:
            outputs = runner.run(feeds)
            size = sum(array.nbytes for array in outputs.values())
            if size > self._left:
                return outputs
            self._left -= size
            self._outputs[key] = outputs
        return dict(self._outputs[key])


class _Remembering:
    """A runner with a memory; it is timed as it is."""

    def __init__(self, memory: Memory, name: str, runner: Runner) -> None:
        self.signature, self.environment = runner.signature, runner.environment
        self._memory, self._name, self._runner = memory, name, runner
        self.time, self.close = runner.time, runner.close

    def run(self, feeds: Feeds) -> dict[str, np.ndarray[Any, Any]]:
        """What the runner gives or gave."""
        return self._memory.run(self._name, self._runner, feeds)

    def __enter__(self) -> _Remembering:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _digest(feeds: Feeds) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(feeds):
        array = np.ascontiguousarray(feeds[name])
        digest.update(f"{name}{array.dtype}{array.shape}".encode())
        digest.update(array.data if array.dtype.kind in "iufb" else array.tobytes())
    return digest.digest()
