"""Times the kernels of a saved ONNX Runtime model, in sessions of their own."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from optkit.errors import PassError
from optkit.models import Engine, Feeds, OnnxModel
from optkit.targets.onnxruntime_kernels import kernel_nodes
from optkit.targets.profiling import LayerTime

_WARM_UP = 3
"""Calls before those that count."""

_KERNEL_TIME = "_kernel_time"


class OrtProfiler:
    """Opens a session for every profile: ONNX Runtime writes down what its kernels took when a session ends."""

    def __init__(self, engine: Engine, model: OnnxModel, options: Callable[[], Any]) -> None:
        import onnx

        self._path = engine.path
        self._options = options
        self._kernels = list(onnx.load(engine.path, load_external_data=False).graph.node)
        self._nodes = kernel_nodes(model, self._kernels)

    def layers(self, feeds: Feeds, calls: int) -> tuple[LayerTime, ...]:
        """The time of every kernel: the mean of the middle half of the calls, for the clock counts microseconds.

        Raises:
            PassError: ONNX Runtime failed.
        """
        times = self._times(self._events(feeds, calls))
        return tuple(
            LayerTime(kernel.name, nodes, 1e-6 * _middle(times[index]))
            for index, (kernel, nodes) in enumerate(zip(self._kernels, self._nodes, strict=True))
            if index in times
        )

    def _events(self, feeds: Feeds, calls: int) -> list[dict[str, Any]]:
        import onnxruntime as ort

        options, feeds = self._options(), dict(feeds)
        with tempfile.TemporaryDirectory() as folder:
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "profile")
            try:
                session = ort.InferenceSession(str(self._path), options, providers=["CPUExecutionProvider"])
                for _ in range(_WARM_UP + calls):
                    session.run(None, feeds)
            except Exception as error:
                raise PassError(f"ONNX Runtime failed under its profiler: {error}") from error
            events: list[dict[str, Any]] = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        return events

    def _times(self, events: Iterable[Mapping[str, Any]]) -> dict[int, list[float]]:
        """Microseconds of each call by the place of the kernel; what runs inside an If or Loop is in its time."""
        times: dict[int, list[float]] = defaultdict(list)
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith(_KERNEL_TIME):
                index = int(event["args"]["node_index"])
                named = self._kernels[index].name if index < len(self._kernels) else None
                if event["name"] == f"{named}{_KERNEL_TIME}":
                    times[index].append(event["dur"])
        return {index: taken[_WARM_UP:] for index, taken in times.items() if len(taken) > _WARM_UP}

    def __enter__(self) -> OrtProfiler:
        return self

    def __exit__(self, *exc: object) -> None: ...


def _middle(times: list[float]) -> float:
    ordered = np.sort(times)
    quarter = len(ordered) // 4
    return float(np.mean(ordered[quarter : len(ordered) - quarter]))
