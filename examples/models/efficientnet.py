"""EfficientNet-Lite0, written anew with the state_dict keys of the ``efficientnet-lite-pytorch`` package.

EfficientNet (Tan and Le 2019, arXiv 1905.11946) without squeeze-and-excitation and with ReLU6 for swish; the weights
were converted from TensorFlow, whose SAME padding is asymmetric where the stride is 2.
"""

from __future__ import annotations

import torch
from torch import nn

# (repeats, kernel, stride, expansion, width out)
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding for even input sizes: at stride 2 one pixel more at the end."""

    def __init__(self, before: int, after: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(before, after, kernel, stride, groups=groups, bias=False)
        total = kernel - stride
        front, back = total // 2, total - total // 2
        self.pad: nn.Module = nn.ZeroPad2d((front, back, front, back)) if total > 0 else nn.Identity()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(self.pad(input))


def _batch_norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=1e-3, momentum=0.01)


class InvertedBottleneck(nn.Module):
    """Expand, filter each channel, project; the input is added where the shape stays."""

    def __init__(self, before: int, after: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = before * expansion
        self.expands = expansion != 1
        self.keeps_shape = stride == 1 and before == after
        if self.expands:
            self._expand_conv = SameConv2d(before, width, 1)
            self._bn0 = _batch_norm(width)
        self._depthwise_conv = SameConv2d(width, width, kernel, stride, groups=width)
        self._bn1 = _batch_norm(width)
        self._project_conv = SameConv2d(width, after, 1)
        self._bn2 = _batch_norm(after)
        self.act = nn.ReLU6()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.act(self._bn0(self._expand_conv(x))) if self.expands else x
        inner = self.act(self._bn1(self._depthwise_conv(inner)))
        inner = self._bn2(self._project_conv(inner))
        return x + inner if self.keeps_shape else inner


class EfficientNetLite0(nn.Module):
    """[n, 3, 224, 224] -> ImageNet logits [n, 1000]."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConv2d(3, 32, 3, 2)
        self._bn0 = _batch_norm(32)
        blocks: list[nn.Module] = []
        before = 32
        for repeats, kernel, stride, expansion, after in STAGES:
            for index in range(repeats):
                blocks.append(InvertedBottleneck(before, after, kernel, 1 if index else stride, expansion))
                before = after
        self._blocks = nn.Sequential(*blocks)
        self._conv_head = SameConv2d(before, 1280, 1)
        self._bn1 = _batch_norm(1280)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self._fc = nn.Linear(1280, 1000)
        self.act = nn.ReLU6()

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        features = self._blocks(self.act(self._bn0(self._conv_stem(image))))
        features = self.act(self._bn1(self._conv_head(features)))
        return self._fc(self.pool(features).flatten(1))


def efficientnet_lite0() -> nn.Module:
    """The factory: ``examples/models/efficientnet.py:efficientnet_lite0``."""
    return EfficientNetLite0()
