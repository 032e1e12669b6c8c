"""How large a model is: multiplications and parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Size:
    """What a model costs.

    Attributes:
        macs: multiply-accumulates of one forward, of convolutions, matrix products and attention.
        parameters: how many numbers its parameters hold.
        by_layer: multiply-accumulates by module.
    """

    macs: int
    parameters: int
    by_layer: Mapping[str, int]


def size_of(module: torch.nn.Module, examples: tuple[torch.Tensor, ...]) -> Size:
    """Count in one forward with ``examples``, one tensor for each input."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    fast = torch.backends.mha.get_fastpath_enabled()
    # Fused kernels of attention are not counted
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            module(*examples)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    root = type(module).__name__
    # The counter calls modules `Net.body.0`, and counts a multiplication and an addition as two
    by_layer = {
        name.removeprefix(f"{root}."): sum(ops.values()) // 2 for name, ops in counter.get_flop_counts().items()
    }
    return Size(counter.get_total_flops() // 2, sum(p.numel() for p in module.parameters()), by_layer)
