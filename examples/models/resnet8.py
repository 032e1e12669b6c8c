"""A residual network for Fashion-MNIST; its trained weights are ``fashion_resnet8.pt`` beside this file."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.b1 = nn.BatchNorm2d(after)
        self.c2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.b2 = nn.BatchNorm2d(after)
        self.sc = nn.Sequential()
        if stride != 1 or before != after:
            self.sc = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = F.relu(self.b1(self.c1(x)))
        return F.relu(self.b2(self.c2(inner)) + self.sc(x))


class ResNet8(nn.Module):
    """A stem, three blocks, and a classifier: [n, 1, 28, 28] -> logits [n, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.body = nn.Sequential(BasicBlock(32, 32, 1), BasicBlock(32, 64, 2), BasicBlock(64, 128, 2))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(128, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.fc(self.pool(self.body(self.stem(image))).flatten(1))


def resnet8() -> nn.Module:
    """The factory: ``examples/models/resnet8.py:resnet8``."""
    return ResNet8()
