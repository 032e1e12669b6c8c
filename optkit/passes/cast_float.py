"""Casts an FP32 graph to FP16 or BF16."""

from __future__ import annotations

from typing import Literal

from optkit.passes.base import OnnxPass


class CastFp16(OnnxPass):
    """FP16."""

    use: Literal["cast_fp16"] = "cast_fp16"


class CastBf16(OnnxPass):
    """BF16."""

    use: Literal["cast_bf16"] = "cast_bf16"
