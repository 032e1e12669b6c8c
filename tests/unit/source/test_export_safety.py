"""A ``.pt2`` that would run code is refused before it is read."""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import Payload, exported, loaded, pickled, recipe
from torch import nn

from optkit.errors import CheckpointError
from optkit.source import load_model


def changed(source: Path, path: Path, member: str, change: Callable[[bytes], bytes]) -> Path:
    """A copy of a zip archive with one member changed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, change(content) if name.endswith(member) else content)
    return path


@pytest.mark.parametrize(
    ("member", "change", "message"),
    [
        ("model.json", ('"guards_code": []', "\"guards_code\": [\"__import__('os').system('touch RAN')\"]"), "guards"),
        ("model.json", ('"torch.ops.aten.linear.default"', '"torch.ops.load_library"'), "it calls"),
        ("model.json", ('"torch.ops.aten.linear.default"', '"torch.hub.load"'), "it calls"),
        ("model.json", ('"name": "image"', '"name": "image\\nimport os"'), "no identifier"),
        ("model.json", ('"expr_str": "Symbol(', '"expr_str": "exec(1) + Symbol('), "no arithmetic"),
    ],
)
def test_pt2_that_would_run_code(member: str, change: tuple[str, str], message: str, pt2: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    def edit(content: bytes) -> bytes:
        text = json.dumps(json.loads(content))
        assert change[0] in text
        return text.replace(change[0], change[1].replace("RAN", str(ran))).encode()

    path = changed(pt2, tmp_path / "m.pt2", member, edit)
    with pytest.raises(CheckpointError, match=f"{message}.*--trust-pickle"):
        load_model(path, recipe(None))
    assert not ran.exists()


def test_pt2_with_malicious_example_inputs(pt2: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "torch._export.serde.serialize")  # its warning has too few arguments
    ran = tmp_path / "ran"
    path = changed(pt2, tmp_path / "m.pt2", "sample_inputs/model.pt", lambda _: pickled(((Payload(ran),), {})))
    with pytest.raises(CheckpointError, match=r"sample_inputs/model.pt pickles posix.mkdir"):
        load_model(path, recipe(None))
    assert not ran.exists()
    assert load_model(path, recipe(None, trust_pickle=True)).provenance["trusted_pickle"] is True
    assert ran.exists()


def test_pt2_with_real_guards_and_derived_sizes_is_not_suspected(tmp_path: Path) -> None:
    class Views(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return x.reshape(-1, 4).sum(1), x.reshape(x.shape[0] // 2, 2, -1), x[: x.shape[0] // 2]

    half = torch.export.Dim("half", min=2, max=8)
    path = exported(Views(), tmp_path / "m.pt2", (torch.ones(8, 4),), dynamic_shapes={"x": {0: 2 * half}})
    signature = loaded(path, recipe(None)).signature
    assert [spec.shape for spec in signature.outputs] == [
        ("batch",),
        ("output_1_dim_0", 2, 4),
        ("output_1_dim_0", 4),
    ]
