"""How much of a compile is optkit's own work: everything but export, inference, third-party builders and validation.

    python benchmarks/overhead.py [RECIPE] [--out FILE]

CPU seconds of one process on one thread, so that other jobs on the machine do not count. Imports are not counted: they
are paid once, and `optkit --help` has a bound of its own.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import torch

import optkit
from optkit import compiler
from optkit.passes import optimize_graph  # noqa: F401  imported here, so that its import is not counted
from optkit.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]


class Clock:
    """CPU seconds by account; what a call makes inside another account's call belongs to the outer one."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._open: str | None = None

    def charge(self, account: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._open is not None:
                return function(*args, **kwargs)
            self._open, start = account, time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[account] += time.process_time() - start
                self._open = None

        return timed


def measure(recipe: Recipe) -> dict[str, float]:
    clock = Clock()
    torch.onnx.export = clock.charge("export", torch.onnx.export)
    session = onnxruntime.InferenceSession
    session.__init__ = clock.charge("ONNX Runtime: build and open", session.__init__)
    session.run = clock.charge("ONNX Runtime: inference", session.run)
    session.run_with_iobinding = clock.charge("ONNX Runtime: inference", session.run_with_iobinding)
    torch.nn.Module.__call__ = clock.charge("PyTorch: inference", torch.nn.Module.__call__)
    compiler.judge = clock.charge("validation", compiler.judge)
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        optkit.compile(None, recipe, Path(folder) / "out")
        total = time.process_time() - start
    return {**clock.seconds, "optkit": total - sum(clock.seconds.values()), "total": total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", nargs="?", default=str(ROOT / "recipes/efficientnet-lite0-int8.yaml"))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    recipe = Recipe.load(arguments.recipe)
    recipe = recipe.updated(threads=1, gate={"max_drop": 100.0})
    seconds = measure(recipe)
    for account, spent in sorted(seconds.items(), key=lambda item: item[1]):
        print(f"{account:30} {spent:8.2f} s {100 * spent / seconds['total']:6.1f} %")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(seconds, indent=1))


if __name__ == "__main__":
    main()
