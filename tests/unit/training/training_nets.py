"""A small problem that can be learnt: points in the plane whose class is the quadrant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn

from optkit.models import Signature, TensorSpec, TorchModel

SIGNATURE = Signature((TensorSpec("point", "float32", ("batch", 2)),), (TensorSpec("logits", "float32", ("batch", 4)),))


def net(width: int, classes: int = 4) -> nn.Sequential:
    """It has everything whose state an interruption might lose: batch norms, dropout, several weights."""
    return nn.Sequential(
        nn.Linear(2, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(width, classes)
    )


def frozen(module: nn.Module) -> TorchModel:
    return TorchModel(module.eval().requires_grad_(False), SIGNATURE)


def write_points(folder: Path, count: int = 400, **spec: Any) -> Path:
    """A data spec: 300 points to learn from and 100 to validate with; label 0 is left below, 3 right above."""
    points = np.random.default_rng(3).uniform(-1, 1, (count, 2)).astype(np.float32)
    labels = (points[:, 0] > 0) + 2 * (points[:, 1] > 0)
    np.savez(folder / "points.npz", point=points, label=labels.astype(np.int64), norm=np.linalg.norm(points, axis=1))
    document = {
        "source": {"kind": "npz", "path": "points.npz"},
        "splits": {"calibration": {"count": 16}, "validation": {"count": count // 4}},
        "inputs": {"point": "point"},
        "label": "label",
        "metric": "top1",
    }
    document.update(spec)
    path = folder / "points.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in document.items() if value is not None}))
    return path


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules hold the same bits."""
    mine, its = one.state_dict(), other.state_dict()
    return mine.keys() == its.keys() and all(torch.equal(mine[name], its[name]) for name in mine)
