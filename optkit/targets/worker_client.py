"""Talks to the process that TensorRT runs in, so that a crash, a hang or a lack of memory there is an error here."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optkit.context import Progress, silent
from optkit.errors import BuildError, UnavailableError
from optkit.models import Feeds
from optkit.targets.worker.frames import FrameError, read_frame, write_frame

PYTHON_VARIABLE = "OPTKIT_TENSORRT_PYTHON"

# The folder of this file holds modules that are named like the packages that they use: it must not stay on the path
_BOOT = "import sys; sys.path[0] = sys.argv[1]; from worker.serve import main; del sys.path[0]; main()"

# CUDA from 11.7 on: load a kernel when it is first called, and not all of TensorRT's when the process starts
_LAZY = {"CUDA_MODULE_LOADING": "LAZY"}

_LOG_LINES = 12
_PROBE_SECONDS = 120.0


def worker_python() -> str:
    """The Python that has TensorRT: ``OPTKIT_TENSORRT_PYTHON``, or the one that runs optkit."""
    return os.environ.get(PYTHON_VARIABLE) or sys.executable


@dataclass(frozen=True)
class Limits:
    """What a worker may take before it is killed.

    Attributes:
        seconds: for one request.
        memory_mb: of this machine's memory, in megabytes; None for as much as there is.
    """

    seconds: float
    memory_mb: int | None = None


class Worker:
    """A running worker process. Use it as a context manager: leaving it ends the process and all that it started.

    Args:
        limits: what it may take. The worker tells four times a second how much memory it holds. The system's own limits
            are of no use for that: they count address space, of which CUDA reserves far more than there is memory.
        python: the Python that runs it; None for ``worker_python``.

    Raises:
        UnavailableError: the Python cannot be started.
    """

    def __init__(self, limits: Limits, python: str | None = None) -> None:
        self._limits = limits
        self._python = python or worker_python()
        # Appending: this process reads it while the worker goes on writing
        self._log = tempfile.TemporaryFile("a+b")  # noqa: SIM115
        command = [self._python, "-c", _BOOT, str(Path(__file__).resolve().parent)]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=_LAZY | os.environ,
                start_new_session=True,
            )
        except OSError as error:
            self._log.close()
            raise UnavailableError(
                f"{self._python!r} cannot be started ({error.strerror}): set {PYTHON_VARIABLE} to a Python that has "
                "TensorRT, or unset it"
            ) from error
        self._frames: queue.Queue[dict[str, Any] | Exception | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self._memory = 0
        self._phase = ""
        self._over = ""  # why it was killed

    @property
    def pid(self) -> int:
        """The process, which leads a process group of its own."""
        return self._process.pid

    def call(
        self,
        request: Mapping[str, Any],
        progress: Progress = silent,
        description: str = "",
        arrays: Feeds | None = None,
    ) -> dict[str, Any]:
        """Send a request and wait for its reply, which has ``error`` and ``text`` in it if TensorRT refused.

        Arrays of the reply are its entry ``arrays``.

        Args:
            request: ``do`` and its arguments, as ``worker.serve`` has them.
            progress: shows how far the work is, where TensorRT tells.
            description: what the work is called there.
            arrays: travel beside the request.

        Raises:
            BuildError: the worker crashed, was killed, went over its limits, or does not speak its language.
        """
        if self._over:
            raise BuildError(f"{self._over}: open the engine again")
        with suppress(OSError):  # it has died: the end of its frames says how
            assert self._process.stdin is not None
            write_frame(self._process.stdin, request, arrays)
        reply: dict[str, Any] = {}
        for _ in progress(self._percents(reply), description, 100):
            pass
        return reply

    def log(self) -> str:
        """The last lines that TensorRT and the worker logged."""
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").splitlines()
        return "\n".join(lines[-_LOG_LINES:])

    def close(self) -> None:
        """Kill the process group."""
        self._kill()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):
                assert pipe is not None
                pipe.close()
        self._log.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _kill(self) -> None:
        if os.name == "posix":
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        else:
            self._process.kill()
        self._process.wait()

    def _read(self) -> None:
        """Put frames into the queue, then what ended them: None for the end of the pipe, else the error."""
        assert self._process.stdout is not None
        try:
            while frame := read_frame(self._process.stdout):
                message, arrays = frame
                self._frames.put({**message, "arrays": arrays} if arrays else message)
            self._frames.put(None)
        except (FrameError, OSError, ValueError) as error:
            self._frames.put(error)

    def _percents(self, reply: dict[str, Any]) -> Iterator[int]:
        """Every percent once as it is reached, all of them by the end; ``reply`` is filled in place."""
        start = time.monotonic()
        shown = 0
        while not reply:
            try:
                frame = self._frames.get(timeout=max(0.0, start + self._limits.seconds - time.monotonic()))
            except queue.Empty:
                raise self._killed(
                    f"did not finish within {self._limits.seconds:g} s{self._state()}",
                    "raise `timeout` of the target, or look into its log",
                ) from None
            if not isinstance(frame, dict):
                raise self._ended(frame, time.monotonic() - start)
            self._memory = frame.get("memory", self._memory)
            self._phase = frame.get("phase", self._phase)
            if self._limits.memory_mb is not None and self._memory > self._limits.memory_mb << 20:
                raise self._killed(
                    f"took more than {self._limits.memory_mb} MB of memory after {time.monotonic() - start:.1f} s"
                    f"{self._state()}",
                    "raise `memory_mb` of the target, or build on a larger machine",
                )
            if frame["kind"] == "reply":
                reply.update(frame)
            for percent in range(shown, 100 if reply else frame.get("percent", 0)):
                shown = percent + 1
                yield shown

    def _killed(self, what: str, mend: str) -> BuildError:
        """Kill a worker that went over its limits; a reply that comes all the same is nobody's."""
        self._over = f"the TensorRT worker {what}, and was killed"
        self._kill()
        return BuildError(f"{self._over}: {mend}{self._logged()}")

    def _ended(self, error: Exception | None, seconds: float) -> BuildError:
        if error is not None:
            return BuildError(
                f"the TensorRT worker answered in another language ({error}): {PYTHON_VARIABLE} must be a Python, "
                f"and {self._python!r} does not behave like one{self._logged()}"
            )
        how, mend = _cause_of_death(self._process.wait())
        if not self._memory:  # not even one heartbeat
            mend = f"it never began; {PYTHON_VARIABLE} must be a Python from 3.8 on, and {self._python!r} was used"
        return BuildError(f"the TensorRT worker {how} after {seconds:.1f} s{self._state()}: {mend}{self._logged()}")

    def _state(self) -> str:
        phase = f" in its phase {self._phase!r}" if self._phase else ""
        return phase + (f" with {self._memory / 1e6:.0f} MB of memory" if self._memory else "")

    def _logged(self) -> str:
        log = self.log()
        return f"\n{log}" if log else " (the log is empty)"


def _cause_of_death(code: int) -> tuple[str, str]:
    """How a process ended, and what to do about it. A shell tells signals as 128 + the signal."""
    number = -code if code < 0 else code - 128
    names = {int(member): member.name for member in signal.Signals}
    if number not in names:
        return f"ended with exit code {code}", "its log says why"
    if names[number] == "SIGKILL":
        return "was killed by SIGKILL", (
            "if nobody did so by hand it was the system, for want of memory; free some, lower `workspace_mb` of the "
            "target, or build on a larger machine"
        )
    return f"crashed with {names[number]}", "TensorRT itself failed; its log may name the layer"


_probed: dict[tuple[str, str], dict[str, Any]] = {}


def probe(module: str, python: str | None = None) -> dict[str, Any]:
    """What the worker's Python says of ``tensorrt`` or ``tensorrt_rtx``: ``version`` and ``features``, else ``error``.

    The version of that Python is with it, as ``python``. A worker takes seconds to import TensorRT, so what was found
    is remembered; what was not is looked for again, as somebody may have installed it since.

    Raises:
        UnavailableError: the Python cannot be started.
        BuildError: it does not behave as a Python does, or dies.
    """
    key = (python or worker_python(), module)
    if key in _probed:
        return _probed[key]
    with Worker(Limits(_PROBE_SECONDS), python) as worker:
        found = worker.call({"do": "probe", "module": module})
    if "error" not in found:
        _probed[key] = found
    return found
