"""A compile that is interrupted while it trains: the same command again ends with the same bundle."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn

import optkit

NET = """
from torch import nn

def make():
    return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))
"""

HOOKS = """
import os, signal
import optkit

class Dies(optkit.Hooks):
    def on_step(self, state):
        if str(state.step) == os.environ.get("DIES_AT"):
            os.kill(os.getpid(), signal.SIGTERM)
"""

RECIPE = {
    "name": "interrupted",
    "model": {"checkpoint": "net.pt", "factory": "net.py:make"},
    "data": "data.yaml",
    "passes": [
        {"use": "distill", "hooks": "hooks.py:Dies", "train": {"epochs": 3, "batch_size": 16, "save_every": 0}},
        "export_onnx",
        "optimize_graph",
        "build_engine",
    ],
    "validation": {"stage_samples": 2, "latency": {"rounds": 2, "seconds": 0.001, "warmup": 0}},
    "gate": {"max_drop": 100},
    "threads": 1,
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A net that knows nothing, and data."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((160, 4)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x, y=x[:, :3].argmax(1))
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "hooks.py").write_text(HOOKS)
    data = {
        "source": {"kind": "npz", "path": "data.npz"},
        "splits": {"calibration": {"count": 8}, "validation": {"count": 60}},
        "inputs": {"input": "x"},
        "label": "y",
        "metric": "top1",
    }
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(data))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    torch.manual_seed(0)
    layers = [nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3)]
    torch.save(nn.Sequential(*layers).state_dict(), tmp_path / "net.pt")
    return tmp_path / "recipe.yaml"


def test_the_same_command_again_goes_on_and_ends_with_the_same_model(recipe: Path):
    folder = recipe.parent
    whole = optkit.compile(None, recipe, folder / "whole")
    assert not (folder / "whole.resume").exists()

    command = [sys.executable, "-m", "optkit", "compile", "--recipe", str(recipe), "--out", str(folder / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DIES_AT": "8"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 130, done.stderr
    assert f"the state of distill is in {folder / 'out.resume'}: the same command goes on from there" in done.stderr
    assert [path.name.partition("-")[0] for path in (folder / "out.resume").iterdir()] == ["distill"]
    assert not [path for path in folder.iterdir() if path.name.startswith(("out", ".out")) and path.suffix != ".resume"]

    again = optkit.compile(None, recipe, folder / "out")
    assert not (folder / "out.resume").exists()
    assert again.manifest["files"]["model.onnx"] == whole.manifest["files"]["model.onnx"]
    record, expected = again.manifest["records"]["distill"], whole.manifest["records"]["distill"]
    assert record["steps"] == 15 and {**record, "seconds": 0} == {**expected, "seconds": 0}
