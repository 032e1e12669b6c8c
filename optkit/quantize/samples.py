"""Calibration batches of a size that the model takes and the memory holds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from optkit.models import OnnxModel
from optkit.quantize.placement import Placement

if TYPE_CHECKING:
    from optkit.data import Batch, Data

_PROBE_BYTES = 1 << 26
"""What the observed tensors of a batch may take together; more is no faster, and beyond that page faults cost time."""


def calibration_batches(model: OnnxModel, data: Data, size: int, limit: int) -> Iterator[Batch]:
    """The first ``limit`` calibration samples, ``size`` at a time or as many as the model's fixed batch wants."""
    fixed = None if model.signature.batch else _fixed_batch(model)
    batches = data.batches("calibration", fixed or size, max(limit, fixed or 1))
    # A model with a fixed batch cannot take the rest that does not fill one
    return (batch for batch in batches if fixed is None or len(batch) == fixed)


def _fixed_batch(model: OnnxModel) -> int | None:
    shape = model.signature.inputs[0].shape if model.signature.inputs else ()
    return shape[0] if shape and isinstance(shape[0], int) else None


def batch_size(model: OnnxModel, placement: Placement, most: int) -> int:
    """How many samples at a time keep the observed tensors within the budget; shapes that nobody knows do not count."""
    sizes = model.signature.sizes(**{model.signature.batch: 1}) if model.signature.batch else {}
    total = 0
    for node in model.ir.graph:
        for value in node.outputs:
            if value.name in placement.observed and value.shape is not None:
                total += 4 * math.prod(
                    dim if isinstance(dim, int) else sizes.get(str(dim.value), 1) for dim in value.shape
                )
    return max(1, min(most, _PROBE_BYTES // max(total, 1)))
