from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from optkit.context import Context
from optkit.errors import PreconditionError, RecipeError
from optkit.models import OnnxModel, Signature, TensorSpec, TorchModel
from optkit.passes.export_onnx import ExportOnnx
from optkit.passes.optimize_graph import OptimizeGraph
from optkit.passes.prune_weights import PruneWeights
from optkit.passes.quantize_int8 import QuantizeInt8
from optkit.pipeline import run_passes
from optkit.pruning.samples import calibration_batches, examples
from optkit.pruning.sparsity import is_two_of_four, masks
from optkit.recipe import Recipe
from optkit.targets.tensorrt import TensorRtTarget

SIGNATURE = Signature(
    (TensorSpec("image", "float32", ("batch", 3, 8, 8)),), (TensorSpec("output", "float32", ("batch", 6)),)
)
SPARSE = ("inner", "outer", "hidden", "head")


class Net(nn.Module):
    """Convolutions with a norm and a skip, a grouped one, and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.inner = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.outer = nn.Conv2d(16, 16, 1)
        self.hidden = nn.Linear(64, 16)
        self.head = nn.Linear(16, 6)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(image))
        x = F.relu(x + self.norm(self.inner(x)))
        x = self.outer(F.relu(self.grouped(x)))
        return self.head(F.relu(self.hidden(F.adaptive_avg_pool2d(x, 2).flatten(1))))


@pytest.fixture
def model() -> TorchModel:
    torch.manual_seed(0)
    return TorchModel(Net().eval().requires_grad_(False), SIGNATURE)


@pytest.fixture
def seeing(context: Context, array_data: Callable[..., Any]) -> Context:
    """A context with 64 smooth images: neighbouring channels then say much the same."""
    coarse = torch.randn(64, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    images = F.interpolate(coarse, (8, 8), mode="bilinear").numpy() + np.float32(0.5)
    return replace(context, data=array_data({"image": images}))


def pruned(step: PruneWeights, model: TorchModel, context: Context) -> TorchModel:
    after = run_passes([step], model, context)[-1].model
    assert isinstance(after, TorchModel)
    return after


def weights(model: TorchModel) -> dict[str, np.ndarray[Any, Any]]:
    return {name: tensor.numpy() for name, tensor in model.module.state_dict().items()}


def error(model: TorchModel, reference: TorchModel, context: Context) -> float:
    """Of the outputs, relative to their power."""
    with torch.no_grad():
        pairs = [(model.module(*b), reference.module(*b)) for b in calibration_batches(SIGNATURE, context, 64)]
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs))


@pytest.mark.parametrize("method", ["second_order", "magnitude"])
def test_two_of_any_four_neighbours_along_the_input_channels_are_zero(model, seeing, method):
    before = copy.deepcopy(model.module.state_dict())
    after = pruned(PruneWeights(method=method), model, seeing)
    found = weights(after)
    for name in SPARSE:
        assert is_two_of_four(found[f"{name}.weight"]) and (found[f"{name}.weight"] == 0).mean() == 0.5
    for name in ("stem.weight", "stem.bias", "grouped.weight"):
        assert np.array_equal(found[name], before[name])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.module.state_dict().items())
    assert after.signature == model.signature


def test_the_record_names_what_is_sparse_and_why_the_rest_is_not(model, seeing):
    after = pruned(PruneWeights(skip=("head",)), model, seeing)
    record = after.records["sparsity"]
    assert json.loads(json.dumps(record)) == record
    assert record["parameters"] == {f"{name}.weight": 0.5 for name in ("inner", "outer", "hidden")}
    assert record["dense"] == {
        "stem": "its 3 input channels make no groups of four",
        "grouped": "it is a grouped, transposed or three-dimensional convolution",
        "head": "`skip` names it",
    }
    assert set(masks(after)) == set(record["parameters"])


def test_second_order_loses_at_most_half_of_what_magnitude_loses(model, seeing):
    context = replace(seeing, data=None)  # magnitude needs none, and takes no statistics anew
    magnitude = error(pruned(PruneWeights(method="magnitude"), model, context), model, seeing)
    assert error(pruned(PruneWeights(), model, seeing), model, seeing) < magnitude / 2


@pytest.mark.parametrize("method", ["second_order", "magnitude"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_unstructured_zeros_come_to_the_sparsity(model, seeing, method, scope):
    after = pruned(PruneWeights(pattern="unstructured", sparsity=0.6, method=method, scope=scope), model, seeing)
    layers = [weights(after)[f"{name}.weight"] for name in ("stem", *SPARSE)]
    shares = [(layer == 0).mean() for layer in layers]
    assert sum((layer == 0).sum() for layer in layers) / sum(layer.size for layer in layers) == pytest.approx(
        0.6, abs=0.01
    )
    assert bool(max(shares) - min(shares) < 0.02) is (scope == "layer")


def test_magnitude_drops_the_smallest_of_all(model, context):
    after = pruned(PruneWeights(pattern="unstructured", sparsity=0.7, method="magnitude"), model, context)
    before, found = weights(model), weights(after)
    kept = np.concatenate([np.abs(found[f"{name}.weight"]).ravel() for name in ("stem", *SPARSE)])
    gone = np.concatenate(
        [np.abs(before[f"{name}.weight"])[found[f"{name}.weight"] == 0] for name in ("stem", *SPARSE)]
    )
    assert gone.max() < kept[kept > 0].min() * 1.02  # layers round their share to whole weights


def test_a_sparse_model_is_left_alone(model, seeing):
    once = pruned(PruneWeights(), model, seeing)
    assert PruneWeights().run(once, seeing) is once


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        (None, {}, "onnxruntime has dense kernels only: zeros make files smaller, and nothing faster"),
        (TensorRtTarget(sparsity=True), {"pattern": "unstructured"}, "sparse kernels of tensorrt take 2:4 only"),
        (TensorRtTarget(), {}, "tensorrt uses its sparse kernels only where `sparsity: true` asks for them"),
        (TensorRtTarget(sparsity=True), {}, "0 of 4 sparse layers have more than 256 channels in and out"),
    ],
)
def test_the_report_says_where_zeros_bring_no_speed(model, seeing, caplog, target, options, message):
    with caplog.at_level(logging.WARNING, "optkit"):
        pruned(PruneWeights(method="magnitude", **options), model, replace(seeing, target=target or seeing.target))
    assert message in caplog.text


@pytest.mark.parametrize("round_to", ["nearest", "gptq"])
def test_int8_keeps_two_of_four(model, seeing, round_to):
    seeing.data.fingerprint = lambda split: {"split": split}
    steps = [PruneWeights(), ExportOnnx(), OptimizeGraph(), QuantizeInt8(round=round_to)]
    quantized = run_passes(steps, model, seeing)[-1].model
    assert isinstance(quantized, OnnxModel) and quantized.records["sparsity"]["pattern"] == "2:4"
    tensors = [value.const_value.numpy() for value in quantized.ir.graph.initializers.values() if value.const_value]
    weights = [tensor for tensor in tensors if tensor.dtype == np.int8 and tensor.ndim > 1]
    sparse = [weight for weight in weights if weight.shape not in ((16, 3, 3, 3), (16, 8, 3, 3))]
    assert len(weights) == 6 and len(sparse) == 4
    # The linear layers have more inputs than outputs, whichever way their products read the weights
    assert all(is_two_of_four(weight, 1 if weight.ndim == 4 else int(np.argmax(weight.shape))) for weight in sparse)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_second_order_needs_data(model, context):
    with pytest.raises(PreconditionError, match=r"method second_order needs data: add `data:` .* `method: magnitude`"):
        pruned(PruneWeights(), model, context)


def test_a_pattern_that_matches_nothing_is_an_error(model, seeing):
    with pytest.raises(PreconditionError, match=r"`skip`: no layer is called 'haed'; did you mean 'head'\?"):
        pruned(PruneWeights(skip=("haed",)), model, seeing)


def test_nothing_to_prune_says_why(model, seeing):
    message = "there is no weight to prune: stem: its 3 input channels .*; inner: `skip` names it"
    with pytest.raises(PreconditionError, match=message):
        pruned(PruneWeights(skip=SPARSE), model, seeing)


def test_shared_weights_stay_dense(seeing):
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.again = nn.Linear(16, 16)
            self.once = nn.Linear(16, 16)
            self.once.weight = self.again.weight

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            x = F.adaptive_avg_pool2d(self.outer(self.stem(image)), 1).flatten(1)
            return self.head(F.relu(self.once(F.relu(self.again(x)))))

    torch.manual_seed(0)
    after = pruned(PruneWeights(), TorchModel(Tied().eval(), SIGNATURE), seeing)
    assert after.records["sparsity"]["dense"]["once"] == "it has its weight in common with again"
    assert after.records["sparsity"]["dense"]["inner"] == "forward does not call it"


def test_programs_have_no_layers_to_prune(model, seeing):
    program = torch.export.export(model.module, examples(SIGNATURE)).module()
    with pytest.raises(PreconditionError, match="hand over a state_dict with the factory of its module"):
        pruned(PruneWeights(), replace(model, module=program), seeing)


def test_two_of_four_has_one_sparsity():
    with pytest.raises(RecipeError, match=r"recipe:2: .*2:4 is a sparsity of 0.5"):
        Recipe.parse("passes:\n- {use: prune_weights, sparsity: 0.75}\n- export_onnx")
