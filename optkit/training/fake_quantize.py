"""Quantization that gradients pass through: rounded forward, as if it were not rounded backward.

For a scale s and integers from low to high a tensor becomes s clip(round(x / s), low, high). The derivative of round is
taken as 1 (the straight-through estimator), so what does not saturate passes gradients on unchanged, and s has

    d/ds = round(x / s) - x / s    where nothing saturates, else low or high,

which is LSQ (Esser et al. 2020, "Learned Step Size Quantization", section 2.1). What is trained is not a weight itself
but the weight in units of about one INT8 step, so that a learning rate means the same in every layer and channel,
however large its weights are: 0.01 is a hundredth of a step.

This file imports torch: it is imported when one is trained.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from optkit.quantize.saturation import MOST
from optkit.targets.pytorch import to_torch

Array = np.ndarray[Any, Any]

_INT32_ROOM = 2.0**30
"""How large a stored bias may get: half of what INT32 holds leaves room for the products."""

STEPS = 128
"""INT8 steps from zero to the end of a range. What is no INT8 weight is trained in units of the range over this: for a
bias that is what a step of a weight does to a product whose input is half of its range."""


def rounded(x: Tensor) -> Tensor:
    """The nearest integers, even ones of two; the gradient is that of ``x``. The sum is exact in floating point."""
    return x + (x.round() - x).detach()


class Scale(nn.Module):
    """One scale, or one for each channel: as calibration found it, or stretched by what training learns.

    What is learned is the logarithm of the stretch, in units that move the end of the range by one INT8 step: so scales
    stay positive, and a learning rate means the same for all of them.
    """

    base: Tensor

    def __init__(self, scale: Array, *, learned: bool, widens: bool = True) -> None:
        """Take the scale that calibration found.

        Args:
            scale: float32[] or float32[channels].
            learned: whether training may change it.
            widens: whether it may grow.
        """
        super().__init__()
        self.register_buffer("base", to_torch(np.array(scale, np.float32)))
        self.stretch = nn.Parameter(torch.zeros_like(self.base)) if learned else None
        self._widens = widens

    def forward(self, elements: int = 1, highest: int = 1) -> Tensor:
        """The scale; its gradient is damped by what it is the scale of: ``elements`` integers up to ``highest``."""
        if self.stretch is None:
            return self.base
        factor = (elements / self.base.numel() * highest) ** -0.5
        stretch: Tensor = _Damped.apply(self.stretch, factor)  # type: ignore[no-untyped-call]
        if not self._widens:
            stretch = stretch - stretch.clamp(min=0).detach()  # held back, and free to turn round
        return self.base * (stretch / STEPS).exp()


class _Damped(torch.autograd.Function):
    """Changes the gradient only: a scale gathers those of all its elements (LSQ, section 2.2)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


class Activation(nn.Module):
    """QuantizeLinear and DequantizeLinear of an activation."""

    def __init__(self, scale: Scale, zero_point: int, limits: np.iinfo[Any]) -> None:
        super().__init__()
        self.scale = scale
        # Without the zero point: it is a whole number, so it changes no rounding
        self._low, self._high = limits.min - zero_point, limits.max - zero_point

    def forward(self, x: Tensor) -> Tensor:
        """What the INT8 tensor stands for. In float32 also where the products run in half precision."""
        scale: Tensor = self.scale(x.numel(), max(self._high, -self._low))
        return rounded(x.float() / scale).clamp(self._low, self._high) * scale


class Weight(nn.Module):
    """DequantizeLinear of an INT8 weight, over a float one that is trained, in the steps that it was stored in."""

    neighbours: Tensor

    def __init__(self, stored: Array, scale: Scale, axis: int, neighbours: Array | None = None) -> None:
        """Take the weight that is stored.

        Args:
            stored: int8 values.
            scale: one, or one for each channel.
            axis: the channels.
            neighbours: positions of pairs whose sum must fit ``saturation.MOST``, int64[pairs, 2].
        """
        super().__init__()
        self._shape = [1] * stored.ndim
        if scale.base.ndim:
            self._shape[axis] = -1
        self.scale = scale
        self.value = nn.Parameter(to_torch(stored.astype(np.float32)))
        pairs = np.empty((0, 2), np.int64) if neighbours is None else neighbours
        self.register_buffer("neighbours", to_torch(pairs), persistent=False)

    def forward(self) -> Tensor:
        """What the stored weight stands for."""
        scale: Tensor = self.scale(self.value.numel(), 127).reshape(self._shape)
        return self._levels(scale) * scale

    def array(self) -> Array:
        """The weight as it is stored."""
        return to_array(self._levels(self.scale().reshape(self._shape))).astype(np.int8)

    def _levels(self, scale: Tensor) -> Tensor:
        steps = (
            self.value if self.scale.stretch is None else self.value * (self.scale.base.reshape(self._shape) / scale)
        )
        levels = rounded(steps).clamp(-127, 127)
        return levels + (self._fitting(levels) - levels).detach() if len(self.neighbours) else levels

    def _fitting(self, levels: Tensor) -> Tensor:
        """The same integers, but neighbours whose sum is too large share in what it is too large by."""
        flat = levels.reshape(-1)
        pairs = flat[self.neighbours]
        sums = pairs.sum(1)
        excess = (sums.abs() - MOST).clamp(min=0)
        if not excess.any():
            return levels
        shares = torch.stack([(excess / 2).ceil(), (excess / 2).floor()], 1) * sums.sign().unsqueeze(1)
        return flat.index_put((self.neighbours,), pairs - shares).reshape(levels.shape)


class Bias(nn.Module):
    """DequantizeLinear of an INT32 bias, whose scale is that of the products that it is added to."""

    def __init__(self, stored: Array, of_input: Scale, of_weight: Scale) -> None:
        super().__init__()
        self._of_input, self._of_weight = of_input, of_weight
        self.value = nn.Parameter(to_torch(stored.astype(np.float32)) / STEPS)

    def scale(self) -> Tensor:
        """A constant to whoever learns scales: bias rounds far finer than the tensors that they are the scales of."""
        unit: Tensor = self._of_input() * self._of_weight()
        return unit.detach()

    def forward(self) -> Tensor:
        """What the stored bias stands for."""
        return self._levels() * self.scale()

    def array(self) -> Array:
        """The bias as it is stored."""
        return to_array(self._levels()).astype(np.int32)

    def _levels(self) -> Tensor:
        # The quotient is exactly 1 as long as no scale was learned
        units = self._of_input.base * self._of_weight.base / self.scale()
        return rounded(self.value * STEPS * units).clamp(-_INT32_ROOM, _INT32_ROOM)


class Float(nn.Module):
    """A constant that stays in float, trained in units of about an INT8 step of it or of what it is added to."""

    unit: Tensor

    def __init__(self, array: Array, step: Array | None = None) -> None:
        """Take the constant; ``step`` is a size that changes should have, one or one for each of the last axis."""
        super().__init__()
        step = np.abs(array).max(initial=0) / STEPS if step is None else step
        # A power of two, so that nothing is rounded on the way in and out
        unit = np.exp2(np.rint(np.log2(np.where(step > 0, step, 1 / STEPS))))
        self.register_buffer("unit", to_torch(np.asarray(unit, array.dtype)), persistent=False)
        self.value = nn.Parameter(to_torch(array.copy()) / self.unit)

    def forward(self) -> Tensor:
        """The constant."""
        return self.value * self.unit

    def array(self) -> Array:
        """The constant as it is stored."""
        return to_array(self())


def to_array(tensor: Tensor) -> Array:
    """An array of a tensor on any device."""
    array: Array = tensor.detach().cpu().numpy()
    return array
