"""Runs a TensorRT engine in the worker process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from optkit.errors import PassError, UnavailableError, UsageError
from optkit.models import Engine, Feeds, OnnxModel
from optkit.targets import cuda
from optkit.targets.arrays import as_numpy, lies_on_gpu, on_host
from optkit.targets.base import Environment, check_feeds
from optkit.targets.engine_layers import is_copy, nodes_of_layers
from optkit.targets.gpu_exchange import Exchange, GpuArray, RunError
from optkit.targets.profiling import LayerTime
from optkit.targets.worker.gpu import CudaError
from optkit.targets.worker_client import Limits, Worker

_CANNOT_LOAD = "build it again on this machine: optkit verify BUNDLE --rebuild"


class TensorRtRunner:
    """An engine that is open in a worker process of its own.

    ``time`` gives the time on the GPU between two CUDA events, transfers excluded. Inputs may be NumPy arrays or
    whatever has ``__cuda_array_interface__`` or ``__dlpack__``. Outputs lie where inputs lie.

    Args:
        engine: the plan, its signature and its records.
        module: ``tensorrt`` or ``tensorrt_rtx``.
        limits: what the worker may take.
        settings: for the report; ``cuda_graph`` in it says whether to replay graphs.
        contexts: how many execution contexts work side by side when calls are timed.

    Raises:
        UnavailableError: the engine cannot run on this machine.
        UsageError: the file is not an engine of that signature.
    """

    def __init__(
        self, engine: Engine, module: str, limits: Limits, settings: Mapping[str, Any], contexts: int = 1
    ) -> None:
        self.signature = engine.signature
        self._exchange: Exchange | None = None
        if not engine.path.is_file():
            raise UsageError(f"{engine.path} does not exist")
        self._worker = Worker(limits)
        try:
            plan = {"module": module, "plan": str(engine.path.resolve())}
            told = self._worker.call({"do": "open", **plan, "cuda_graph": settings["cuda_graph"], "contexts": contexts})
            if "error" in told:
                reason = f"{engine.path} cannot be opened by TensorRT: {told['text']}"
                raise UnavailableError(f"{reason}: {_CANNOT_LOAD}")
            _check_boundary(engine, told)
        except BaseException:
            self._worker.close()
            raise
        found = cuda.detect()
        device = found.gpus[0].name if found.gpus else "GPU"
        shown = {**settings, "calls": "in a worker", **({"contexts": contexts} if contexts > 1 else {})}
        self.environment = Environment(device, f"{module} {told['version']}", shown, calls_at_once=contexts)

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs by name for one batch of feeds: NumPy arrays, or ``GpuArray`` if one of the feeds lies on the GPU.

        Raises:
            UsageError: a feed is missing, unknown, or not of the signature's dtype and shape.
            PassError: TensorRT failed to run the engine.
        """
        if any(lies_on_gpu(value) for value in feeds.values()):
            return self._run_on_gpu(feeds)
        reply = self._ask("run", on_host(feeds))
        given = reply["arrays"]
        return {spec.name: _typed(given[spec.name], spec.dtype) for spec in self.signature.outputs}

    def _run_on_gpu(self, feeds: Mapping[str, Any]) -> dict[str, GpuArray]:
        """Within the GPU where its memory can be shared with the worker, else through host memory."""
        self._exchange = exchange = self._exchange or Exchange(self.signature, self._worker.call)
        settings = self.environment.settings
        if "gpu_arrays" not in settings:
            try:
                return exchange.run(
                    {name: value if lies_on_gpu(value) else as_numpy(value, name) for name, value in feeds.items()}
                )
            except CudaError as error:
                if error.out_of_memory:
                    raise _failure({"text": str(error), "out_of_memory": True}, "") from error
                settings["gpu_arrays"] = f"through host memory: {error}"
            except RunError as error:
                if "the data decide" not in str(error) and error.reply["error"] != "cuda":
                    raise _failure(error.reply, self._worker.log()) from error
                settings["gpu_arrays"] = f"through host memory: {error}"
        return {name: exchange.upload(array) for name, array in self.run(on_host(feeds)).items()}

    def time(self, feeds: Feeds, rounds: int) -> np.ndarray[Any, Any]:
        """Seconds on the GPU of each of ``rounds`` calls on inputs that lie there."""
        return self._timed(feeds, rounds, False, self.environment)

    def _timed(self, feeds: Feeds, rounds: int, transfers: bool, environment: Environment) -> np.ndarray[Any, Any]:
        reply = self._ask("time", on_host(feeds), rounds=rounds, transfers=transfers)
        environment.settings.update(reply["settings"], clocks_mhz=cuda.clocks())
        samples: np.ndarray[Any, Any] = reply["arrays"]["seconds"]
        return samples

    def with_transfers(self) -> WithTransfers:
        """This engine as a runner whose calls are timed with their copies from and to pinned host memory."""
        return WithTransfers(self)

    def profile(self, feeds: Feeds, rounds: int = 50) -> list[dict[str, Any]]:
        """Seconds by layer, slowest first, from runs of their own: TensorRT's profiler slows them down."""
        layers = self._ask("profile", on_host(feeds), rounds=rounds)["layers"]
        return sorted(layers, key=lambda layer: -layer["seconds"])

    def close(self) -> None:
        """End the worker."""
        if self._exchange is not None:
            self._exchange.close()
        self._worker.close()

    def __enter__(self) -> TensorRtRunner:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _ask(self, what: str, feeds: Feeds, **arguments: Any) -> dict[str, Any]:
        check_feeds(self.signature, feeds)
        sent = {
            name: array.view(np.uint16) if array.dtype.name == "bfloat16" else array for name, array in feeds.items()
        }
        reply = self._worker.call({"do": what, **arguments}, arrays=sent)
        if "error" in reply:
            raise _failure(reply, self._worker.log())
        return reply


class WithTransfers:
    """An open engine once more, timed with its inputs and outputs copied from and to pinned host memory.

    It lives as long as the runner that it came from: closing it closes nothing.
    """

    def __init__(self, runner: TensorRtRunner) -> None:
        self._runner = runner
        self.signature = runner.signature
        self.environment = replace(runner.environment, settings={**runner.environment.settings, "transfers": True})

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """As the runner that it came from."""
        return self._runner.run(feeds)

    def time(self, feeds: Feeds, rounds: int) -> np.ndarray[Any, Any]:
        """Seconds on the GPU of each of ``rounds`` calls, copies in both directions included."""
        return self._runner._timed(feeds, rounds, True, self.environment)

    def close(self) -> None:
        """Nothing to do."""

    def __enter__(self) -> WithTransfers:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class TensorRtProfiler:
    """The layers of an open engine with the ONNX nodes that they compute."""

    def __init__(self, runner: TensorRtRunner, engine: Engine, model: OnnxModel) -> None:
        self._runner = runner
        self._engine = engine
        self._model = model

    def layers(self, feeds: Feeds, calls: int) -> tuple[LayerTime, ...]:
        """The median time of every layer."""
        told = {layer["name"]: layer["seconds"] for layer in self._runner.profile(feeds, calls)}
        nodes = nodes_of_layers(told, self._engine.records, self._model)
        return tuple(LayerTime(name, nodes[name], seconds, is_copy(name)) for name, seconds in told.items())

    def __enter__(self) -> TensorRtProfiler:
        return self

    def __exit__(self, *exc: object) -> None:
        self._runner.close()


def _failure(reply: Mapping[str, Any], log: str) -> PassError | UsageError:
    if "no optimization profile" in reply["text"]:
        return UsageError(f"{reply['text']}: widen `dims` in the recipe and compile again")
    if reply.get("out_of_memory"):
        return PassError(f"TensorRT: {reply['text']}: use a smaller batch, or free memory on the GPU")
    return PassError(f"TensorRT failed to run the engine: {reply['text']}" + (f"\n{log}" if log else ""))


def _typed(array: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    """The signature's type: TensorRT before 10 gives INT32 for INT64, and BF16 travels as its bits."""
    if dtype == "bfloat16":
        import ml_dtypes

        return array.view(ml_dtypes.bfloat16)
    return array if array.dtype.name == dtype else array.astype(dtype)


def _check_boundary(engine: Engine, told: Mapping[str, Any]) -> None:
    for side, specs in (("inputs", engine.signature.inputs), ("outputs", engine.signature.outputs)):
        found, wanted = {tensor["name"] for tensor in told[side]}, {spec.name for spec in specs}
        if found != wanted:
            raise UsageError(
                f"{engine.path} has the {side} {', '.join(sorted(found))}, but its signature says "
                f"{', '.join(sorted(wanted))}: build it again"
            )
