"""QuantizeInt8."""

from __future__ import annotations

from typing import Literal

from optkit.passes.base import OnnxPass


class QuantizeInt8(OnnxPass):
    """QuantizeInt8."""

    use: Literal["quantize_int8"] = "quantize_int8"
