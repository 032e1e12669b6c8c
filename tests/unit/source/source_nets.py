"""Small networks, and the factories that build them, for the tests of reading checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn


class Mlp(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.fc = nn.Linear(width, 3)
        self.bn = nn.BatchNorm1d(3)
        self.drop = nn.Dropout(0.5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.drop(self.bn(self.fc(image)))


class Tagger(nn.Module):
    """Token ids [batch, sequence] to a dict; ``extra`` stands between the two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)

    def forward(
        self, ids: torch.Tensor, extra: torch.Tensor | None = None, scale: torch.Tensor | None = None
    ) -> dict[str, Any]:
        hidden = self.embed(ids) * (1 if scale is None else scale)
        pooled = hidden.mean(1)
        return {"hidden": hidden, "stats": (pooled, ids.sum()), "cache": None, "flat": hidden.reshape(-1, 4)}


class Pair(NamedTuple):
    low: torch.Tensor
    high: torch.Tensor


@dataclass
class Scores:
    logits: torch.Tensor
    loss: torch.Tensor | None = None


class Named(nn.Module):
    def __init__(self, result: type) -> None:
        super().__init__()
        self.result = result

    def forward(self, x: torch.Tensor) -> Any:
        return self.result(*(x, x + 1)[: len(self.result.__annotations__) if self.result is Pair else 1])


def mlp(width: int = 4) -> nn.Module:
    return Mlp(width)


def broken(width: int = 4) -> nn.Module:
    raise RuntimeError("no weights for you")


def nothing() -> int:
    return 7
