"""A state_dict meets its factory, and what does not fit is named."""

from __future__ import annotations

import json
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import IMAGE, NETS, WRITERS, loaded, mlp, recipe, run, truncated, write_safetensors
from source_nets import Mlp
from torch import nn

from optkit.errors import CheckpointError
from optkit.models import TorchModel
from optkit.source import load_model


@pytest.mark.parametrize("write", WRITERS)
def test_state_dict_meets_its_factory(write: Callable[[nn.Module, Path], None], tmp_path: Path) -> None:
    net, path = mlp(), tmp_path / "misleading.onnx"
    write(net, path)
    search_path = list(sys.path)
    result = load_model(path, recipe(inputs=IMAGE))
    assert sys.path == search_path
    model = result.model
    assert isinstance(model, TorchModel)
    x = torch.randn(5, 4)
    torch.testing.assert_close(run(model, x), net(x), rtol=0, atol=0)
    assert not model.module.training and not any(p.requires_grad for p in model.module.parameters())
    assert str(model.signature.inputs[0]) == "float32[batch,4]"
    assert str(model.signature.outputs[0]) == "float32[batch,3]"
    assert result.provenance["kind"] == ("safetensors" if write is write_safetensors else "state_dict")
    assert result.provenance["factory"] == f"{NETS}:mlp" and result.provenance["trusted_pickle"] is False
    assert len(result.provenance["sha256"]) == 64 and json.dumps(result.provenance)


def test_factory_of_a_module_and_its_arguments(tmp_path: Path) -> None:
    torch.save(Mlp(6).state_dict(), tmp_path / "m.pt")
    wide = recipe("source_nets:mlp", arguments={"width": 6}, inputs={"image": "float32[batch,6]"})
    assert loaded(tmp_path / "m.pt", wide).signature.outputs[0].shape == ("batch", 3)


@pytest.mark.parametrize(
    ("factory", "arguments", "message"),
    [
        (None, {}, r"7 tensors \(fc.weight, .* and 4 more\).*--model module:function"),
        ("nets.py", {}, "write module:function or path.py:function"),
        ("no_such_module:mlp", {}, "no module 'no_such_module'; install it, or write the path"),
        ("no_such_file.py:mlp", {}, "there is no file .*no_such_file.py"),
        (f"{NETS}:mpl", {}, "no function 'mpl', did you mean 'mlp'"),
        (f"{NETS}:broken", {}, r"RuntimeError: no weights for you at .*source_nets.py:\d+: `raise RuntimeError"),
        (f"{NETS}:mlp", {"wdith": 3}, r"source_nets.py:\d+\) raised TypeError.*wdith"),
        (f"{NETS}:nothing", {}, r"source_nets.py:\d+\) returned int; it must return a torch.nn.Module"),
    ],
)
def test_factory_that_does_not_work(factory: Any, arguments: Any, message: str, tmp_path: Path) -> None:
    torch.save(mlp().state_dict(), tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "m.pt", recipe(factory, arguments=arguments, inputs=IMAGE))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import no_such_package\n", r"nets.py:1: `import no_such_package`"),
        ("def f(:\n", r"SyntaxError.*nets.py:1"),
        ("x = 1\nimport sys; sys.exit(3)\n", r"SystemExit: 3 at .*nets.py:2"),
    ],
)
def test_factory_file_that_cannot_be_imported(text: str, message: str, tmp_path: Path) -> None:
    torch.save(mlp().state_dict(), tmp_path / "m.pt")
    (tmp_path / "nets.py").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "m.pt", recipe(f"{tmp_path}/nets.py:f", inputs=IMAGE))


def test_factory_file_imports_its_neighbour(tmp_path: Path) -> None:
    torch.save(nn.Linear(4, 2).state_dict(), tmp_path / "m.pt")
    (tmp_path / "neighbour_of_a_factory.py").write_text("from torch import nn\n")
    (tmp_path / "nets.py").write_text(
        "def f():\n    import neighbour_of_a_factory as n\n    return n.nn.Linear(4, 2)\n"
    )
    model = loaded(tmp_path / "m.pt", recipe(f"{tmp_path}/nets.py:f", inputs={"input": "float32[batch,4]"}))
    assert model.signature.outputs[0].shape == ("batch", 2)
    assert str(tmp_path) not in sys.path


def test_state_dict_that_does_not_fit(tmp_path: Path) -> None:
    state = mlp().state_dict()
    del state["fc.bias"], state["bn.num_batches_tracked"]
    state["head.weight"] = torch.ones(1)
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"1 missing: fc.bias; 1 unexpected: head.weight; check the factory"):
        load_model(tmp_path / "m.pt", recipe(inputs=IMAGE))
    torch.save(mlp().state_dict(), tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"1 of another shape: fc.weight is \[3, 4\], not \[3, 9\]"):
        load_model(tmp_path / "m.pt", recipe(arguments={"width": 9}, inputs=IMAGE))


def test_old_state_dict_without_the_count_of_batches(tmp_path: Path) -> None:
    state = mlp().state_dict()
    del state["bn.num_batches_tracked"]
    torch.save(OrderedDict(state), tmp_path / "m.pt")
    assert loaded(tmp_path / "m.pt", recipe(inputs=IMAGE)).signature.inputs


def test_tied_weights_that_are_saved_once(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n"
        "def f():\n    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))\n"
        "    net[1].weight = net[0].weight\n    return net\n"
    )
    state = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).state_dict()
    del state["1.weight"]
    torch.save(state, tmp_path / "m.pt")
    model = loaded(tmp_path / "m.pt", recipe(f"{tmp_path}/nets.py:f", inputs={"input": "float32[batch,4]"}))
    torch.testing.assert_close(model.module.state_dict()["1.weight"], state["0.weight"])


@pytest.mark.parametrize("write", WRITERS)
def test_truncated_state_dict(write: Callable[[nn.Module, Path], None], tmp_path: Path) -> None:
    for keep in (0.1, 0.5, 0.99):
        path = tmp_path / "m.pt"
        write(mlp(), path)
        truncated(path, int(path.stat().st_size * keep))
        with pytest.raises(CheckpointError, match="truncated or damaged"):
            load_model(path, recipe(inputs=IMAGE))
