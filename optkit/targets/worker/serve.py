"""The worker's main loop: one request, then news while it is worked on, then one reply; until the pipe ends.

Arrays travel beside the JSON, and are the entry ``arrays`` of a request and of a reply.

News are ``{"kind": "alive", "memory": peak bytes}``, four times a second, and ``{"kind": "progress", "percent",
"phase"}``; the reply is ``{"kind": "reply", ...}``. If TensorRT refused, ``error`` in it is ``refused``, ``text`` says
why, and ``nodes`` are the ONNX nodes at fault; if anything else went wrong it is ``failed``. Standard error is the log.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from typing import IO, TYPE_CHECKING, Any

from . import build, run
from .frames import read_frame, write_frame
from .gpu import CudaError

if TYPE_CHECKING:
    from collections.abc import Mapping

HEARTBEAT_SECONDS = 0.25


class Channel:
    """The way back, shared by the main thread and the heartbeat."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._lock = threading.Lock()

    def send(self, message: Mapping[str, Any], arrays: Mapping[str, Any] | None = None) -> None:
        """Send a frame; when nobody listens any more, end the process, whatever TensorRT is doing."""
        try:
            with self._lock:
                write_frame(self._file, message, arrays)
        except OSError:
            os._exit(1)


def main() -> None:
    """Serve requests from standard input."""
    channel = Channel(_own_stdout())
    threading.Thread(target=_beat, args=(channel,), daemon=True).start()
    runtime = run.Runtime()
    operations = {
        "probe": build.probe,
        "build": build.build,
        "inspect": build.inspect,
        "open": runtime.open,
        "run": runtime.run,
        "share": runtime.share,
        "run_shared": runtime.run_shared,
        "time": runtime.time,
        "profile": runtime.profile,
    }
    while True:
        frame = read_frame(sys.stdin.buffer)
        if frame is None:
            return
        request, arrays = frame
        try:
            reply = operations[request["do"]](dict(request, arrays=arrays), channel.send)
        except build.RefusalError as error:
            reply = {"error": "refused", "text": str(error), "nodes": error.nodes}
        except CudaError as error:
            reply = {"error": "cuda", "text": str(error), "out_of_memory": error.out_of_memory}
        except Exception as error:
            traceback.print_exc()
            reply = {"error": "failed", "text": f"{type(error).__name__}: {error}"}
        sys.stderr.flush()
        given = reply.pop("arrays", None)
        channel.send(dict(reply, kind="reply"), given)


def _own_stdout() -> IO[bytes]:
    """Keep standard output for frames alone: whatever else prints, in Python or in C++, goes to the log."""
    sys.stdout.flush()
    frames = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return frames


def _beat(channel: Channel) -> None:
    while True:
        channel.send({"kind": "alive", "memory": _peak_memory()})
        time.sleep(HEARTBEAT_SECONDS)


def _peak_memory() -> int:
    """Bytes of memory that this process had at its largest, or 0 where the system does not say."""
    try:
        # Not getrusage: on Linux it counts what the process that started this one held by then
        with open("/proc/self/status") as status:  # noqa: PTH123 (the shortest way there is, four times a second)
            return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
