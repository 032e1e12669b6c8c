"""Statistics of batch normalization, taken anew: those of the checkpoint are of activations that pruning changed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

log = logging.getLogger("optkit.pruning")

_LEAST = 64
"""Samples that a mean and a variance can be taken from."""


def recalibrate(module: torch.nn.Module, batches: Sequence[tuple[torch.Tensor, ...]]) -> None:
    """Replace the running mean and variance of every batch normalization by those of ``batches``, in place."""
    import torch

    norms: list[Any] = [
        part
        for part in module.modules()
        if isinstance(part, torch.nn.modules.batchnorm._BatchNorm) and part.track_running_stats
    ]
    if not norms or not batches:
        return
    seen = sum(len(batch[0]) for batch in batches)
    if seen < _LEAST:
        log.warning("%d samples say too little of means and variances: those of the checkpoint stay", seen)
        return
    before = [(norm.running_mean.clone(), norm.running_var.clone(), norm.momentum) for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean over the batches
            norm.train()
        with torch.no_grad():
            for batch in batches:
                module(*batch)
    except ValueError as error:  # one value per channel has no variance: a fixed batch of 1
        log.warning("the statistics of batch normalization stay those of the checkpoint: %s", error)
        for norm, (mean, variance, _) in zip(norms, before, strict=True):
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)
    finally:
        for norm, (*_, momentum) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.eval()
