"""A module is copied and checked, and its inputs are matched with its forward."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import IMAGE, loaded, mlp, recipe, run
from torch import nn

from optkit.errors import CheckpointError
from optkit.models import TensorSpec
from optkit.source import load_model


def test_live_module_is_never_changed() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1  # type: ignore[operator, misc]
            return self.fc(x)  # type: ignore[no-any-return]

    net = Counting().train()
    handle = net.register_forward_hook(lambda module, args, output: output * 2)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    model = loaded(net, recipe(inputs={"x": "float32[batch,4]"}))
    assert net.training and net.fc.training and all(p.requires_grad for p in net.parameters())
    assert list(net._forward_hooks) == [handle.id]
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    assert model.module is not net and not model.module.training
    assert {p.data_ptr() for p in net.parameters()}.isdisjoint(p.data_ptr() for p in model.module.parameters())
    assert model.module.calls.item() == 0
    x = torch.randn(2, 4)
    torch.testing.assert_close(run(model, x), 2 * net.fc(x))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(bad: float, tmp_path: Path) -> None:
    net = mlp()
    net.fc.bias.data[1] = bad
    torch.save(net.state_dict(), tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"NaN or infinity in 1 tensor\(s\): fc.bias"):
        load_model(tmp_path / "m.pt", recipe(inputs=IMAGE))


def test_infinity_in_a_buffer_is_a_mask() -> None:
    net = nn.Linear(4, 4)
    net.register_buffer("mask", torch.full((4,), float("-inf")))
    assert loaded(net, recipe(inputs={"input": "float32[batch,4]"})).signature.outputs
    net.mask[0] = float("nan")  # type: ignore[index, operator]
    with pytest.raises(CheckpointError, match="mask"):
        load_model(net, recipe(inputs={"input": "float32[batch,4]"}))


@pytest.mark.parametrize("make", [lambda: nn.LazyLinear(2), lambda: nn.Linear(4, 2, device="meta")])
def test_weights_without_values(make: Callable[[], nn.Module]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = make()
    with pytest.raises(CheckpointError, match=r"2 tensor\(s\) have no values yet: weight, bias"):
        load_model(net, recipe(inputs={"input": "float32[batch,4]"}))


def test_inputs_by_priority() -> None:
    data = (TensorSpec("image", "float32", ("n", 4)),)
    assert loaded(mlp(), recipe(), data).signature.dynamic == ("n",)
    assert loaded(mlp(), recipe(inputs=IMAGE), data).signature.dynamic == ("batch",)
    with pytest.raises(CheckpointError, match=r"Mlp.forward takes image\).*--input image=float32\[batch,3,224,224\]"):
        load_model(mlp(), recipe())


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"imaeg": "float32[batch,4]"}, "forward takes image, but no 'imaeg'; did you mean 'image'"),
        ({"image": "float32[batch,5]"}, r"does not accept .*\[2, 5\].*mat1 and mat2.*source_nets.py:\d+: `return"),
        ({"image": "int64[batch,4]"}, "does not accept the inputs image=int64"),
        ({"image": "float32[batch,width]"}, "does not accept"),
    ],
)
def test_inputs_that_do_not_fit(inputs: dict[str, str], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_model(mlp(), recipe(inputs=inputs))


def test_input_that_is_missing() -> None:
    class Two(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a + b

    with pytest.raises(CheckpointError, match="takes a, b, and nothing describes a; write --input a="):
        load_model(Two(), recipe(inputs={"b": "float32[batch,4]"}))
    model = loaded(Two(), recipe(inputs={"b": "float32[batch,4]", "a": "float32[batch,1]"}))
    assert [spec.name for spec in model.signature.inputs] == ["a", "b"]


def test_names_beside_keyword_arguments_are_checked() -> None:
    class Open(nn.Module):
        def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, **more: Any) -> torch.Tensor:
            return x if mask is None else x * mask

    with pytest.raises(CheckpointError, match=r"takes x, mask=\.\.\., but no 'maks'; did you mean 'mask'"):
        load_model(Open(), recipe(inputs={"x": "float32[batch,4]", "maks": "float32[batch,4]"}))
    swapped = {"mask": "float32[batch,1]", "x": "float32[batch,4]"}
    assert [spec.name for spec in loaded(Open(), recipe(inputs=swapped)).signature.inputs] == ["x", "mask"]


def test_inputs_of_any_name_where_forward_takes_anything() -> None:
    class Any_(nn.Module):
        def forward(self, *args: torch.Tensor) -> torch.Tensor:
            return args[0] - args[1]

    model = loaded(Any_(), recipe(inputs={"b": "float32[batch,4]", "a": "float32[batch,4]"}))
    one = torch.ones(2, 4)
    torch.testing.assert_close(run(model, 3 * one, one), 2 * one)
    assert [spec.name for spec in model.signature.inputs] == ["b", "a"]
