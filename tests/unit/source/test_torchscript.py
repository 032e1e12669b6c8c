"""TorchScript in, whole and damaged."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from checkpoints import IMAGE, mlp, recipe, run, truncated
from torch import nn

from optkit.errors import CheckpointError
from optkit.models import TorchModel
from optkit.source import load_model


def script(net: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(net).save(str(path))
    return path


def test_torchscript(tmp_path: Path) -> None:
    net = mlp()
    path = script(net, tmp_path / "m.pt")
    result = load_model(path, recipe(None, inputs=IMAGE))
    assert isinstance(result.model, TorchModel) and result.provenance["kind"] == "torchscript"
    x = torch.randn(3, 4)
    torch.testing.assert_close(run(result.model, x), net(x))
    assert str(result.model.signature.outputs[0]) == "float32[batch,3]"
    with pytest.raises(CheckpointError, match="forward takes image, but no 'x'"):
        load_model(path, recipe(None, inputs={"x": "float32[batch,4]"}))
    with pytest.raises(CheckpointError, match="mat1 and mat2 shapes"):
        load_model(path, recipe(None, inputs={"image": "float32[batch,5]"}))
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        load_model(truncated(path), recipe(None, inputs=IMAGE))
