"""Pickles run no code unless the user trusts them."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from checkpoints import IMAGE, Payload, mlp, recipe, run

from optkit.errors import CheckpointError
from optkit.models import TorchModel
from optkit.source import load_model


@pytest.mark.parametrize("zipped", [True, False])
def test_malicious_pickle_does_not_run(zipped: bool, tmp_path: Path) -> None:
    ran, path = tmp_path / "ran", tmp_path / "m.pt"
    torch.save({"w": torch.ones(1), "x": Payload(ran)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"the pickle names posix.mkdir, .*torch.export.save.*--trust-pickle"):
        load_model(path, recipe(inputs=IMAGE))
    assert not ran.exists()
    with pytest.raises(CheckpointError):  # the payload does work: it is only held back
        load_model(path, recipe(inputs=IMAGE, trust_pickle=True))
    assert ran.exists()


def test_plain_pickle_is_refused(tmp_path: Path) -> None:
    ran, path = tmp_path / "ran", tmp_path / "m.pt"
    path.write_bytes(pickle.dumps({"x": Payload(ran)}))
    with pytest.raises(CheckpointError, match=r"m.pt"):
        load_model(path, recipe(inputs=IMAGE))
    assert not ran.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_module_only_when_trusted(zipped: bool, tmp_path: Path) -> None:
    net, path = mlp().train(), tmp_path / "m.pt"
    torch.save(net, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"the pickle names source_nets.Mlp"):
        load_model(path, recipe(inputs=IMAGE))
    result = load_model(path, recipe(None, trust_pickle=True, inputs=IMAGE))
    assert result.provenance["trusted_pickle"] is True and result.provenance["kind"] == "pickle"
    x = torch.randn(2, 4)
    assert isinstance(result.model, TorchModel)
    torch.testing.assert_close(run(result.model, x), net.eval()(x))


def test_trust_is_recorded_only_where_it_was_needed(tmp_path: Path) -> None:
    torch.save(mlp().state_dict(), tmp_path / "m.pt")
    result = load_model(tmp_path / "m.pt", recipe(trust_pickle=True, inputs=IMAGE))
    assert result.provenance["trusted_pickle"] is False
