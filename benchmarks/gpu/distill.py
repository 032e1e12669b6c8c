"""Does optkit's distillation keep a GPU as busy as a loop by hand would? Both in turns, in one process.

    python3 -m benchmarks.gpu.distill --out distill.json --seconds 80
    python -m benchmarks.gpu.distill --tiny                              # on a CPU, seconds: does it run?

A ResNet-50 learns from labels and from another ResNet-50, on random images that lie in memory, with mixed precision and
channels last. "optkit" is the pass ``distill`` with a data spec whose source is a Python function. "plain" is PyTorch
only: the same teacher, loss, optimizer, clipping, schedule and precision, and batches that a thread gathers from one
tensor and pins, which is the shortest way there is. "plain, no teacher" is for information and runs once. Each turn
trains anew; its clock starts after some steps and stops after the last one, when the GPU has done its work, so setting
up does not count. Neither validates. Where there are several GPUs, a second part shares each batch out among all of
them, both entrants with ``DataParallel``.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import os
import platform
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn
from torch.nn import functional as F

from optkit.context import Context
from optkit.data import Data, open_data
from optkit.models import Signature, TensorSpec, TorchModel
from optkit.passes.distill import Distill
from optkit.recipe import Recipe
from optkit.training import Hooks, State, Training
from optkit.training.hardware import hardware_for
from optkit.training.samples import ahead
from optkit.validation.statistics import ratio_of_rounds

WARM = 4
"""Steps before the clock starts."""
BAR = 0.9
OPTKIT, PLAIN, ALONE = "optkit distill", "plain distill", "plain, no teacher"

MARKS: list[float] = []
"""When the clock of the present turn started and stopped."""


@lru_cache(maxsize=1)
def pictures(count: int, size: int, classes: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Random images float32[count, 3, size, size] and labels int64[count]."""
    rng = np.random.default_rng(0)
    images = rng.random((count, 3, size, size), np.float32)
    images -= np.float32(0.5)
    return images, rng.integers(0, classes, count)


def rows(count: int, size: int, classes: int) -> list[dict[str, Any]]:
    """The same as rows of a data spec."""
    return [{"image": image, "label": label} for image, label in zip(*pictures(count, size, classes), strict=True)]


def mark(step: int, steps: int) -> None:
    """Note the time where the clock starts and stops."""
    if step in (WARM, steps):
        if torch.cuda.is_available():
            for device in range(torch.cuda.device_count()):
                torch.cuda.synchronize(device)
        MARKS.append(time.perf_counter())


class Clock(Hooks):
    """Notes when optkit's steps are done."""

    def on_step(self, state: State) -> None:
        mark(state.step, state.steps)


class Plain:
    """The loop by hand."""

    def __init__(self, given: argparse.Namespace, training: Training) -> None:
        images, labels = pictures(given.samples + 1, given.size, given.classes)
        self.images, self.labels = torch.from_numpy(images), torch.from_numpy(labels)
        self.training, self.samples = training, given.samples
        self.gpu = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.gpu else "cpu")
        self.half = torch.bfloat16 if self.gpu and torch.cuda.is_bf16_supported() else torch.float16
        self.objective = Distill().loss

    def run(self, student: nn.Module, teacher: nn.Module | None) -> float:
        """Train a copy; the mean loss of the last epoch."""
        settings = self.training
        student = self._placed(student).train().requires_grad_(True)
        master = self._placed(teacher).eval().requires_grad_(False) if teacher is not None else None
        net: nn.Module = _Loss(student, master, self.objective.temperature, self.gpu, self.half)
        if torch.cuda.device_count() > 1:
            net = nn.DataParallel(net)
        weights = list(student.parameters())
        decayed = [weight for weight in weights if weight.ndim > 1]
        others = [weight for weight in weights if weight.ndim <= 1]
        optimizer = torch.optim.SGD(
            [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
            settings.learning_rate,
            momentum=settings.momentum,
            nesterov=True,
            fused=self.gpu,
        )
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.gpu and self.half is torch.float16)
        steps = settings.epochs * (self.samples // settings.batch_size)
        step = 0
        total = torch.zeros((), device=self.device)
        torch.backends.cudnn.benchmark = True
        for epoch in range(settings.epochs):
            total.zero_()
            for x, y in in_thread(self._batches(epoch)):
                for group in optimizer.param_groups:
                    group["lr"] = settings.learning_rate_at(step / steps, 1 / steps)
                if self.gpu:
                    x = x.to(self.device, non_blocking=True).contiguous(memory_format=torch.channels_last)
                    y = y.to(self.device, non_blocking=True)
                optimizer.zero_grad()
                loss = net(x, y).mean()
                scaler.scale(loss).backward()
                if settings.clip is not None:
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(weights, settings.clip)
                scaler.step(optimizer)
                scaler.update()
                total += loss.detach()
                step += 1
                mark(step, steps)
        torch.backends.cudnn.benchmark = False
        return float(total) / (steps // settings.epochs)

    def _placed(self, module: nn.Module) -> nn.Module:
        module = copy.deepcopy(module).to(self.device)
        return module.to(memory_format=torch.channels_last) if self.gpu else module  # type: ignore[call-overload]

    def _batches(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        order = torch.randperm(self.samples, generator=torch.Generator().manual_seed(epoch))
        size = self.training.batch_size
        for start in range(0, self.samples - size + 1, size):
            drawn = order[start : start + size]
            x, y = self.images[drawn], self.labels[drawn]
            yield (x.pin_memory(), y.pin_memory()) if self.gpu else (x, y)


class _Loss(nn.Module):
    """Cross entropy, and with a teacher as ``distill`` mixes it by default."""

    def __init__(
        self, student: nn.Module, teacher: nn.Module | None, temperature: float, amp: bool, half: torch.dtype
    ) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher
        self.temperature, self.amp, self.half = temperature, amp, half

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, dtype=self.half, enabled=self.amp):
            mine = self.student(x)
            hard = F.cross_entropy(mine.float(), y)
            if self.teacher is None:
                return hard.unsqueeze(0)
            with torch.no_grad():
                its = self.teacher(x)
            soft = F.kl_div(
                F.log_softmax(mine.float() / self.temperature, -1),
                F.log_softmax(its.float() / self.temperature, -1),
                reduction="batchmean",
                log_target=True,
            )
            return (0.3 * hard + 0.7 * self.temperature**2 * soft).unsqueeze(0)


def in_thread(items: Iterator[Any], depth: int = 3) -> Iterator[Any]:
    """The items, made by a thread while others are used."""
    made: queue.Queue[Any] = queue.Queue(depth)

    def fill() -> None:
        try:
            for item in items:
                made.put(item)
        finally:  # after a failure, whose traceback Python prints, nobody must wait
            made.put(None)

    threading.Thread(target=fill, daemon=True).start()
    while (item := made.get()) is not None:
        yield item


def network(given: argparse.Namespace, seed: int) -> nn.Module:
    """A ResNet-50, or with --tiny a net that a CPU trains in a second; random weights."""
    torch.manual_seed(seed)
    if given.tiny:
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(8, given.classes),
        )  # fmt: skip
    try:
        from torchvision.models import resnet50
    except ImportError:
        from benchmarks.gpu.prepare import _module

        return _module("resnet50")[0]
    module: nn.Module = resnet50(num_classes=given.classes, zero_init_residual=True)
    return module


def opened(given: argparse.Namespace, folder: Path) -> Data:
    """A data spec with all images but one, which optkit wants to validate with."""
    path = folder / "images.yaml"
    arguments = {"count": given.samples + 1, "size": given.size, "classes": given.classes}
    document = {
        "source": {"kind": "python", "function": "benchmarks.gpu.distill:rows", "arguments": arguments},
        "splits": {
            "calibration": {"count": 1, "rows": [0, given.samples]},
            "validation": {"count": 1, "rows": [given.samples, given.samples + 1]},
        },
        "inputs": {"image": "image"},
        "label": "label",
        "metric": "top1",
    }
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return open_data(path)


def loading(data: Data, training: Training) -> dict[str, float]:
    """Images per second of optkit's own loading, as far as pinned memory, with nothing to wait for."""
    hardware = hardware_for(training)
    samples = data.training(hardware.readers(training))
    found = {}
    for name in ("first", "again"):  # what is pinned first has to be asked from the driver
        started, count = time.perf_counter(), 0
        batches = samples.batches(range(len(samples)), training.batch_size)
        for batch in ahead(map(hardware.pinned, ahead(batches)), 2):
            count += len(batch)
        found[name] = count / (time.perf_counter() - started)
    return found


def measured(given: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """Rounds of turns until the time is over."""
    training = Training(
        epochs=given.epochs, batch_size=given.batch, held_out=0, optimizer="sgd", learning_rate=0.01, clip=1.0
    )
    signature = Signature(
        (TensorSpec("image", "float32", ("batch", 3, given.size, given.size)),),
        (TensorSpec("logits", "float32", ("batch", given.classes)),),
    )
    student, teacher = (TorchModel(network(given, seed).eval().requires_grad_(False), signature) for seed in (1, 2))
    plain = Plain(given, training)
    losses: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = opened(given, Path(folder))
        context = Context(Recipe.load("fp32").target, Path(folder), data, original=teacher)

        def distilled() -> None:
            trained = Distill(train=training, hooks="benchmarks.gpu.distill:Clock").run(student, context)
            losses[OPTKIT] = trained.records["distill"]["epochs"][-1]["loss"]

        def by_hand() -> None:
            losses[PLAIN] = plain.run(student.module, teacher.module)

        def supervised() -> None:
            losses[ALONE] = plain.run(student.module, None)

        turns: dict[str, Callable[[], None]] = {OPTKIT: distilled, PLAIN: by_hand, ALONE: supervised}
        found: dict[str, Any] = {"loading_images_per_s": loading(data, training)}
        seconds: dict[str, list[float]] = {name: [] for name in turns}
        memory: dict[str, float] = {}
        steps = given.epochs * (given.samples // given.batch) - WARM
        longest = 0.0
        for number in range(-1, given.rounds):  # round -1 warms up and does not count
            if number > 0 and time.monotonic() + 1.1 * longest > deadline:
                break
            started = time.monotonic()
            names = [OPTKIT, PLAIN] if number % 2 else [PLAIN, OPTKIT]
            names += [ALONE] if number <= 0 else []
            for name in names:
                taken, memory[name] = timed(turns[name])
                if number >= 0:
                    seconds[name].append(taken / steps)
            longest = max(longest, time.monotonic() - started) if number > 0 else time.monotonic() - started
            told = ", ".join(f"{name} {given.batch / seconds[name][-1]:.0f}/s" for name in names if number >= 0)
            print(f"round {number + 1} ({longest:.1f} s) {told or 'to warm up'}", flush=True)
    turn = {name: [np.array([taken]) for taken in all_taken] for name, all_taken in seconds.items()}
    ratio = ratio_of_rounds(turn[PLAIN], turn[OPTKIT], 0.95, np.random.default_rng(0))
    return {
        **found,
        "gpus": torch.cuda.device_count(),
        "training": training.model_dump(mode="json"),
        "model": type(student.module).__name__,
        "step_seconds": seconds,
        "images_per_s": {name: given.batch / float(np.median(all_taken)) for name, all_taken in seconds.items()},
        "peak_gib": memory,
        "loss": losses,
        "ratio": {"estimate": ratio.estimate, "interval": [ratio.low, ratio.high], "rounds": ratio.n}
        | {"reliable": ratio.reliable, "method": ratio.method},
    }


def timed(turn: Callable[[], None]) -> tuple[float, float]:
    """Seconds from mark to mark, and the most GiB of the first GPU that tensors took."""
    gc.collect()
    MARKS.clear()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    turn()
    start, stop = MARKS
    return stop - start, torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else math.nan


def show(part: dict[str, Any], batch: int) -> None:
    """The table."""
    print(f"\n{part['gpus']} GPU(s), batch {batch}{'images/s':>19}{'ms/step':>9}{'peak GiB':>10}{'loss':>9}")
    for name, speed in part["images_per_s"].items():
        print(
            f"  {name:30}{speed:9.0f}{1e3 * batch / speed:9.2f}{part['peak_gib'][name]:10.2f}{part['loss'][name]:9.3f}"
        )
    loads = part["loading_images_per_s"]
    print(f"  optkit's loading alone: {loads['first']:.0f} images/s at first, then {loads['again']:.0f}")
    ratio, (low, high) = part["ratio"]["estimate"], part["ratio"]["interval"]
    sure = part["ratio"]["reliable"]
    verdict = "met" if sure and low >= BAR else ("missed" if sure and high < BAR else "open")
    trust = "" if sure else " (too few rounds for this interval)"
    print(
        f"  optkit / plain: {ratio:.3f} [{low:.3f}, {high:.3f}] over {part['ratio']['rounds']} rounds{trust}; "
        f"bar {BAR}: {verdict}",
        flush=True,
    )


def machine() -> dict[str, Any]:
    """Where it ran."""
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"gpus": names, "cores": os.cpu_count(), "torch": torch.__version__, "python": platform.python_version()}


def apart(given: argparse.Namespace, began: float) -> list[dict[str, Any]]:
    """One GPU, then all of them, each in a process that sees no other."""
    count = torch.cuda.device_count()
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count))))
    parts = []
    for devices, share in ((seen.split(",")[0], 0.55), (seen, 1.0)):
        left = (given.seconds - (time.monotonic() - began)) * share
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "part.json"
            options = ["--out", str(out), "--seconds", f"{left:.0f}", "--here"]
            command = [sys.executable, "-m", "benchmarks.gpu.distill", *sys.argv[1:], *options]
            if subprocess.run(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": devices}, check=False).returncode:
                print(f"the part on GPU {devices} failed", flush=True)
                continue
            parts += json.loads(out.read_text(encoding="utf-8"))["parts"]
    return parts


def main() -> None:
    """Measure, show, write."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="a JSON file")
    parser.add_argument("--seconds", type=float, default=80, help="start no round that would not end within so many")
    parser.add_argument("--rounds", type=int, default=20, help="at most")
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=1, help="of a turn")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--tiny", action="store_true", help="a small net on small images, 6 rounds")
    parser.add_argument("--here", action="store_true", help="one part, on whatever GPUs there are")
    given = parser.parse_args()
    if given.tiny:
        given.samples, given.batch, given.size, given.classes, given.rounds = 64, 8, 32, 10, 6
    deadline = began + given.seconds
    several = torch.cuda.device_count() > 1 and not given.here
    parts = apart(given, began) if several else [measured(given, deadline)]
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        document = {"command": sys.argv, "machine": machine(), "samples": given.samples, "batch": given.batch}
        given.out.write_text(json.dumps({**document, "parts": parts}, indent=1), encoding="utf-8")
    for part in parts:
        show(part, given.batch)


if __name__ == "__main__":
    # Under its own name: the data spec and the hooks import this module, and its marks must be the same
    from benchmarks.gpu.distill import main as run

    run()
