from __future__ import annotations

import contextlib
import copy
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from optkit.context import Context
from optkit.data import open_data
from optkit.errors import PreconditionError, RecipeError, UnavailableError
from optkit.models import Signature, TensorSpec, TorchModel
from optkit.passes.export_onnx import ExportOnnx
from optkit.passes.prune_channels import PruneChannels
from optkit.passes.prune_weights import PruneWeights
from optkit.pipeline import run_passes
from optkit.pruning.samples import calibration_batches, examples
from optkit.pruning.size import size_of
from optkit.recipe import Recipe
from optkit.targets.tensorrt_rtx import TensorRtRtxTarget

SIGNATURE = Signature(
    (TensorSpec("image", "float32", ("batch", 3, 8, 8)),), (TensorSpec("output", "float32", ("batch", 5)),)
)


def net(width: int = 32) -> nn.Sequential:
    """Two convolutions with their norms, the second half of whose channels hardly reach the output; a classifier."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 5),
    )
    with torch.no_grad():
        module[3].weight[:, width // 2 :] *= 1e-3
        module[8].weight[:, width // 2 :] *= 1e-3
    return module.eval().requires_grad_(False)


@pytest.fixture
def model() -> TorchModel:
    return TorchModel(net(), SIGNATURE)


@pytest.fixture
def seeing(context: Context, array_data: Callable[..., Any]) -> Context:
    """A context with 64 images."""
    images = np.random.default_rng(0).standard_normal((64, 3, 8, 8)).astype("f")
    return replace(context, data=array_data({"image": images}))


def pruned(step: PruneChannels, model: TorchModel, context: Context) -> TorchModel:
    after = run_passes([step], model, context)[-1].model
    assert isinstance(after, TorchModel)
    return after


@pytest.mark.parametrize("importance", ["activation", "taylor", "magnitude"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_channels_that_do_not_matter_go(model, seeing, importance, scope):
    step = PruneChannels(macs=0.65, importance=importance, scope=scope)
    before = copy.deepcopy(model.module.state_dict())
    after = pruned(step, model, seeing)
    assert [after.module[i].out_channels for i in (0, 3)] == [16, 16]
    assert after.signature == model.signature
    assert not any(parameter.requires_grad for parameter in after.module.parameters())
    assert torch.equal(after.module[3].weight, model.module[3].weight[:16, :16])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.module.state_dict().items())


def test_the_record_says_what_went_and_is_json(model, seeing):
    record = pruned(PruneChannels(macs=0.65), model, seeing).records["pruning"]
    assert json.loads(json.dumps(record)) == record
    assert record["widths"] == {"0": [32, 16], "3": [32, 16]}
    # 8x8 places times 3x3x3x32 and 3x3x32x32 weights, and the classifier
    assert record["macs"] == [64 * (864 + 9216) + 160, 64 * (432 + 2304) + 80]
    assert record["parameters"] == [864 + 9216 + 128 + 165, 432 + 2304 + 64 + 85]
    assert record["goal"] == "65.0 % of the MACs" and record["reached"] == "72.9 % of the MACs"
    assert record["kept"] == {"8": "its channels are the model's output"}


def test_statistics_of_norms_are_taken_anew(model, seeing):
    after = pruned(PruneChannels(macs=0.5), model, seeing)
    with torch.no_grad():
        seen = torch.cat([after.module[0](*batch) for batch in calibration_batches(SIGNATURE, seeing, 64)])
    np.testing.assert_allclose(after.module[1].running_mean, seen.mean((0, 2, 3)), atol=1e-5)
    # Two batches of 32: the variance is the mean of theirs
    np.testing.assert_allclose(after.module[1].running_var, seen.var((0, 2, 3)), rtol=0.05)
    assert not after.module[1].training and after.module[1].momentum == model.module[1].momentum


def test_without_data_magnitude_keeps_the_checkpoints_statistics(model, context):
    after = pruned(PruneChannels(macs=0.5, importance="magnitude"), model, context)
    assert torch.equal(after.module[1].running_mean, model.module[1].running_mean[:16])


@pytest.mark.parametrize(
    ("options", "widths"),
    [
        ({"macs": 0.05}, [24, 32]),
        ({"macs": 0.05, "multiple": 4}, [28, 32]),
        ({"macs": 0.05, "multiple": 1}, [31, 31]),
        ({"macs": 0.05, "multiple": 16}, [16, 32]),
        ({"parameters": 0.05}, [24, 32]),
        ({"macs": 0.3, "skip": ("0",)}, [32, 16]),
        ({"macs": 0.9, "max_ratio": 0.75}, [8, 8]),
    ],
)
def test_no_more_goes_than_the_goal_takes_in_multiples(model, seeing, options, widths):
    after = pruned(PruneChannels(**options), model, seeing)
    assert [after.module[i].out_channels for i in (0, 3)] == widths


def test_the_target_says_what_multiple_its_kernels_like(model, seeing):
    seeing = replace(seeing, target=TensorRtRtxTarget())
    assert pruned(PruneChannels(macs=0.05), model, seeing).module[0].out_channels == 16


def test_steps_come_to_the_same_goal(model, seeing):
    record = pruned(PruneChannels(macs=0.6, multiple=4, steps=3), model, seeing).records["pruning"]
    assert 1 - record["macs"][1] / record["macs"][0] >= 0.6
    assert record["widths"].keys() == {"0", "3"}


def test_a_speedup_is_measured_on_the_target(seeing):
    step = PruneChannels(speedup=1.2, multiple=64, skip=("0",))
    record = pruned(step, TorchModel(net(128), SIGNATURE), seeing).records["pruning"]
    assert record["goal"] == "1.20 times the speed" and float(record["reached"].split()[0]) > 1
    assert record["macs"][1] < record["macs"][0]
    assert not list(seeing.scratch.iterdir())


def test_what_is_pruned_exports(model, seeing):
    run_passes([PruneChannels(macs=0.5), ExportOnnx()], model, seeing)


def test_macs_of_attention_count():
    attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    signature = Signature(
        (TensorSpec("x", "float32", ("batch", 4, 8)),), (TensorSpec("y", "float32", ("batch", 4, 8)),)
    )
    macs = size_of(attention, examples(signature, batch=1)).macs
    projections, products, feed_forward = 4 * 4 * 8 * 8, 2 * 4 * 4 * 8, 2 * 4 * 8 * 16
    assert macs == projections + products + feed_forward


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"macs": 0.999}, r"goal of 99.9 % of the MACs cannot be reached: with all gone that may go it is 9\d.\d %"),
        ({"macs": 0.5, "multiple": 64}, "nothing left to prune: 0 has 32 channels, 3 has 32 channels, and widths are"),
        ({"macs": 0.5, "skip": ("0", "3")}, r"there is nothing to prune \(8: .*output; 3: `skip` names it; 0: `skip`"),
        ({"macs": 0.5, "skip": ("stem",)}, "`skip`: no layer is called 'stem'; known: 0, 3, 8"),
    ],
)
def test_goals_and_patterns_that_cannot_be_are_told_from_the_model(model, seeing, options, message):
    with pytest.raises(PreconditionError, match=f"prune_channels: .*{message}"):
        pruned(PruneChannels(**options), model, seeing)


def test_importance_that_looks_at_data_needs_some(model, context):
    with pytest.raises(
        PreconditionError, match=r"importance 'activation' needs data: .* or set `importance: magnitude`"
    ):
        pruned(PruneChannels(macs=0.5), model, context)


@pytest.mark.parametrize("how", ["script", "trace", "export"])
def test_programs_have_no_layers_to_prune(model, seeing, how):
    inputs = examples(SIGNATURE)
    make = {
        "script": lambda: torch.jit.script(model.module),
        "trace": lambda: torch.jit.trace(model.module, inputs),
        "export": lambda: torch.export.export(model.module, inputs).module(),
    }[how]
    with pytest.warns(DeprecationWarning) if how != "export" else contextlib.nullcontext():
        program = make()
    with pytest.raises(PreconditionError, match="hand over a state_dict with the factory of its module"):
        pruned(PruneChannels(macs=0.5), replace(model, module=program), seeing)


def test_a_model_without_layers_says_so(seeing):
    model = TorchModel(nn.Flatten(), SIGNATURE)
    with pytest.raises(PreconditionError, match="nothing to prune: the model has no convolution or linear layer"):
        pruned(PruneChannels(macs=0.5), model, seeing)


def test_channels_come_before_weights(model, seeing):
    sparse = pruned(PruneWeights(skip=("8",)), model, seeing)
    with pytest.raises(PreconditionError, match="prune_weights ran before: prune channels first, then weights"):
        pruned(PruneChannels(macs=0.5), sparse, seeing)


def test_a_speedup_needs_a_target_that_runs_here(model, seeing):
    target = TensorRtRtxTarget()
    if target.can_run().ok:
        pytest.skip("this machine runs TensorRT-RTX")
    with pytest.raises(UnavailableError, match=r"`speedup` is measured on the target 'tensorrt-rtx': .* set `macs`"):
        pruned(PruneChannels(speedup=1.5), model, replace(seeing, target=target))


def test_a_missing_extra_is_named(model, seeing, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(UnavailableError, match=r"needs Torch-Pruning: pip install 'optkit\[prune\]'"):
        pruned(PruneChannels(macs=0.5), model, seeing)


@pytest.mark.parametrize("goals", ["", ", macs: 0.5, speedup: 2"])
def test_a_recipe_names_one_goal(goals):
    with pytest.raises(RecipeError, match=r"recipe:2: .*set one of macs, parameters and speedup"):
        Recipe.parse(f"passes:\n- {{use: prune_channels{goals}}}\n- export_onnx")


def test_the_search_space():
    assert set(PruneChannels.search_space()) >= {"macs", "importance", "scope", "multiple", "max_ratio", "steps"}


def test_training_between_the_steps_brings_back_what_went(model, context, tmp_path):
    rng = np.random.default_rng(0)
    images = rng.standard_normal((192, 3, 8, 8)).astype("f")
    np.savez(tmp_path / "images.npz", image=images, label=np.arange(192) % 5)
    (tmp_path / "data.yaml").write_text(
        "source: {kind: npz, path: images.npz}\ninputs: {image: image}\nlabel: label\nmetric: agreement\n"
        "splits: {calibration: {count: 64}, validation: {count: 32}}\n"
    )
    context = replace(context, data=open_data(str(tmp_path / "data.yaml"), 0))
    # Channels that matter: the halves that hardly reach the output of `model` would not be missed
    with torch.no_grad():
        model.module[3].weight[:, 16:] *= 1e3
        model.module[8].weight[:, 16:] *= 1e3
    options = {"macs": 0.5, "multiple": 4, "steps": 2, "importance": "magnitude"}
    lesson = {"loss": {"kind": "values", "labels": 0}, "train": {"epochs": 12, "batch_size": 16, "held_out": 0.2}}
    short = pruned(PruneChannels(**options), model, context)
    taught = pruned(PruneChannels.model_validate({**options, "recover": lesson}), model, context)
    assert {"prune_channels step 1", "prune_channels step 2", "pruning"} <= set(taught.records)
    assert taught.records["pruning"]["widths"].keys() == short.records["pruning"]["widths"].keys()
    with torch.no_grad():
        inputs = torch.from_numpy(images)
        wanted = model.module(inputs)
        errors = [float((m.module(inputs) - wanted).square().mean()) for m in (short, taught)]
    assert errors[1] < errors[0] / 2
    assert not any(parameter.requires_grad for parameter in taught.module.parameters())


def test_recovery_needs_what_training_needs(model, context):
    step = PruneChannels.model_validate({"macs": 0.5, "importance": "magnitude", "recover": {}})
    with pytest.raises(PreconditionError, match="needs training data: add a `data:` section"):
        pruned(step, model, context)


def test_hooks_of_the_recovery_are_relative_to_the_recipe(tmp_path):
    step = PruneChannels.model_validate({"macs": 0.5, "recover": {"hooks": "hooks.py:Mine"}}).relative_to(tmp_path)
    assert step.recover is not None and step.recover.hooks == f"{tmp_path / 'hooks.py'}:Mine"
