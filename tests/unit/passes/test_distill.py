"""The distill pass: its settings, its teacher, and what it needs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from optkit.context import Context
from optkit.data import Data, open_data
from optkit.errors import PassError, PreconditionError, RecipeError
from optkit.models import Signature, TensorSpec, TorchModel
from optkit.passes.base import TorchPass
from optkit.passes.distill import Distill
from optkit.pipeline import run_passes
from optkit.recipe import Recipe

QUICK = {"epochs": 10, "batch_size": 16, "learning_rate": 0.05}


class Damage(TorchPass):
    """A pass that spoils the model, as pruning does."""

    use: str = "damage"

    def run(self, model: TorchModel, context: Context) -> TorchModel:
        torch.manual_seed(2)
        return replace(model, module=nn.Linear(3, 2).eval().requires_grad_(False))


@pytest.fixture
def model() -> TorchModel:
    module = nn.Linear(3, 2)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[4.0, -4, 0], [-4, 4, 0]]))
        module.bias.zero_()
    inputs, outputs = TensorSpec("x", "float32", ("batch", 3)), TensorSpec("y", "float32", ("batch", 2))
    return TorchModel(module.eval().requires_grad_(False), Signature((inputs,), (outputs,)))


@pytest.fixture
def data(tmp_path: Path) -> Data:
    """Without labels: only the teacher knows."""
    torch.set_num_threads(1)
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).standard_normal((200, 3)).astype(np.float32))
    spec = {
        "source": {"kind": "npz", "path": "x.npz"},
        "splits": {"calibration": {"count": 8}, "validation": {"count": 80}},
        "inputs": {"x": "x"},
        "metric": "agreement",
    }
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(spec))
    return open_data(tmp_path / "x.yaml")


def test_the_model_that_came_in_teaches_what_the_passes_lost(model, data, context):
    step = Distill.model_validate({"train": QUICK})
    stages = run_passes((Damage(), step), model, replace(context, data=data))
    _, damaged, taught = (stage.model for stage in stages)

    def agreement(student: TorchModel) -> float:
        (batch,) = data.batches("validation", 80)
        x = torch.from_numpy(batch.feeds["x"])
        return float((student.module(x).argmax(1) == model.module(x).argmax(1)).float().mean())

    assert agreement(damaged) < 0.8 and agreement(taught) > 0.95
    record = taught.records["distill"]
    assert record["score"] > record["score_before"] and record["metric"] == "agreement"
    assert record["data"]["split"] == "training" and record["data"]["count"] == 120


def test_it_needs_data_and_a_model_to_learn_from(model, data, context):
    with pytest.raises(PassError, match=r"^distill: distill needs training data: add a `data:` section"):
        run_passes((Distill(),), model, context)
    with pytest.raises(PreconditionError, match="distill needs a PyTorch model to learn from"):
        Distill().requires(model, replace(context, data=data))


def test_hooks_are_named_relative_to_the_recipe(tmp_path, model, data, context):
    (tmp_path / "mine.py").write_text(
        "import optkit\n"
        "class Mine(optkit.Hooks):\n"
        "    def on_end(self, state):\n"
        "        (self.context.scratch / 'ended').touch()\n"
    )
    text = "passes: [{use: distill, hooks: 'mine.py:Mine', train: {epochs: 1, batch_size: 16}}, export_onnx]\n"
    (tmp_path / "recipe.yaml").write_text(text)
    step = Recipe.load(tmp_path / "recipe.yaml").passes[0]
    assert step.hooks == f"{tmp_path / 'mine.py'}:Mine"
    run_passes((step,), model, replace(context, data=data))
    assert (context.scratch / "ended").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("lern_rate: 1", r"unknown key passes\[0\]\.lern_rate"),
        ("train: {learning_rat: 1}", r"learning_rat: did you mean 'learning_rate'\?"),
        ("train: {batch_size: 0}", "greater than or equal to 1"),
        ("train: {held_out: 0, patience: 2}", "patience needs samples to judge by: set held_out"),
        ("loss: {temperature: 0}", "greater than 0"),
        ("loss: {kind: classes}", "'logits'"),
    ],
)
def test_settings_that_are_wrong_are_refused_with_their_line(options, message):
    with pytest.raises(RecipeError, match=rf"recipe:1: .*{message}|recipe:1: {message}"):
        Recipe.parse(f"passes: [{{use: distill, {options}}}, export_onnx]\n")


def test_features_may_be_listed_where_their_names_are_the_same():
    passes = Recipe.parse("passes: [{use: distill, loss: {features: [a, b.c]}}, export_onnx]").passes
    assert passes[0].loss.features == {"a": "a", "b.c": "b.c"}
    assert Recipe.parse(Recipe(passes=passes).to_yaml()).passes == passes


def test_a_tuner_may_vary_how_it_learns():
    space = Distill.search_space()
    assert {"train.learning_rate", "train.optimizer", "loss.temperature", "loss.outputs"} <= space.keys()
    assert space["train.learning_rate"].log
