"""The inputs and ranges of a ``.pt2``, under the names that the recipe gives."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import exported, loaded, mlp, recipe, run, truncated
from torch import nn

from optkit.errors import CheckpointError
from optkit.models import DimRange, TensorSpec, TorchModel
from optkit.source import load_model


def test_pt2_says_its_inputs_and_ranges(pt2: Path, tmp_path: Path) -> None:
    path = tmp_path / "misleading.pt"
    path.write_bytes(pt2.read_bytes())
    result = load_model(path, recipe(None), (TensorSpec("image", "float32", ("batch", 4)),))
    model = result.model
    assert isinstance(model, TorchModel) and result.provenance["kind"] == "torch.export"
    assert str(model.signature.inputs[0]) == "float32[batch,4]"
    assert str(model.signature.outputs[0]) == "float32[batch,3]"
    assert model.signature.dims == {"batch": DimRange(1, 1, 16)}
    x = torch.randn(1, 4)
    torch.testing.assert_close(run(model, x), mlp()(x))
    assert not any(part.training for part in model.module.modules())


def test_pt2_takes_names_and_narrower_ranges_from_the_recipe(pt2: Path) -> None:
    model = loaded(pt2, recipe(None, inputs={"image": "float32[rows,4]"}, dims={"rows": [2, 4, 8]}))
    assert str(model.signature.inputs[0]) == "float32[rows,4]" and model.signature.dims == {"rows": DimRange(2, 4, 8)}
    assert str(loaded(pt2, recipe(None, dims={"batch": 1})).signature.inputs[0]) == "float32[1,4]"
    assert str(loaded(pt2, recipe(None, inputs={"image": "float32[5,4]"})).signature.outputs[0]) == "float32[5,3]"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"dims": {"batch": [1, 8, 64]}}, "batch may be 1 to 16 in this file, not 1 to 64"),
        ({"dims": {"bathc": [1, 8, 16]}}, "no dynamic dimension of the inputs; did you mean 'batch'"),
        ({"inputs": {"imaeg": "float32[batch,4]"}}, "has no input 'imaeg'; did you mean 'image'"),
        ({"inputs": {"image": "float16[batch,4]"}}, "cannot become float16"),
        ({"inputs": {"image": "float32[batch,width]"}}, "cannot become float32\\[batch,width\\]"),
        ({"inputs": {"image": "float32[99,4]"}}, "99 may be 1 to 16"),
    ],
)
def test_pt2_that_does_not_fit_the_recipe(more: dict[str, Any], message: str, pt2: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_model(pt2, recipe(None, **more))


def test_static_pt2_stays_static(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = exported(mlp(), tmp_path / "m.pt2", (torch.randn(2, 4),))
    with caplog.at_level(logging.WARNING, "optkit.source"):
        model = loaded(path, recipe(None), (TensorSpec("image", "float32", ("batch", 4)),))
    assert str(model.signature.inputs[0]) == "float32[2,4]" and str(model.signature.outputs[0]) == "float32[2,3]"
    assert "fixed at float32[2,4]" in caplog.text


class Encoder(nn.Module):
    def forward(self, input: torch.Tensor, *, mask: torch.Tensor) -> dict[str, Any]:
        return {"last": input * mask[:, :, None], "sums": (input.sum(1), mask + 1)}


def test_pt2_with_a_second_dimension_keywords_and_nested_outputs(tmp_path: Path) -> None:
    batch, sequence = torch.export.Dim.AUTO, torch.export.Dim("s", max=64)
    path = exported(
        Encoder(),
        tmp_path / "m.pt2",
        (torch.randn(2, 5, 3),),
        kwargs={"mask": torch.ones(2, 5, dtype=torch.int64)},
        dynamic_shapes={"input": {0: batch, 1: sequence}, "mask": {0: batch, 1: sequence}},
    )
    model = loaded(path, recipe(None, dims={"sequence": [4, 8, 32]}))
    assert [str(spec) for spec in model.signature.inputs] == ["float32[batch,sequence,3]", "int64[batch,sequence]"]
    assert {spec.name: str(spec) for spec in model.signature.outputs} == {
        "last": "float32[batch,sequence,3]",
        "sums_0": "float32[batch,3]",
        "sums_1": "int64[batch,sequence]",
    }
    assert model.signature.dims == {"sequence": DimRange(4, 8, 32), "batch": DimRange(1, 1, 32)}
    x, mask = torch.randn(3, 6, 3), torch.ones(3, 6, dtype=torch.int64)
    torch.testing.assert_close(run(model, x, mask), (x, x.sum(1), mask + 1))
    assert str(loaded(path, recipe(None)).signature.inputs[0]) == "float32[batch,dim_0,3]"
    named = loaded(path, recipe(None), (TensorSpec("mask", "int64", ("n", "tokens")),)).signature
    assert str(named.inputs[0]) == "float32[n,tokens,3]"


def test_pt2_model_exports_to_onnx_with_dynamic_shapes(pt2: Path) -> None:
    module = loaded(pt2, recipe(None)).module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            (torch.randn(3, 4),),
            dynamo=True,
            dynamic_shapes={"image": {0: torch.export.Dim("batch", min=1, max=16)}},
            verbose=False,
        )
    assert program is not None
    assert [str(dim) for dim in program.model.graph.inputs[0].shape or ()] == ["batch", "4"]


def test_pt2_in_training_mode(tmp_path: Path) -> None:
    path = exported(mlp().train(), tmp_path / "m.pt2", (torch.randn(2, 4),))
    with pytest.raises(CheckpointError, match="exported in training mode"):
        load_model(path, recipe(None))


def test_pt2_with_inputs_that_are_no_tensors(tmp_path: Path) -> None:
    class Nested(nn.Module):
        def forward(self, pair: list[torch.Tensor]) -> torch.Tensor:
            return pair[0] + pair[1]

    path = exported(Nested(), tmp_path / "m.pt2", ([torch.ones(2), torch.ones(2)],))
    with pytest.raises(CheckpointError, match="other than plain tensors"):
        load_model(path, recipe(None))


def test_truncated_pt2(pt2: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    path.write_bytes(pt2.read_bytes())
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        load_model(truncated(path), recipe(None))
