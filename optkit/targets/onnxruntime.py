"""ONNX Runtime: runs every ONNX model here, and is the target for CPUs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

import numpy as np

from optkit.context import Context
from optkit.errors import UnavailableError
from optkit.models import Engine, Feeds, OnnxModel, Signature
from optkit.targets.base import ORT_CPU, Availability, Dialect, Environment, Target


class OrtRunner:
    """An ONNX Runtime session."""

    def __init__(self, session: Any, signature: Signature, environment: Environment) -> None:
        self.signature = signature
        self.environment = environment
        self._session = session
        self._outputs = [output.name for output in session.get_outputs()]

    def run(self, feeds: Feeds) -> dict[str, np.ndarray[Any, Any]]:
        """Outputs by name for one batch of feeds."""
        return dict(zip(self._outputs, self._session.run(None, dict(feeds)), strict=True))

    def time(self, feeds: Feeds, rounds: int) -> np.ndarray[Any, Any]:
        """Seconds of each of ``rounds`` calls, copies of the outputs included."""
        samples = np.empty(rounds)
        feeds = dict(feeds)
        for i in range(rounds):
            start = time.perf_counter_ns()
            self._session.run(None, feeds)
            samples[i] = (time.perf_counter_ns() - start) * 1e-9
        return samples

    def close(self) -> None:
        """Release the session."""
        self._session = None

    def __enter__(self) -> OrtRunner:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def open_onnx(model: OnnxModel, threads: int = 1, optimize: bool = True) -> OrtRunner:
    """Run an ONNX model that is in memory on ONNX Runtime's CPU provider.

    Args:
        model: the model; its graph outputs may be more than the signature's (probes).
        threads: intra-op threads.
        optimize: let ONNX Runtime fuse the graph; without it every Q/DQ pair runs as it is written.
    """
    import onnx_ir as ir
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    payload = ir.to_proto(model.ir).SerializeToString()
    session = ort.InferenceSession(payload, options, providers=["CPUExecutionProvider"])
    environment = Environment("CPU", f"onnxruntime {ort.__version__}", {"threads": threads})
    return OrtRunner(session, model.signature, environment)


class OnnxRuntimeTarget(Target):
    """ONNX Runtime on the CPU."""

    name: Literal["onnxruntime"] = "onnxruntime"

    @property
    def dialect(self) -> Dialect:
        """UINT8 activations, convolutions quantized in and out, matrix products on their inputs only."""
        return Dialect(int8=ORT_CPU, domains=frozenset({"com.microsoft"}))

    def can_build(self) -> Availability:
        """Whether onnxruntime is installed."""
        return self.can_run()

    def can_run(self) -> Availability:
        """Whether onnxruntime is installed."""
        try:
            import onnxruntime  # noqa: F401
        except ImportError as error:
            return Availability(False, f"onnxruntime cannot be imported ({error})", "pip install 'optkit[cpu]'")
        return Availability(True)

    def build(self, model: OnnxModel, folder: Path, context: Context) -> Engine:
        """TODO helper: save the optimized model."""
        raise UnavailableError("not written yet")
