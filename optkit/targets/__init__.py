"""What engines are built for and run on. Only this package imports the runtimes."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

from pydantic import Field

from optkit.targets.onnxruntime import OnnxRuntimeTarget
from optkit.targets.onnxruntime_cuda import OnnxRuntimeCudaTarget
from optkit.targets.tensorrt import TensorRtTarget
from optkit.targets.tensorrt_rtx import TensorRtRtxTarget

AnyTarget: TypeAlias = Annotated[
    OnnxRuntimeTarget | OnnxRuntimeCudaTarget | TensorRtTarget | TensorRtRtxTarget, Field(discriminator="name")
]

DEFAULT_TARGET = "onnxruntime"


def named_target(value: Any) -> Any:
    """Let a recipe write a target as its bare name; without one it is ``onnxruntime``."""
    if value is None:
        return {"name": DEFAULT_TARGET}
    return {"name": value} if isinstance(value, str) else value
