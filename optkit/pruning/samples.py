"""Inputs for a PyTorch module: calibration samples as tensors, and examples to trace with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from optkit.context import Context
from optkit.models import Feeds, Signature
from optkit.targets.pytorch import to_torch

if TYPE_CHECKING:
    import torch

_FEW = 4
"""The least size of dimensions that may have any."""


def tensors(signature: Signature, feeds: Feeds) -> tuple[torch.Tensor, ...]:
    """Feeds as the module takes them: by position."""
    return tuple(to_torch(feeds[spec.name]) for spec in signature.inputs)


def examples(signature: Signature, batch: int = 2) -> tuple[torch.Tensor, ...]:
    """Random inputs of the sizes that the engine is tuned for; ``batch`` samples where their number is free."""
    # One token attends to itself whatever the weights: such sizes would prove nothing
    sizes = {dim: max(signature.range(dim).opt, min(_FEW, signature.range(dim).max)) for dim in signature.dynamic}
    if signature.batch:
        sizes[signature.batch] = batch
    return tensors(signature, signature.random_feeds(np.random.default_rng(0), **sizes))


def calibration_batches(
    signature: Signature, context: Context, samples: int, size: int = 32
) -> list[tuple[torch.Tensor, ...]]:
    """Calibration samples in batches that the module takes; none without data."""
    if context.data is None:
        return []
    front = signature.inputs[0].shape[0] if signature.inputs and signature.inputs[0].shape else None
    fixed = front if isinstance(front, int) else None
    batches = context.data.batches("calibration", fixed or size, max(samples, fixed or 1))
    # A model with a fixed batch cannot take the rest that does not fill one
    return [tensors(signature, batch.feeds) for batch in batches if fixed is None or len(batch) == fixed]
