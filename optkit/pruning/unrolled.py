"""Convolutions and linear layers as products of a matrix with what they read.

The columns of a convolution's matrix go through the kernel's places first and through the input channels last, so that
four neighbouring columns are four neighbouring channels.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from optkit.pruning.layers import layer_of

if TYPE_CHECKING:
    import torch

_MOST_ROWS = 8192
"""Places of a batch that a convolution's inputs are taken from."""


class _SeenError(BaseException):
    """Ends a forward once the layer was reached; no ``except Exception`` of a user's forward holds it up."""


def can_unroll(layer: Any) -> bool:
    """Whether a layer is such a product: grouped and transposed ones are several."""
    import torch

    if isinstance(layer, torch.nn.Linear):
        return True
    return isinstance(layer, (torch.nn.Conv1d, torch.nn.Conv2d)) and layer.groups == 1


def rows_of(weight: torch.Tensor) -> torch.Tensor:
    """The weight as a matrix, [output channels, columns]."""
    return weight.movedim(1, -1).reshape(weight.shape[0], -1)


def weight_of(layer: Any, rows: torch.Tensor) -> torch.Tensor:
    """The matrix as the layer's weight; the inverse of ``rows_of``."""
    shape = layer.weight.shape
    return rows.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1).to(layer.weight.dtype)


def hessian(
    module: torch.nn.Module, name: str, batches: Sequence[tuple[torch.Tensor, ...]], calls: int = 1
) -> torch.Tensor:
    """``X X^T`` of what a layer reads of ``batches``, float64[columns, columns].

    Args:
        module: what the layer is in.
        name: the layer's.
        batches: inputs of the module.
        calls: how often forward calls the layer; after that many, forward is cut short.
    """
    import torch

    layer = layer_of(module, name)
    width = math.prod(layer.weight.shape[1:])
    total = torch.zeros(width, width, dtype=torch.float64)
    count = 0

    def add(_: Any, given: tuple[torch.Tensor, ...]) -> None:
        nonlocal count
        read = _columns(layer, given[0])
        total.add_((read.T @ read).double())
        count += 1
        if count % calls == 0:
            raise _SeenError

    hook = layer.register_forward_pre_hook(add)
    try:
        with torch.no_grad():
            for batch in batches:
                with contextlib.suppress(_SeenError):
                    module(*batch)
    finally:
        hook.remove()
    return total


def _columns(layer: Any, given: torch.Tensor) -> torch.Tensor:
    """What each product reads, float32[products, columns], of at most ``_MOST_ROWS`` places that are far apart."""
    import torch
    from torch.nn import functional as F

    if isinstance(layer, torch.nn.Linear):
        return _thinned(given.reshape(-1, given.shape[-1]))
    if layer.padding_mode == "zeros":
        padded = F.pad(given, layer._reversed_padding_repeated_twice)
    else:
        padded = F.pad(given, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    if padded.dim() == 3:
        padded, kernel, stride, dilation = padded[:, :, None], (1, *kernel), (1, *stride), (1, *dilation)
    patches = F.unfold(padded, kernel, dilation, stride=stride)
    places = patches.reshape(len(patches), layer.in_channels, -1, patches.shape[-1]).permute(0, 3, 2, 1)
    return _thinned(places.reshape(-1, patches.shape[1]))


def _thinned(table: torch.Tensor) -> torch.Tensor:
    import torch

    if len(table) > _MOST_ROWS:
        # Not every nth: that would be the same column of every image
        table = table[torch.linspace(0, len(table) - 1, _MOST_ROWS, dtype=torch.float64).long()]
    return table.float()
