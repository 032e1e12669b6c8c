"""Casts a graph to FP16."""

from __future__ import annotations

import itertools
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from optkit.context import Context
from optkit.models import Feeds, OnnxModel
from optkit.passes.float_cast import MASK, FloatCast, probing
from optkit.passes.graph_edit import constant

if TYPE_CHECKING:
    import onnx_ir as ir

log = logging.getLogger("optkit.passes")

LARGEST = 65504.0
SMALLEST_NORMAL = 2.0**-14


class CastFp16(FloatCast):
    """Float32 becomes FP16 inside the graph; inputs and outputs stay float32.

    FP16 ends at 65504. In float32 stay: ops that overflow or lose digits (``keep_ops``), nodes with a weight
    beyond that, a constant that would become zero or a scale that would lose digits, and, where the recipe has data,
    nodes whose values come near it on calibration samples, or are all so small there that FP16 loses digits. The
    record ``kept_float32`` says which and why, and so does the report.
    """

    to: ClassVar[Literal["float16", "bfloat16"]] = "float16"

    use: Literal["cast_fp16"] = "cast_fp16"
    native_only: bool = False
    """Only for targets that compute in FP16; elsewhere there is nothing to do."""
    samples: int = Field(default=32, ge=0)
    """Calibration samples whose activations are looked at, one at a time; 0 looks at none."""
    headroom: float = Field(default=2.0, ge=1)
    """A node stays in float32 if its values come within this factor of 65504 on the calibration samples."""

    def requires(self, model: OnnxModel, context: Context) -> None:
        """Warn where FP16 is no gain."""
        super().requires(model, context)
        if not self.native_only and not _native(context):
            log.warning(
                "cast_fp16: the target %r has no fast FP16 kernels: it computes in float32 behind Casts, so expect a "
                "smaller model and no speed-up",
                context.target.name,
            )

    def run(self, model: OnnxModel, context: Context) -> OnnxModel:
        """The cast model, or the model itself where nothing is to be cast."""
        return super().run(model, context) if _native(context) or not self.native_only else model

    def why_not(self, node: ir.Node, largest: Mapping[str, float]) -> str | None:
        """Why FP16 cannot hold what this node takes or gives."""
        for index, value in enumerate(node.inputs):
            array = constant(value)
            if value is None or array is None or array.dtype != np.float32 or array.size == 0:
                continue
            if reason := _why_not_constant(node, index, array):
                return f"{value.name!r} {reason}"
        for value in (*node.inputs, *node.outputs):
            reached = largest.get(str(value.name), 0.0) if value is not None else 0.0
            if value is not None and reached * self.headroom > LARGEST:
                return f"{value.name!r} reaches {reached:.3g} on calibration data"
            if value is not None and 0 < reached < SMALLEST_NORMAL:
                return f"{value.name!r} stays below {SMALLEST_NORMAL:.3g} on calibration data, where FP16 loses digits"
        return None

    def largest_values(self, model: OnnxModel, context: Context) -> Mapping[str, float]:
        """The largest magnitude of every value on calibration samples, the model's inputs included, masks aside."""
        if context.data is None or self.samples == 0:
            return {}
        front = model.signature.inputs[0].shape[0] if model.signature.inputs[0].shape else 1
        size = front if isinstance(front, int) else 1
        largest: dict[str, float] = defaultdict(float)
        with probing(model, context) as probe:
            for batch in context.data.batches("calibration", size, max(self.samples, size)):
                if isinstance(front, int) and len(batch) != front:
                    continue
                for name, array in itertools.chain(_floats(batch.feeds), probe(batch.feeds)):
                    values = array[array > MASK]
                    largest[name] = max(largest[name], float(np.max(np.abs(values), initial=0.0)))
        return largest


def _floats(feeds: Feeds) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    return ((name, array) for name, array in feeds.items() if array.dtype.kind == "f")


def _native(context: Context) -> bool:
    return "float16" in context.target.dialect.floats


def _why_not_constant(node: ir.Node, index: int, array: np.ndarray[Any, Any]) -> str | None:
    if node.op_type == "Clip":
        return None  # a bound beyond the range bounds nothing
    finite = np.abs(array[np.isfinite(array) & (array > MASK)])
    largest = float(np.max(finite, initial=0.0))
    if largest > LARGEST:
        return f"holds {largest:.3g}, FP16 ends at 65504"
    if node.op_type in ("QuantizeLinear", "DequantizeLinear") and index == 1:
        smallest = float(np.min(finite, initial=np.inf))
        return f"holds a scale of {smallest:.3g}, too small for FP16" if smallest < SMALLEST_NORMAL else None
    if array.size == 1 and largest and np.float16(largest) == 0:
        return f"is {largest:.3g}, which is zero in FP16"
    return None
