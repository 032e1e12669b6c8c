"""What the outputs are, found by running the module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from checkpoints import loaded, recipe, run
from source_nets import Named, Pair, Scores, Tagger
from torch import nn

from optkit.errors import CheckpointError
from optkit.models import DimRange
from optkit.source import load_model


def test_probing_leaves_the_random_numbers_of_torch_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)

    class Noisy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.rand_like(x)

    load_model(Noisy(), recipe(inputs={"x": "float32[batch,4]"}))
    torch.testing.assert_close(torch.rand(2), expected, rtol=0, atol=0)


def test_dimension_that_does_not_vary() -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(2, 4)

    with pytest.raises(CheckpointError, match="at another batch: forward does not accept"):
        load_model(Two(), recipe(inputs={"x": "float32[batch,4]"}))
    assert str(loaded(Two(), recipe(inputs={"x": "float32[2,4]"})).signature.outputs[0]) == "float32[2,4]"


def test_dims_from_the_recipe() -> None:
    sizes = recipe(inputs={"x": "float32[batch,height]"}, dims={"height": [4, 8, 16], "batch": 3})
    signature = loaded(nn.Flatten(0), recipe(inputs={"input": "float32[batch,4]"})).signature
    assert [str(spec) for spec in signature.outputs] == ["float32[output_dim_0]"]

    class Even(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(3, 4, -1)

    signature = loaded(Even(), sizes).signature
    assert str(signature.inputs[0]) == "float32[3,height]" and signature.dims == {"height": DimRange(4, 8, 16)}
    assert str(signature.outputs[0]) == "float32[3,4,output_dim_2]"


def test_nested_dict_outputs_integers_and_a_gap_between_the_inputs() -> None:
    net = Tagger()
    model = loaded(net, recipe(inputs={"ids": "int64[batch,sequence]", "scale": "float32[]"}))
    assert {spec.name: str(spec) for spec in model.signature.outputs} == {
        "hidden": "float32[batch,sequence,4]",
        "stats_0": "float32[batch,4]",
        "stats_1": "int64[]",
        "flat": "float32[flat_dim_0,4]",
    }
    ids, scale = torch.ones(2, 3, dtype=torch.int64), torch.tensor(2.0)
    by_name = model.module(scale=scale, ids=ids)
    for actual, by_keyword, name in zip(run(model, ids, scale), by_name, ("hidden", "stats", "stats", "flat")):  # noqa: B905
        torch.testing.assert_close(actual, by_keyword)
        assert name != "hidden" or torch.equal(actual, net.embed(ids) * 2)


@pytest.mark.parametrize(
    ("result", "names"), [(Pair, ["low", "high"]), (Scores, ["logits"]), (lambda *x: list(x), ["output_0"])]
)
def test_outputs_are_named_after_their_fields(result: Any, names: list[str]) -> None:
    model = loaded(Named(result), recipe(inputs={"x": "float32[batch,2]"}))
    assert [spec.name for spec in model.signature.outputs] == names
    assert {spec.shape for spec in model.signature.outputs} == {("batch", 2)}


def test_outputs_that_are_inputs_or_each_other() -> None:
    class Alias(nn.Module):
        def forward(self, x: torch.Tensor, n: torch.Tensor) -> dict[str, torch.Tensor]:
            doubled = x.to(torch.bfloat16) * 2
            return {"x": x, "a": doubled, "b": doubled, "n": n + 1}

    model = loaded(Alias(), recipe(inputs={"x": "bfloat16[batch,2]", "n": "int32[batch]"}))
    assert [f"{spec.name}={spec}" for spec in model.signature.outputs] == [
        "x_output=bfloat16[batch,2]",
        "a=bfloat16[batch,2]",
        "b=bfloat16[batch,2]",
        "n_output=int32[batch]",
    ]


def test_outputs_that_optkit_cannot_have() -> None:
    class Returns(nn.Module):
        def __init__(self, function: Callable[[torch.Tensor], Any]) -> None:
            super().__init__()
            self.function = function

        def forward(self, x: torch.Tensor) -> Any:
            return self.function(x)

    one = recipe(inputs={"x": "float32[batch,2]"})
    with pytest.raises(CheckpointError, match="returns no tensor"):
        load_model(Returns(lambda x: None), one)
    with pytest.raises(CheckpointError, match="output 'output' is complex64"):
        load_model(Returns(lambda x: x * 1j), one)
    with pytest.raises(CheckpointError, match="ranks of the outputs change"):
        load_model(Returns(lambda x: x if len(x) == 2 else x[None]), one)
