"""ONNX Runtime on an NVIDIA GPU: its CUDA kernels, fed from device memory, replayed as a CUDA graph."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from optkit.context import Context
from optkit.errors import PassError, UnavailableError, UsageError
from optkit.models import Engine, Feeds, OnnxModel
from optkit.targets import cuda
from optkit.targets.arrays import on_host
from optkit.targets.base import Availability, Dialect, Environment, Target, check_feeds
from optkit.targets.worker.gpu import Cuda

PROVIDER = "CUDAExecutionProvider"

ENGINE_FILE = "model.ort-cuda.onnx"

MOST_LANES = 16

INSTALL = "pip uninstall onnxruntime && pip install 'optkit[gpu]'"


class OrtCudaRunner:
    """A session on the GPU. ``time`` gives the time on the GPU between two CUDA events, transfers excluded."""

    def __init__(self, session: Any, driver: Cuda, stream: int, engine: Engine, environment: Environment) -> None:
        self.signature = engine.signature
        self.environment = environment
        self._session, self._driver, self._stream = session, driver, stream
        self._outputs = [output.name for output in session.get_outputs()]
        self._lanes: list[tuple[Any, Any]] = []
        self._laid_out: Any = None

    def run(self, feeds: Feeds) -> dict[str, np.ndarray[Any, Any]]:
        """Outputs by name for one batch of feeds; what lies on the GPU is copied from there.

        Raises:
            UsageError: a feed is missing, unknown, or not of the signature's dtype and shape.
            PassError: ONNX Runtime failed to run the model.
        """
        feeds = on_host(feeds)
        check_feeds(self.signature, feeds)
        try:
            outputs = self._session.run(None, feeds, _run_options(graph=-1, synchronize=True))
        except Exception as error:
            raise PassError(f"ONNX Runtime failed to run the model on the GPU: {error}") from error
        return dict(zip(self._outputs, outputs, strict=True))

    def time(self, feeds: Feeds, rounds: int) -> np.ndarray[Any, Any]:
        """Seconds of each of ``rounds`` calls, on inputs and outputs that lie on the GPU."""
        feeds = on_host(feeds)
        check_feeds(self.signature, feeds)
        self._lay_out(feeds)
        events = [(self._driver.event(), self._driver.event()) for _ in range(rounds)]
        try:
            for i, (start, stop) in enumerate(events):
                binding, options = self._lanes[i % len(self._lanes)]
                self._driver.record(start, self._stream)
                self._session.run_with_iobinding(binding, options)
                self._driver.record(stop, self._stream)
            self._driver.synchronize(self._stream)
            samples = np.array([self._driver.seconds(start, stop) for start, stop in events])
        except Exception as error:
            raise PassError(f"ONNX Runtime failed to run the model on the GPU: {error}") from error
        finally:
            for pair in events:
                for event in pair:
                    self._driver.destroy_event(event)
        self.environment.settings.update(rotated_buffers=len(self._lanes), clocks_mhz=cuda.clocks())
        return samples

    def _lay_out(self, feeds: Feeds) -> None:
        """Inputs and outputs on the device, in as many sets as exceed twice the second-level cache."""
        layout = {name: (array.shape, array.tobytes()) for name, array in feeds.items()}
        if layout == self._laid_out:
            return
        outputs = self.run(feeds)
        size = sum(array.nbytes for array in (*feeds.values(), *outputs.values()))
        count = min(2 * self._driver.l2_bytes // max(size, 1) + 2, MOST_LANES)
        self._lanes = [self._lane(i, feeds, outputs) for i in range(count)]
        self._laid_out = layout
        for binding, options in self._lanes:  # the first two runs allocate and capture
            for _ in range(3):
                self._session.run_with_iobinding(binding, options)
        self._driver.synchronize(self._stream)

    def _lane(self, number: int, feeds: Feeds, outputs: Feeds) -> tuple[Any, Any]:
        import onnxruntime as ort

        binding = self._session.io_binding()
        for name, array in feeds.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array, "cuda", 0))
        for name, array in outputs.items():
            value = ort.OrtValue.ortvalue_from_shape_and_type(list(array.shape), array.dtype, "cuda", 0)
            binding.bind_ortvalue_output(name, value)
        return binding, _run_options(graph=number + 1, synchronize=False)

    def close(self) -> None:
        """Release the session and what lies on the device."""
        self._lanes, self._session, self._laid_out = [], None, None

    def __enter__(self) -> OrtCudaRunner:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class OnnxRuntimeCudaTarget(Target):
    """ONNX Runtime on an NVIDIA GPU. It has no INT8 kernels there worth the name, so FP16 is its low precision."""

    name: Literal["onnxruntime-cuda"] = "onnxruntime-cuda"
    nhwc: bool = False
    """Lay images out with the channels last, which suits FP16 convolutions."""
    cuda_graph: bool = True
    """Capture the model into a CUDA graph; models with control flow cannot be."""
    tf32: bool = True
    """Let float32 matrix products and convolutions run in TF32."""

    @property
    def dialect(self) -> Dialect:
        """Float32 and FP16; ONNX Runtime's own operators too."""
        return Dialect(int8=None, domains=frozenset({"com.microsoft"}), floats=frozenset({"float32", "float16"}))

    def can_build(self) -> Availability:
        """Whether onnxruntime has its CUDA provider, and there is a GPU."""
        try:
            import onnxruntime as ort
        except ImportError as error:
            return Availability(False, f"onnxruntime cannot be imported ({error})", "pip install 'optkit[gpu]'")
        if PROVIDER not in ort.get_available_providers():
            return Availability(False, f"onnxruntime {ort.__version__} has no CUDA provider", INSTALL)
        found = cuda.detect()
        if not found.gpus:
            return Availability(False, found.reason, "run it on a machine with an NVIDIA GPU")
        return Availability(True)

    def can_run(self) -> Availability:
        """The same as for building."""
        return self.can_build()

    def build(self, model: OnnxModel, folder: Path, context: Context) -> Engine:
        """Save the model and open it once; ONNX Runtime fuses it for the GPU whenever it is opened."""
        import onnx_ir as ir

        from optkit.targets.onnxruntime import EXTERNAL_BYTES

        size = sum(value.const_value.nbytes for value in model.ir.graph.initializers.values() if value.const_value)
        external = f"{ENGINE_FILE}.data" if size > EXTERNAL_BYTES else None
        ir.save(model.ir, folder / ENGINE_FILE, external_data=external)
        engine = Engine(folder / ENGINE_FILE, self.name, model.signature, {"files": [external] if external else []})
        self.open(engine, context.threads).close()
        return engine

    def open(self, engine: Engine, threads: int) -> OrtCudaRunner:
        """Open a model on the GPU.

        Raises:
            UnavailableError: onnxruntime has no CUDA provider that works here.
            UsageError: ONNX Runtime does not take the file.
        """
        available = self.can_run()
        if not available.ok:
            raise UnavailableError(f"{available.reason}: {available.mend}")
        import onnxruntime as ort

        if hasattr(ort, "preload_dlls"):
            ort.preload_dlls()  # CUDA and cuDNN from their wheels, if the system has none
        driver = Cuda()
        stream = driver.stream()
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = threads
        try:
            session = ort.InferenceSession(str(engine.path), options, providers=[(PROVIDER, self._provider(stream))])
        except Exception as error:
            raise UsageError(f"{engine.path} cannot be opened on the GPU: {error}") from error
        if session.get_providers()[0] != PROVIDER:
            raise UnavailableError(
                f"onnxruntime {ort.__version__} fell back to the CPU: its CUDA provider needs the CUDA and cuDNN "
                "that it was built for: pip install 'onnxruntime-gpu[cuda,cudnn]'"
            )
        device = cuda.detect().gpus[0].name
        settings: dict[str, Any] = {**self.model_dump(exclude={"name"}), "transfers": False}
        return OrtCudaRunner(
            session, driver, stream, engine, Environment(device, f"onnxruntime {ort.__version__}", settings)
        )

    def _provider(self, stream: int) -> Mapping[str, str]:
        return {
            "user_compute_stream": str(stream),
            "enable_cuda_graph": str(int(self.cuda_graph)),
            "prefer_nhwc": str(int(self.nhwc)),
            "use_tf32": str(int(self.tf32)),
            "cudnn_conv_algo_search": "EXHAUSTIVE",
        }

    def versions(self) -> dict[str, str]:
        """The version of onnxruntime, if it is installed."""
        try:
            import onnxruntime as ort
        except ImportError:
            return {}
        return {"onnxruntime": ort.__version__}


def _run_options(graph: int, synchronize: bool) -> Any:
    """Which captured graph to replay (-1: none), and whether to wait for the GPU."""
    import onnxruntime as ort

    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph))
    options.add_run_config_entry("disable_synchronize_execution_providers", str(int(not synchronize)))
    return options
