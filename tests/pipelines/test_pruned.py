"""Whole runs that begin with pruning."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch
from test_compile import QUICK
from torch import nn

import optkit
from optkit.errors import PreconditionError
from optkit.recipe import Recipe

PASSES = [
    {"use": "prune_channels", "macs": 0.4},
    {"use": "prune_weights"},
    "export_onnx",
    "optimize_graph",
    "quantize_int8",
    {"use": "build_engine", "target": "onnxruntime"},
]


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "images.npz", image=rng.standard_normal((160, 3, 8, 8)).astype("f"), label=np.arange(160) % 4)
    spec = tmp_path / "data.yaml"
    spec.write_text(
        "source: {kind: npz, path: images.npz}\ninputs: {input: image}\nlabel: label\nmetric: agreement\n"
        "splits: {calibration: {count: 96}}\n"
    )
    return str(spec)


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    layers += [nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4)]
    return nn.Sequential(*layers)


def recipe(data: str, passes: list) -> Recipe:
    return Recipe.load("fp32").updated(
        passes=passes, data=data, validation=QUICK, threads=1, gate={"max_drop": 100}, inputs={}
    )


def test_pruning_ends_in_an_engine_judged_against_the_whole_model(data, tmp_path):
    module = net()
    before = copy.deepcopy(module.state_dict())
    bundle = optkit.compile(module, recipe(data, PASSES), tmp_path / "out")
    report = bundle.report
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    stages = {stage["name"]: stage for stage in report["stages"]}
    assert [stages[name]["within"] for name in ("prune_channels", "prune_weights")] == [None, None]
    assert stages["export_onnx"]["reference"] == "prune_weights" and stages["export_onnx"]["within"]
    assert report["first_past_tolerance"] is None
    macs = report["pruning"]["macs"]
    assert macs[1] < 0.6 * macs[0]
    assert report["sparsity"]["parameters"].keys() == {"3.weight", "7.weight"}
    # The unpruned export agrees with the checkpoint on everything
    assert report["accuracy"]["others"]["FP32 ONNX"]["score"] == 1
    assert any("dense kernels only" in warning for warning in report["warnings"])
    assert "MACs are left" in bundle.summary and bundle.manifest["records"]["pruning"]["macs"] == macs
    assert Recipe.load(bundle.path / "recipe.yaml") == bundle.recipe


def test_an_onnx_checkpoint_is_refused(data, tmp_path, onnx_model):
    model = onnx_model("g (float[batch,3,8,8] input) => (float[batch,3,8,8] output) { output = Relu(input) }")
    with pytest.raises(PreconditionError, match="prune_channels takes a PyTorch model, but the checkpoint is an ONNX"):
        optkit.compile(model, recipe(data, PASSES), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_goal_out_of_reach_leaves_nothing_behind(data, tmp_path, caplog):
    passes = [{"use": "prune_channels", "macs": 0.99}, "export_onnx"]
    with (
        caplog.at_level(logging.INFO),
        pytest.raises(PreconditionError, match=r"cannot be reached: .* 9\d\.\d % of the"),
    ):
        optkit.compile(net(), recipe(data, passes), tmp_path / "out")
    assert not (tmp_path / "out").exists()
