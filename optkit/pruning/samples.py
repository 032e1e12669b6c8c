"""Inputs for a PyTorch module: calibration samples as tensors, and examples to trace with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from optkit.context import Context
from optkit.models import Feeds, Signature

if TYPE_CHECKING:
    import torch


def tensors(signature: Signature, feeds: Feeds) -> tuple[torch.Tensor, ...]:
    """Feeds as the module takes them: by position."""
    return tuple(_tensor(feeds[spec.name]) for spec in signature.inputs)


def _tensor(array: np.ndarray[Any, Any]) -> torch.Tensor:
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def examples(signature: Signature, batch: int = 2) -> tuple[torch.Tensor, ...]:
    """Random inputs of the sizes that the engine is tuned for; ``batch`` samples where their number is free."""
    sizes = {signature.batch: batch} if signature.batch else {}
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
