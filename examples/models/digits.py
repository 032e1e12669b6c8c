"""The handwriting CNN of the ``digit-recognizer-py`` package, written anew with the same state_dict keys."""

from __future__ import annotations

import torch
from torch import nn


class DigitCnn(nn.Module):
    """Three convolutions, each halved by pooling, and two linear layers: [n, 1, 28, 28] -> logits [n, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_layers = nn.Sequential(*_stage(1, 32), *_stage(32, 64), *_stage(64, 128))
        self.fc_layers = nn.Sequential(nn.Linear(128 * 3 * 3, 256), nn.ReLU(), nn.Linear(256, 10))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.fc_layers(self.conv_layers(image).flatten(1))


def _stage(before: int, after: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)


def digit_cnn() -> nn.Module:
    """The factory: ``examples/models/digits.py:digit_cnn``."""
    return DigitCnn()
