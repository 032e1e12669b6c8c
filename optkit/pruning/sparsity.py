"""Weights that pruning set to zero: where they are, and how they stay so.

``prune_weights`` leaves the record ``sparsity``, whose ``parameters`` names what it pruned. The mask of a parameter is
where it is not zero, so it stays right when channels go or values change, and the record stays JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from optkit.models import TorchModel

if TYPE_CHECKING:
    import torch


def masks(model: TorchModel) -> dict[str, torch.Tensor]:
    """Boolean tensors by parameter, true where a pruned parameter may be other than zero; none for a dense model."""
    pruned = model.records.get("sparsity", {}).get("parameters", {})
    return {name: weight.detach() != 0 for name, weight in model.module.named_parameters() if name in pruned}


def apply_masks(module: torch.nn.Module, masks: Mapping[str, torch.Tensor]) -> None:
    """Set to zero in place what the masks do not keep: call it after every optimizer step."""
    import torch

    with torch.no_grad():
        for name, mask in masks.items():
            module.get_parameter(name).mul_(mask)


def is_two_of_four(weight: np.ndarray[Any, Any], axis: int = 1) -> bool:
    """Whether of any four neighbours along ``axis``, the input channels, at least two are zero."""
    if weight.shape[axis] % 4:
        return False
    fours = np.moveaxis(weight, axis, -1).reshape(-1, 4)
    return bool(((fours != 0).sum(1) <= 2).all())
