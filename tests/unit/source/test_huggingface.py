"""Hugging Face folders in, where transformers is installed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import loaded, recipe, run, truncated

from optkit.errors import CheckpointError, UnavailableError
from optkit.models import DimRange, TorchModel
from optkit.source import load_model


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.BertConfig(vocab_size=20, max_position_embeddings=18, num_labels=3, **sizes)
    folder = tmp_path_factory.mktemp("bert")
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def test_huggingface_folder(bert: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result = load_model(bert, recipe(None))
    model = result.model
    assert isinstance(model, TorchModel) and result.provenance["kind"] == "huggingface"
    assert [f"{spec.name}={spec}" for spec in model.signature.inputs] == [
        "input_ids=int64[batch,sequence]",
        "attention_mask=int64[batch,sequence]",
    ]
    assert [f"{spec.name}={spec}" for spec in model.signature.outputs] == ["logits=float32[batch,3]"]
    assert model.signature.dims == {"sequence": DimRange(1, 16, 16)}
    assert run(model, torch.ones(2, 5, dtype=torch.int64), torch.ones(2, 5, dtype=torch.int64))[0].shape == (2, 3)
    assert capfd.readouterr().err == ""
    assert loaded(bert, recipe(None, dims={"sequence": 8})).signature.dims == {}
    with pytest.raises(CheckpointError, match="no 'atention_mask'; did you mean 'attention_mask'"):
        load_model(bert, recipe(None, inputs={"input_ids": "int64[batch,8]", "atention_mask": "int64[batch,8]"}))
    more = {"input_ids": "int64[batch,16]", "token_type_ids": "int64[batch,16]"}
    assert loaded(bert, recipe(None, inputs=more)).signature.dynamic == ("batch",)


def test_huggingface_folder_that_lacks_weights(bert: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((bert / name).read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    with pytest.raises(CheckpointError, match=r"lack .*cls.predictions"):
        load_model(tmp_path, recipe(None))
    truncated(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="transformers cannot load this folder"):
        load_model(tmp_path, recipe(None))


def test_huggingface_folder_without_transformers(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UnavailableError, match="pip install transformers"):
        load_model(bert, recipe(None))
