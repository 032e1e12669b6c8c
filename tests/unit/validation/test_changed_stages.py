"""Stages behind a pass that changes what the PyTorch model computes, as pruning does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from optkit.data import Batch
from optkit.models import OnnxModel, Signature, TensorSpec, TorchModel
from optkit.passes.export_onnx import ExportOnnx
from optkit.pipeline import Stage
from optkit.recipe import Recipe
from optkit.report.text import render
from optkit.targets.onnxruntime import open_onnx
from optkit.validation.stages import compare_stages, first_past_tolerance
from optkit.validation.validator import _floats_of_checkpoint

SIGNATURE = Signature((TensorSpec("x", "float32", ("batch", 3)),), (TensorSpec("y", "float32", ("batch", 3)),))
TIMES = "g (float[batch, 3] x) => (float[batch, 3] y) {{ c = Constant<value = float {{{0}}}>()  y = Mul(x, c) }}"


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


@pytest.fixture
def batches() -> list[Batch]:
    return [Batch({"x": np.random.default_rng(0).uniform(-3, 3, (16, 3)).astype(np.float32)}, None)]


def torch_model(factor: float) -> TorchModel:
    return TorchModel(Times(factor), SIGNATURE)


def test_what_follows_a_changed_model_is_compared_with_it(onnx_model, batches, context):
    stages = [
        Stage("checkpoint", torch_model(2.0), 0.0),
        Stage("prune_channels", torch_model(3.0), 0.0),
        Stage("distill", torch_model(2.2), 0.0),
        Stage("export_onnx", onnx_model(TIMES.format("2.2")), 0.0),
        Stage("wrong", onnx_model(TIMES.format("2.0")), 0.0),
    ]
    errors = compare_stages(stages, batches, context, None, None)
    found = [(error.name, error.reference, error.within) for error in errors]
    assert found == [
        ("prune_channels", "checkpoint", None),
        ("distill", "checkpoint", None),
        ("export_onnx", "distill", True),
        ("wrong", "distill", False),
    ]
    # Both torch stages against the checkpoint: 50 % and 10 % of the signal
    assert [errors[i].error.sqnr_db for i in (0, 1)] == pytest.approx([20 * np.log10(2), 20], abs=0.01)
    assert first_past_tolerance(errors) is errors[3]


def test_the_summary_says_what_is_compared_with_what():
    def stage(name: str, reference: str, tolerance: dict[str, float] | None, within: bool | None) -> dict:
        shared = {"equal": True, "sqnr_db": None, "cosine": 1.0, "max_abs": 0.0}
        return {
            "name": name,
            "precision": "float32",
            "reference": reference,
            "tolerance": tolerance,
            "within": within,
            "error": shared,
        }

    tight = {"sqnr_db": 60.0, "cosine": 0.9999}
    stages = [stage("prune_channels", "checkpoint", None, None), stage("export_onnx", "prune_channels", tight, True)]
    record = {
        "widths": {"a": [32, 16]},
        "importance": "activation",
        "macs": [10_000_000, 5_000_000],
        "parameters": [300_000, 100_000],
        "goal": "40.0 % of the MACs",
        "reached": "50.0 % of the MACs",
    }
    sparsity = {"pattern": "2:4", "parameters": {"a.weight": 0.5, "b.weight": 0.5}}
    text = render({"stages": stages, "pruning": record, "sparsity": sparsity})
    assert "Stages, against the checkpoint, those after prune_channels against what that gave" in text
    assert "meant to differ" in text and "60 dB, 0.9999" in text
    assert "5 of 10 M MACs are left (50.0 %)" in text and "0.1 of 0.3 M parameters are left (33.3 %)" in text
    assert "Weights: 2 layers are sparse (2:4, 50 % zeros on average)" in text


def test_speedups_count_from_what_the_float_passes_make_of_the_checkpoint(context):
    recipe = Recipe.parse("passes: [prune_weights, export_onnx, fold_constants, cast_fp16]")
    whole, pruned = torch_model(2.0), torch_model(3.0)
    exported = ExportOnnx().run(pruned, context)
    half = OnnxModel(halved(exported), SIGNATURE)
    names = ["checkpoint", "prune_weights", "export_onnx", "fold_constants", "cast_fp16"]
    models = [whole, pruned, exported, exported, half]
    stages = [Stage(name, model, 0.0) for name, model in zip(names, models, strict=True)]
    floats = _floats_of_checkpoint(stages, recipe, context)
    assert 1 <= len(floats) <= 2  # whether there is a constant to fold is the exporter's business
    for model in floats:
        with open_onnx(model) as runner:
            np.testing.assert_allclose(runner.run({"x": np.ones((1, 3), np.float32)})["y"], 2)
    unchanged = [stages[0], replace(stages[0], name="prune_weights"), *stages[2:]]
    assert _floats_of_checkpoint(unchanged, recipe, context) == ()


def halved(model: OnnxModel) -> ir.Model:
    """The graph behind a cast to FP16."""
    half = model.ir.clone()
    half.graph.append(ir.node("Cast", [half.graph.outputs[0]], {"to": ir.DataType.FLOAT16}))
    return half
