"""TensorRT-RTX: builds real, portable engines on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from optkit.context import Context
from optkit.errors import OptkitError, UnavailableError
from optkit.models import Engine, OnnxModel
from optkit.targets import cuda, engine_layers, tensorrt_plan
from optkit.targets.base import TENSORRT, Availability, Dialect, Misfit, Runner, Target
from optkit.targets.worker_client import Limits

MODULE = "tensorrt_rtx"

RUNS_ON = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""The compute capabilities that TensorRT-RTX has kernels for: not Hopper (9.0), not B200 (10.x)."""


class TensorRtRtxTarget(Target):
    """TensorRT-RTX, for GeForce and RTX GPUs.

    The engine is strongly typed: it computes in the precision that the ONNX graph says, and nothing else.
    """

    name: Literal["tensorrt-rtx"] = "tensorrt-rtx"
    compute_capabilities: tuple[Literal["7.5", "8.0", "8.6", "8.9", "12.0", "12.1"], ...] = ()
    """What to build kernels for, as ``["8.6", "8.9"]``; if none is given, one portable engine for Ampere and later."""
    workspace_mb: int | None = Field(default=None, ge=1)
    """The most memory that a layer may take for itself on the GPU; all there is if not given."""
    tf32: bool = True
    """Let float32 matrix products and convolutions run in TF32 on the GPU."""
    timeout: float = Field(default=1800, gt=0)
    """Seconds until a build that has not ended is killed."""
    memory_mb: int | None = Field(default=None, ge=1)
    """The most of this machine's memory that the worker may take before it is killed; all there is if not given."""

    @property
    def _limits(self) -> Limits:
        return Limits(self.timeout, self.memory_mb)

    @property
    def dialect(self) -> Dialect:
        """Symmetric INT8 on the inputs of weighted ops; ai.onnx only."""
        return Dialect(
            int8=TENSORRT,
            opsets=(13, 25),
            floats=frozenset({"float32", "float16", "bfloat16"}),
            # That is Myelin's, not the importer's
            lacks_in=tensorrt_plan.LACKS_IN | {("ConvTranspose", "bfloat16")},
            tunes_for_shapes=True,
            width_multiple=16,
        )

    def can_build(self) -> Availability:
        """Whether the worker's Python has TensorRT-RTX; no GPU is needed."""
        return tensorrt_plan.find(MODULE, "pip install 'optkit[rtx]'")

    def can_run(self) -> Availability:
        """Not yet: optkit builds these engines and does not run them. On most machines the reason is nearer."""
        found = cuda.detect()
        if not found.gpus:
            return Availability(False, found.reason, "run the engine on a machine with a GeForce or RTX GPU")
        gpu = found.gpus[0]
        if gpu.capability not in RUNS_ON:
            reason = f"TensorRT-RTX does not run on compute capability {gpu.capability} ({gpu.name})"
            return Availability(False, reason, f"use a GPU of compute capability {', '.join(RUNS_ON)}")
        return Availability(
            False, "optkit builds TensorRT-RTX engines but cannot run them yet", "run the plan with TensorRT-RTX itself"
        )

    def build(self, model: OnnxModel, folder: Path, context: Context) -> Engine:
        """Build the plan in the worker process."""
        options = {
            "module": MODULE,
            "compute_capabilities": list(self.compute_capabilities),
            "workspace": None if self.workspace_mb is None else self.workspace_mb << 20,
            "tf32": self.tf32,
        }
        told = tensorrt_plan.build(model, folder, options, self._limits, context.progress)
        plan = folder / tensorrt_plan.PLAN_FILE
        records = {
            "files": [],
            **told,
            "compute_capabilities": ", ".join(self.compute_capabilities) or "8.0 and later",
            "inspector": self._inspect(plan, model),
        }
        return Engine(plan, self.name, model.signature, records)

    def open(self, engine: Engine, threads: int) -> Runner:
        """Engines of TensorRT-RTX cannot be run by optkit yet; the message says what stands in the way here."""
        availability = self.can_run()
        raise UnavailableError(f"{availability.reason}; {availability.mend}")

    def versions(self) -> dict[str, str]:
        """The version of TensorRT-RTX, if the worker's Python has it."""
        try:
            found = tensorrt_plan.version(MODULE)
        except OptkitError:
            return {}
        return {"tensorrt-rtx": found} if found else {}

    def misfit(self, engine: Engine) -> Misfit | None:
        """A plan has kernels for the compute capabilities that it was built for; a portable one from Ampere on."""
        gpus = cuda.detect().gpus
        if not gpus or gpus[0].capability not in RUNS_ON:  # no build would run there, as `can_run` says
            return None
        here = gpus[0].capability
        fits = here in self.compute_capabilities if self.compute_capabilities else float(here) >= 8
        if fits:
            return None
        built = engine.records.get("compute_capabilities", "other GPUs")
        what = f"it was built for compute capability {built}, and {gpus[0].name} has {here}"
        return Misfit(what, {"compute_capabilities": [*self.compute_capabilities, here]})

    def _inspect(self, plan: Path, model: OnnxModel) -> Mapping[str, Any]:
        """The layers that TensorRT made, where there is a GPU that can load the plan."""
        gpus = cuda.detect()
        if not gpus.gpus:
            return {"not_inspected": f"TensorRT-RTX loads a plan only where it can run ({gpus.reason})"}
        told = tensorrt_plan.inspect(plan, MODULE, self._limits)
        if "not_inspected" in told:
            return told
        layers = engine_layers.read_layers(told, model)
        unproved = engine_layers.unproved(layers, model, engine_layers.precisions_of(model))
        return {**engine_layers.summary(layers, model), "unproved": unproved}
