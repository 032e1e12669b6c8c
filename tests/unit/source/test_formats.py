"""A file that is nothing to read says what it is instead."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import IMAGE, recipe

from optkit.errors import CheckpointError
from optkit.source import load_model


def test_missing_empty_and_unknown_files(tmp_path: Path) -> None:
    def refused(name: str, content: bytes | None = None) -> str:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            load_model(tmp_path / name, recipe(inputs=IMAGE))
        return str(caught.value)

    assert "no such file" in refused("missing.pt")
    assert "the file is empty" in refused("empty.pt", b"")
    assert "Git LFS" in refused("lfs.pt", b"version https://git-lfs.github.com/spec/v1\n")
    assert "b'hello wo', which is nothing known; optkit reads a torch.export .pt2" in refused("a.onnx", b"hello world")
    np.savez(tmp_path / "a.npz", x=np.ones(1))
    assert "a zip archive with x.npy in it" in refused("a.npz")
    (tmp_path / "folder").mkdir()
    assert "without config.json" in refused("folder")
    torch.save({"epoch": 1}, tmp_path / "no.pt")
    assert "a dict of epoch, but no state_dict" in refused("no.pt")
    torch.save({0: torch.ones(1)}, tmp_path / "numbers.pt")
    assert "a dict of 0, but no state_dict" in refused("numbers.pt")
    with pytest.raises(CheckpointError, match="no model: name a checkpoint"):
        load_model("", recipe())
    with pytest.raises(CheckpointError, match="dict: not a model"):
        load_model({}, recipe())  # type: ignore[arg-type]
