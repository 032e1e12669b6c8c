"""Trains in processes that die at chosen moments, one after the other, until one comes to the end.

python interrupted.py FOLDER WEIGHTS [DEATH ...]

A death is ``step:N`` (SIGKILL after step N), ``term:N`` (SIGTERM, which the command line turns into KeyboardInterrupt),
``write:N`` (SIGKILL when half of the N-th state is written) or ``rename:N`` (SIGKILL before it gets its name). Each
process prints how many steps were left when it began; the last one writes the weights.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo  # optimizers import it, which takes seconds: once for all forked processes
from training_nets import frozen, net, write_points

from optkit.context import Context
from optkit.data import Batch, open_data
from optkit.targets.onnxruntime import OnnxRuntimeTarget
from optkit.training import Hooks, Objective, State, Training, train
from optkit.training.hooks import HookCalls
from optkit.training.learner import Learner  # noqa: F401  # for the same reason


class Noisy(Hooks):
    """Draws from every generator, and remembers something of its own."""

    def __init__(self, context: Context, death: str) -> None:
        super().__init__(context)
        self.kind, _, number = death.partition(":")
        self.at = int(number or -1)
        self.seen = 0.0

    def batch(self, batch: Batch, rng: np.random.Generator) -> Batch:
        noise = rng.normal(size=2) + np.random.normal(size=2)  # with a random state that has to survive too
        return Batch({"point": batch.feeds["point"] + np.float32(0.01) * noise.astype(np.float32)}, batch.labels)

    def loss(self, parts: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss * (1 + 0.1 * self.seen / (1 + self.seen))

    def on_step(self, state: State) -> None:
        self.seen += state.loss
        if state.step == self.at and self.kind in ("step", "term"):
            os.kill(os.getpid(), signal.SIGKILL if self.kind == "step" else signal.SIGTERM)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: Any) -> None:
        self.seen = state["seen"]


def told(items: Iterable[Any], description: Any, total: int | None = None) -> Iterator[Any]:
    print(total, flush=True)
    return iter(items)


def run(folder: Path, weights: Path, death: str) -> None:
    """One process's life."""
    torch.set_num_threads(1)
    context = Context(
        OnnxRuntimeTarget(), folder, open_data(folder / "points.yaml"), 7, 1, told, resume=folder / "state"
    )
    hooks = Noisy(context, death)
    if hooks.kind in ("write", "rename"):
        die_while_saving(hooks.kind, hooks.at)
    torch.manual_seed(1)
    student, teacher = frozen(net(8)), frozen(net(16))
    settings = Training(epochs=3, batch_size=64, learning_rate=0.03, save_every=0, clip=1.0)
    trained = train(
        student, settings, context, objective=Objective(features=["0"]), teacher=teacher, hooks=HookCalls(hooks)
    )
    torch.save(trained.module.state_dict(), weights)


def die_while_saving(kind: str, number: int) -> None:
    """Let the process die in the middle of its ``number``-th state."""
    save, fsync, saved = torch.save, os.fsync, 0

    def counted(state: Any, file: Any) -> None:
        nonlocal saved
        saved += 1
        whole = io.BytesIO()
        save(state, whole)
        content = whole.getvalue()
        file.write(content[: len(content) // 2] if saved == number and kind == "write" else content)
        if saved == number and kind == "write":
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        if saved == number and kind == "rename":
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save, os.fsync = counted, synced  # type: ignore[assignment]


def main(folder: Path, weights: Path, deaths: list[str]) -> None:
    """One process for each death, and one that lives. They are forked before PyTorch has computed anything."""
    write_points(folder)
    for death in [*deaths, ""]:
        child = os.fork()
        if not child:
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            try:
                run(folder, weights, death)
            except KeyboardInterrupt:
                os._exit(130)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        expected = {"": 0, "term": 130}.get(death.partition(":")[0], -signal.SIGKILL)
        if os.waitstatus_to_exitcode(status) != expected:
            sys.exit(f"{death or 'the last process'} ended with {os.waitstatus_to_exitcode(status)}, not {expected}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
