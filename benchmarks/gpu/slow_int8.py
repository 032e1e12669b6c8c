"""Compiles a small transformer with ``gate.slow_int8: rollback``, and prints what became of it.

    python -m benchmarks.gpu.slow_int8 tensorrt OUT

Random weights and noise: only the time is of interest. Three encoder layers of width 192 on 64 patches, batch 16.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

import optkit
from optkit.recipe import Recipe

DATA = """version: 1
name: noise
source: {kind: npz, path: images.npz}
splits: {calibration: {count: 32}, validation: {count: 64}}
inputs: {input: image}
metric: agreement
"""


class Tokens(nn.Module):
    """A patch embedding, a transformer encoder and a head."""

    def __init__(self, width: int = 192, layers: int = 3) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 8, 8)
        layer = nn.TransformerEncoderLayer(width, 3, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """From float32[batch, 3, 64, 64] to float32[batch, 10]."""
        return self.head(self.body(self.patch(input).flatten(2).transpose(1, 2)).mean(1))


def main() -> None:
    """Compile, and print the verdict and how INT8 compares with its twin."""
    target, out = sys.argv[1], Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    images = np.random.default_rng(0).standard_normal((96, 3, 64, 64)).astype(np.float32)
    np.savez(out / "images.npz", image=images)
    (out / "data.yaml").write_text(DATA)
    torch.manual_seed(0)
    recipe = Recipe.load("int8").updated(
        inputs={"input": "float32[16,3,64,64]"},
        data=str(out / "data.yaml"),
        target=target,
        gate={"max_drop": 100, "slow_int8": "rollback"},
        validation={"latency": {"rounds": 8, "seconds": 0.02, "warmup": 0.1}},
    )
    report = optkit.compile(Tokens(), recipe, out / "tokens").report
    print(report["int8"])
    print(report["verdict"])


if __name__ == "__main__":
    main()
