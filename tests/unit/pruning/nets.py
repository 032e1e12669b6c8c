"""Networks with every kind of layer that pruning has to follow, or to leave alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from optkit.models import Signature, TensorSpec, TorchModel

IMAGE = TensorSpec("image", "float32", ("batch", 3, 8, 8))


def model_of(module: nn.Module, *inputs: TensorSpec, outputs: int = 1) -> TorchModel:
    """A TorchModel as the source gives it: in eval mode, frozen, with statistics that are not those of a fresh net."""
    generator = torch.Generator().manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            with torch.no_grad():
                part.weight.copy_(torch.rand(part.num_features, generator=generator) + 0.5)
                part.bias.copy_(torch.randn(part.num_features, generator=generator) / 4)
                part.running_mean.copy_(torch.randn(part.num_features, generator=generator) / 4)
                part.running_var.copy_(torch.rand(part.num_features, generator=generator) + 0.5)
    names = [f"output_{i}" if outputs > 1 else "output" for i in range(outputs)]
    signature = Signature(inputs or (IMAGE,), tuple(TensorSpec(name, "float32", ("batch", 5)) for name in names))
    return TorchModel(module.eval().requires_grad_(False), signature)


def seeded(make: Any) -> Any:
    torch.manual_seed(0)
    return make()


class Residual(nn.Module):
    """A stem, a skip, a depthwise layer, a concatenation, and a flattening that the classifier reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.inner = nn.Conv2d(16, 24, 3, padding=1)
        self.outer = nn.Conv2d(24, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.left = nn.Conv2d(16, 8, 1)
        self.right = nn.Conv2d(16, 16, 1)
        self.up = nn.ConvTranspose2d(24, 8, 2, 2)
        self.hidden = nn.Linear(8 * 4 * 4, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.stem(image)))
        x = x + self.outer(F.relu(self.inner(x)))
        x = F.relu(self.depthwise(x))
        x = torch.cat([self.left(x), F.max_pool2d(self.right(x), 3, 1, 1)], 1)
        x = F.adaptive_avg_pool2d(self.up(x), 4)
        return self.head(F.relu(self.hidden(x.flatten(1))))


class Attention(nn.Module):
    """As transformers write it: the head's size is fixed, their number is an attribute."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part(x).view(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = torch.softmax(q @ k.transpose(-1, -2) / self.head_dim**0.5, -1) @ v
        return self.out_proj(mixed.transpose(1, 2).reshape(*x.shape[:2], -1))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 32)
        self.attention = Attention()
        self.norm = nn.LayerNorm(32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        x = self.norm(x + self.attention(x))
        return self.head((x + self.down(F.gelu(self.up(x)))).mean(1))


TOKENS = TensorSpec("tokens", "float32", ("batch", "length", 6))
