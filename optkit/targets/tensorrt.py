"""TensorRT, from 8.5 to 11, for every NVIDIA GPU that the installed version knows."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from optkit.context import Context
from optkit.errors import BuildError, OptkitError
from optkit.models import Engine, OnnxModel
from optkit.targets import cuda, engine_layers, tensorrt_plan
from optkit.targets.base import TENSORRT, WEAK_TYPES, Availability, Dialect, Misfit, Target
from optkit.targets.tensorrt_runner import TensorRtProfiler, TensorRtRunner
from optkit.targets.worker_client import Limits, probe, worker_python

log = logging.getLogger("optkit.targets")

MODULE = "tensorrt"

INSTALL = "pip install tensorrt"


class TensorRtTarget(Target):
    """TensorRT, for datacenter and other GPUs. The engine belongs to this version of TensorRT and this kind of GPU.

    From TensorRT 10 on the engine is strongly typed. Before, TensorRT chooses precisions among those that the graph
    holds; what the graph keeps in float32 stays there, and a warning names what does not, beside INT8.
    """

    name: Literal["tensorrt"] = "tensorrt"
    workspace_mb: int | None = Field(default=None, ge=1)
    """The most memory that a layer may take for itself on the GPU; all there is if not given."""
    tf32: bool = True
    """Let float32 matrix products and convolutions run in TF32 on the GPU."""
    optimization_level: int | None = Field(default=None, ge=0, le=5)
    """How long TensorRT searches: 0 to 5, TensorRT's default is 3 (from 8.6 on)."""
    aux_streams: int | None = Field(default=None, ge=0)
    """How many streams beside the main one an engine may use (from 8.6 on)."""
    profiles: tuple[dict[str, tuple[int, int, int]], ...] = ()
    """Optimization profiles: dimensions by name to their least, best and largest size; one from ``dims`` if none."""
    timing_cache: str | None = "~/.cache/optkit/timing"
    """Folder where kernel timings are kept between builds, by TensorRT version, GPU and driver; null for none."""
    hardware_compatibility: Literal["ampere_plus", "same_compute_capability"] | None = None
    """Let the engine run on other GPUs too, at some loss of speed (from 8.6 on)."""
    version_compatible: bool = False
    """Let later versions of TensorRT run the engine (from 8.6 on)."""
    refit: bool = False
    """Let the weights be exchanged later."""
    strip: bool = False
    """Leave the weights out of the plan (from 10 on)."""
    sparsity: bool = False
    """Let TensorRT use 2:4 sparse kernels for weights that have that pattern."""
    vendor_tactics: bool = False
    """Let TensorRT before 11 borrow kernels from cuBLAS and cuDNN, which must be installed then."""
    cuda_graph: bool = True
    """Replay a captured CUDA graph where the engine allows it."""
    contexts: int = Field(default=1, ge=1, le=16)
    """How many calls are timed side by side, each in an execution context of its own: throughput rises with them, and
    so does the latency of each call."""
    timeout: float = Field(default=3600, gt=0)
    """Seconds until a build or a run that has not ended is killed."""
    memory_mb: int | None = Field(default=None, ge=1)
    """The most of this machine's memory that the worker may take before it is killed; all there is if not given."""

    @property
    def _limits(self) -> Limits:
        return Limits(self.timeout, self.memory_mb)

    @property
    def dialect(self) -> Dialect:
        """What the TensorRT here reads; without one, what a strongly typed one does."""
        features = _features()
        typed = features.get("strong_typing", True)
        return Dialect(
            int8=TENSORRT,
            opsets=(13, 23) if features.get("attention", True) else (13, 20),
            floats=frozenset({"float32", "float16", "bfloat16"} if typed else {"float32", "float16"}),
            typed=typed,
            builder_opset=None if typed else 17,
            lacks=_lacking(features),
            lacks_in=tensorrt_plan.LACKS_IN if typed else frozenset(),
            explicit=not typed,
            tunes_for_shapes=True,
            width_multiple=16,
            sparse=self.sparsity,
        )

    def can_build(self) -> Availability:
        """Whether the worker's Python has TensorRT, and there is a GPU to time kernels on."""
        found = tensorrt_plan.find(MODULE, INSTALL)
        return found if not found.ok else self._has_gpu()

    def can_run(self) -> Availability:
        """The same as for building."""
        return self.can_build()

    @staticmethod
    def _has_gpu() -> Availability:
        found = cuda.detect()
        mend = "run it on a machine with an NVIDIA GPU; the target tensorrt-rtx builds without one"
        return Availability(True) if found.gpus else Availability(False, found.reason, mend)

    def build(self, model: OnnxModel, folder: Path, context: Context) -> Engine:
        """Build the plan in the worker process, and prove that it computes in the precisions of the graph."""
        weak: Mapping[str, Any] = model.records.get(WEAK_TYPES, {})
        options = {
            "module": MODULE,
            "workspace": None if self.workspace_mb is None else self.workspace_mb << 20,
            "tf32": self.tf32,
            "vendor_tactics": self.vendor_tactics,
            "precisions": weak.get("precisions", []),
            "float32": weak.get("float32", []),
            "options": self._options(),
            "timing_cache": self._timing_cache_file(),
            "profiles": self._profiles(model),
            "inspect": True,
        }
        told = tensorrt_plan.build(model, folder, options, self._limits, context.progress)
        layers = engine_layers.read_layers(told.pop("information"), model)
        unproved = engine_layers.prove(layers, model, engine_layers.precisions_of(model))
        lowered = engine_layers.lowered(layers, weak.get("float32", ()))
        if lowered:
            log.warning("float32 in the graph, and TensorRT has no kernel for it but in FP16: %s", ", ".join(lowered))
        clipped = engine_layers.clipped_numbers(layers, model) if weak else []
        if clipped:
            raise BuildError(
                f"TensorRT {told['version']} quantizes before it clips in {', '.join(clipped)} and then clips the "
                "INT8 numbers at the bounds of the floats, so the engine is wrong: in quantize_int8 `exclude` the "
                "layers that read what is clipped, or let those before be in INT8, too"
            )
        gpu = cuda.detect().gpus[0]
        records = {
            "files": [],
            **told,
            "gpu": gpu.name,
            "compute_capability": gpu.capability,
            "inspector": {**engine_layers.summary(layers, model), "unproved": unproved},
        }
        return Engine(folder / tensorrt_plan.PLAN_FILE, self.name, model.signature, records)

    def _options(self) -> dict[str, Any]:
        """What is not left to TensorRT."""
        names = ("optimization_level", "aux_streams", "hardware_compatibility")
        chosen = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        flags = ("version_compatible", "refit", "strip", "sparsity")
        return {**chosen, **{name: True for name in flags if getattr(self, name)}}

    def _profiles(self, model: OnnxModel) -> list[dict[str, list[list[int]]]]:
        """Before 10, contexts that work side by side cannot share a profile."""
        made = tensorrt_plan.profiles(model.signature, self.profiles)
        return made if self.dialect.typed else made * self.contexts

    def _timing_cache_file(self) -> str | None:
        if self.timing_cache is None:
            return None
        found = cuda.detect()
        words = (MODULE, tensorrt_plan.version(MODULE), found.gpus[0].name, "driver", found.driver or found.cuda)
        return str(
            Path(self.timing_cache).expanduser() / (re.sub(r"[^\w.]+", "-", "-".join(map(str, words))) + ".cache")
        )

    def open(self, engine: Engine, threads: int) -> TensorRtRunner:
        """Open the plan in a worker process."""
        settings = {"tf32": self.tf32, "cuda_graph": self.cuda_graph}
        return TensorRtRunner(engine, MODULE, self._limits, settings, self.contexts)

    def profiler(self, engine: Engine, model: OnnxModel, threads: int) -> TensorRtProfiler:
        """Open the plan in a worker process for profiling, without CUDA graphs, which have no layers to time."""
        settings = {"tf32": self.tf32, "cuda_graph": False}
        return TensorRtProfiler(TensorRtRunner(engine, MODULE, self._limits, settings), engine, model)

    def versions(self) -> dict[str, str]:
        """The version of TensorRT and the GPU, if the worker's Python has the one and this machine the other."""
        try:
            found = tensorrt_plan.version(MODULE)
        except OptkitError:
            return {}
        return {"tensorrt": found} if found else {}

    def misfit(self, engine: Engine) -> Misfit | None:
        """A plan belongs to the kind of GPU that its kernels were timed on, unless it was built for more."""
        gpus, built = cuda.detect().gpus, engine.records
        if not gpus or "compute_capability" not in built:
            return None
        gpu, same = gpus[0], built["compute_capability"] == gpus[0].capability
        if (gpu.name == built["gpu"] and same) or (self.hardware_compatibility == "same_compute_capability" and same):
            return None
        if self.hardware_compatibility == "ampere_plus" and float(gpu.capability) >= 8:
            return None
        here = f"{gpu.name} (compute capability {gpu.capability})"
        return Misfit(f"it was built for {built['gpu']} (compute capability {built['compute_capability']}), not {here}")


def _features() -> Mapping[str, bool]:
    """What the worker's TensorRT has; empty if there is none."""
    try:
        return _features_of(worker_python())
    except OptkitError:
        return {}


@cache
def _features_of(python: str) -> Mapping[str, bool]:
    found: Mapping[str, bool] = probe(MODULE, python).get("features", {})
    return found


def _lacking(features: Mapping[str, bool]) -> frozenset[str]:
    """Ops that have no importer there."""
    lacking = set() if features.get("normalization", True) else {"LayerNormalization"}
    return frozenset(lacking | (set() if features.get("strong_typing", True) else {"Gelu", "Mish"}))
