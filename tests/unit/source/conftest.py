"""Fixtures for the tests of reading checkpoints."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import exported, mlp


@pytest.fixture(autouse=True)
def no_temporary_files(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Loading leaves nothing behind."""
    folder = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    assert list(folder.iterdir()) == []


@pytest.fixture(scope="session")
def pt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network with a dynamic batch."""
    batch = torch.export.Dim("batch", min=1, max=16)
    path = tmp_path_factory.mktemp("pt2") / "mlp.pt2"
    return exported(mlp(), path, (torch.randn(2, 4),), dynamic_shapes={"image": {0: batch}})
