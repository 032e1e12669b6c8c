"""What the tests of reading checkpoints share: a network, files of it in every layout, and recipes."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import torch
from source_nets import Mlp
from torch import nn

from optkit.documents import validate
from optkit.models import TorchModel
from optkit.recipe import Recipe
from optkit.source import load_model

NETS = Path(__file__).with_name("source_nets.py")
IMAGE = {"image": "float32[batch,4]"}


def recipe(factory: str | None = f"{NETS}:mlp", trust_pickle: bool = False, **more: Any) -> Recipe:
    model = {"factory": factory, "trust_pickle": trust_pickle, "arguments": more.pop("arguments", {})}
    return validate(Recipe, {"passes": ["export_onnx"], "model": model, **more}, "recipe")


def mlp() -> Mlp:
    torch.manual_seed(0)
    net = Mlp()
    net.bn.running_mean = torch.tensor([1.0, 2.0, 3.0])
    return net.eval()


def run(model: TorchModel, *arrays: torch.Tensor) -> Any:
    with torch.no_grad():
        return model.module(*arrays)


def loaded(source: Any, *args: Any) -> TorchModel:
    model = load_model(source, *args).model
    assert isinstance(model, TorchModel)
    return model


def exported(net: nn.Module, path: Path, args: tuple[Any, ...], **settings: Any) -> Path:
    torch.export.save(torch.export.export(net, args, **settings), path)
    return path


def truncated(path: Path, size: int | None = None) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2 if size is None else size])
    return path


def write_zip(net: nn.Module, path: Path) -> None:
    torch.save(net.state_dict(), path)


def write_legacy(net: nn.Module, path: Path) -> None:
    torch.save(net.state_dict(), path, _use_new_zipfile_serialization=False)


def write_wrapped(net: nn.Module, path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": net.state_dict()}, path)


def write_parallel(net: nn.Module, path: Path) -> None:
    torch.save({"model": nn.DataParallel(net).state_dict(), "step": 1}, path)


def write_safetensors(net: nn.Module, path: Path) -> None:
    from safetensors.torch import save_file

    save_file(net.state_dict(), path)


WRITERS = [write_zip, write_legacy, write_wrapped, write_parallel, write_safetensors]


class Payload:
    """Unpickling this makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


def pickled(payload: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    return buffer.getvalue()
