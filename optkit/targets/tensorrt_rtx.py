"""TensorRT-RTX: builds real, portable engines on a machine without a GPU."""

from __future__ import annotations

from typing import Literal

from optkit.targets.base import Target


class TensorRtRtxTarget(Target):
    """TensorRT-RTX."""

    name: Literal["tensorrt-rtx"] = "tensorrt-rtx"
