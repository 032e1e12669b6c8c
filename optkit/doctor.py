"""What this machine has of what optkit uses, and the step that would mend each thing that is missing."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from optkit.targets import cuda, tensorrt_plan
from optkit.targets.base import Availability, Target
from optkit.targets.cpu import this_cpu
from optkit.targets.onnxruntime import OnnxRuntimeTarget
from optkit.targets.onnxruntime_cuda import OnnxRuntimeCudaTarget
from optkit.targets.tensorrt import INSTALL, MODULE, TensorRtTarget
from optkit.targets.tensorrt_rtx import TensorRtRtxTarget
from optkit.targets.worker_client import probe, worker_python

PYTHONS = ((3, 10), (3, 13))

ROOM = 2 << 30
"""Bytes of memory and of disk below which a compile of a small model may fail."""

MEMINFO = Path("/proc/meminfo")

_OUR_FAULT = "nothing that you can do: please report this line"

_CORE = ("torch", "onnx", "onnx_ir", "onnxscript", "numpy", "safetensors")
_OPTIONAL = {
    "datasets": "datasets",
    "transformers": "'optkit[transformers]'",
    "pillow": "'optkit[images]'",
    "torch-pruning": "'optkit[prune]'",
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        subject: what it is: a package, a target, a piece of the machine.
        ok: whether it is there and fit for use.
        detail: its version or size, or what is wrong with it.
        mend: the command or step that would mend it; empty where nothing needs to be done.
        required: whether optkit cannot work at all without it.
    """

    subject: str
    ok: bool
    detail: str
    mend: str = ""
    required: bool = False


def diagnose(folder: Path | None = None) -> list[Finding]:
    """Look at everything, in the order in which it matters; never raises.

    Args:
        folder: whose disk is looked at; the current folder if not given.
    """
    folder = folder or Path()
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("python", _python),
        *((name, lambda name=name: _core(name)) for name in _CORE),
        *((name, lambda name=name: _optional(name)) for name in _OPTIONAL),
        ("onnxruntime", _onnxruntime),
        ("onnxruntime on a GPU", _onnxruntime_cuda),
        ("TensorRT", _tensorrt),
        ("GPU", _gpu),
        ("processor", _processor),
        ("memory", _memory),
        ("disk", lambda: _disk(folder)),
    ]
    return [finding for subject, check in checks for finding in _survived(subject, check)]


def _survived(subject: str, check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """What a check found; a check that fails is a finding too. A broken package raises whatever it likes."""
    try:
        return list(check())
    except Exception as error:
        return [Finding(subject, False, f"cannot be looked at: {type(error).__name__}: {error}", _OUR_FAULT)]


def _python() -> Iterator[Finding]:
    here, (oldest, newest) = sys.version_info[:2], PYTHONS
    detail = f"{sys.version.split()[0]} at {sys.executable}"
    span = "{}.{} to {}.{}".format(*oldest, *newest)
    ok = oldest <= here <= newest
    yield Finding("python", ok, detail, "" if ok else f"use Python {span}", required=True)


def _core(name: str) -> Iterator[Finding]:
    distribution = name.replace("_", "-")
    try:
        importlib.import_module(name)
        yield Finding(name, True, version(distribution), required=True)
    except Exception as error:  # a broken library raises anything
        detail = f"cannot be imported: {type(error).__name__}: {error}"
        yield Finding(name, False, detail, f"pip install {distribution}", required=True)


def _optional(distribution: str) -> Iterator[Finding]:
    try:
        yield Finding(distribution, True, version(distribution))
    except PackageNotFoundError:
        yield Finding(distribution, False, "not installed", f"pip install {_OPTIONAL[distribution]}")


def _onnxruntime() -> Iterator[Finding]:
    target = OnnxRuntimeTarget()
    yield _target(target, "build", target.can_build())
    if target.can_run().ok:
        import onnxruntime as ort

        providers = ", ".join(name.removesuffix("ExecutionProvider") for name in ort.get_available_providers())
        yield Finding("target onnxruntime: run", True, f"onnxruntime {ort.__version__}, providers: {providers}")


def _onnxruntime_cuda() -> Iterator[Finding]:
    target = OnnxRuntimeCudaTarget()
    yield _target(target, "build", target.can_build())


def _tensorrt() -> Iterator[Finding]:
    for target in (TensorRtTarget(), TensorRtRtxTarget()):
        yield _target(target, "build", target.can_build())
        yield _target(target, "run", target.can_run())
    found = tensorrt_plan.find(MODULE, INSTALL)
    if not found.ok:
        yield Finding("tensorrt", False, found.reason, found.mend)
        return
    told = probe(MODULE)
    yield Finding("tensorrt", True, f"{told['version']}, in Python {told['python']} at {worker_python()}")


def _target(target: Target, what: str, availability: Availability) -> Finding:
    versions = ", ".join(f"{name} {number}" for name, number in target.versions().items())
    detail = versions if availability.ok else availability.reason
    return Finding(f"target {target.name}: {what}", availability.ok, detail, availability.mend)


def _gpu() -> Iterator[Finding]:
    found = cuda.detect()
    if not found.gpus:
        yield Finding("GPU", False, found.reason, "install the NVIDIA driver, if this machine has such a GPU")
    for gpu in found.gpus:
        detail = f"{gpu.name}, compute capability {gpu.capability}, {_gigabytes(gpu.memory)}, CUDA up to {found.cuda}"
        yield Finding("GPU", True, detail)


def _processor() -> Iterator[Finding]:
    cpu = this_cpu()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    detail = f"{cpu.name}, {cores} usable logical cores, {', '.join(cpu.features) or 'features unknown'}"
    if cpu.saturates_int8:
        detail += "; without VNNI: INT8 saturates on large weights (`exact_int8` of the target onnxruntime avoids it)"
    yield Finding("processor", True, detail)


def _memory() -> Iterator[Finding]:
    if not MEMINFO.exists():
        yield Finding("memory", True, "this system does not say")
        return
    lines = MEMINFO.read_text(encoding="utf-8").splitlines()
    sizes = {key: int(value.split()[0]) << 10 for key, _, value in (line.partition(":") for line in lines)}
    free, total = sizes["MemAvailable"], sizes["MemTotal"]
    limit = _control_group_limit()
    ok = min(free, limit or free) >= ROOM
    detail = f"{_gigabytes(free)} of {_gigabytes(total)} free"
    if limit is not None and limit < total:
        detail += f", {_gigabytes(limit)} allowed in this container"
    yield Finding("memory", ok, detail, "" if ok else "close something, or use a larger machine")


def _control_group_limit() -> int | None:
    try:
        text = Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _disk(folder: Path) -> Iterator[Finding]:
    if not folder.is_dir():
        yield Finding("disk", False, f"there is no folder {folder}", "work in a folder that exists")
        return
    free = shutil.disk_usage(folder).free
    ok = free >= ROOM and os.access(folder, os.W_OK)
    detail = f"{_gigabytes(free)} free at {folder.resolve()}" + ("" if os.access(folder, os.W_OK) else ", read-only")
    yield Finding("disk", ok, detail, "" if ok else "free some space, or work in another folder")


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
