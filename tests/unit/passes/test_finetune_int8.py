from __future__ import annotations

import json
import logging
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
import torch
import yaml

from optkit.data import open_data
from optkit.errors import DataError, PreconditionError
from optkit.models import TorchModel
from optkit.passes.finetune_int8 import FinetuneInt8, FineTuning
from optkit.passes.quantize_int8 import QuantizeInt8
from optkit.pipeline import run_passes, with_original
from optkit.quantize.calibration import Calibration
from optkit.quantize.saturation import MOST, reach_of_rows
from optkit.recipe import Recipe
from optkit.targets.base import ORT_CPU, TENSORRT, Dialect
from optkit.targets.onnxruntime import OnnxRuntimeTarget, open_onnx
from optkit.training import Hooks, Objective
from optkit.training.graph_module import GraphModule
from optkit.validation.twin import twin_passes

BAD = QuantizeInt8(
    activations="static",
    calibrate=Calibration(method="percentile", percentile=80),
    weights="mse",
    smooth=False,
    equalize=False,
    correct_bias=False,
)
"""Cuts off a fifth of what every activation holds."""

TRAIN = FineTuning(epochs=3, batch_size=32, learning_rate=1.0)
STEP = FinetuneInt8(train=TRAIN)

CENTRES = 2 * np.random.default_rng(0).standard_normal((8, 16)).astype("f")


class Careful(OnnxRuntimeTarget):
    """ONNX Runtime on a processor that adds in 16 bits."""

    @property
    def dialect(self):
        return Dialect(int8=replace(ORT_CPU, sums_in_16_bits=True))


class Symmetric(OnnxRuntimeTarget):
    """ONNX Runtime as a stand-in for what runs TensorRT's graphs; no layer of this small net is too small for it."""

    @property
    def dialect(self):
        rules = tuple(rule for rule in TENSORRT.rules if not rule.startswith("small"))
        return Dialect(int8=replace(TENSORRT, rules=rules))


class FloatOnly(OnnxRuntimeTarget):
    """A target without INT8."""

    @property
    def dialect(self):
        return Dialect(int8=None)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def floats(net):
    """Finds the nearest of eight centres: its logits are ``C x - |C|^2 / 2``, with a Relu of both signs on the way."""
    both = np.concatenate([CENTRES, -CENTRES])
    shift = -np.square(CENTRES).sum(1) / 2
    return net(
        """g (float[batch,16] x) => (float[batch,8] logits) {
            a = Gemm <transB = 1> (x, w0, b0)
            r = Relu(a)
            b = Gemm <transB = 1> (r, w1, b1)
            logits = Gemm <transB = 1> (b, w2, b2)
        }""",
        w0=both,
        b0=np.zeros(16, "f"),
        w1=np.concatenate([np.eye(8), -np.eye(8)], 1).astype("f"),
        b1=shift,
        w2=np.eye(8, dtype="f"),
        b2=np.zeros(8, "f"),
    )


@pytest.fixture
def clusters(tmp_path):
    """Points around the centres, with changes of the spec; None takes something out of it."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 8, 800)
    np.savez(tmp_path / "clusters.npz", x=CENTRES[labels] + rng.standard_normal((800, 16)).astype("f"), label=labels)

    def opened(**changes):
        spec = {
            "source": {"kind": "npz", "path": "clusters.npz"},
            "splits": {"calibration": {"count": 64}, "validation": {"count": 300}},
            "inputs": {"x": "x"},
            "label": "label",
            "metric": "top1",
        }
        path = tmp_path / "clusters.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in {**spec, **changes}.items() if v is not None}))
        return open_data(path)

    return opened


@pytest.fixture
def taught(context, clusters, floats):
    return replace(context, data=clusters(), original_onnx=floats)


def run(step, model, context):
    step.requires(model, context)
    after = step.run(model, context)
    if after is not model:
        step.ensures(model, after, context)
    return after


def accuracy(model, data):
    with open_onnx(model, 1, optimize=False) as runner:
        right = [
            runner.run(batch.feeds)["logits"].argmax(1) == batch.labels for batch in data.batches("validation", 100)
        ]
    return 100 * float(np.concatenate(right).mean())


def arrays(model):
    return {name: value.const_value.numpy() for name, value in model.ir.graph.initializers.items()}


@pytest.mark.parametrize("ranges", ["frozen", "learned"])
@pytest.mark.parametrize("target", [OnnxRuntimeTarget(), Careful(), Symmetric()], ids=lambda t: type(t).__name__)
def test_what_bad_ranges_lost_comes_back(floats, taught, target, ranges):
    context = replace(taught, target=target)
    quantized = run(BAD, floats, context)
    before = ir.to_proto(quantized.ir).SerializeToString()
    tuned = run(STEP.model_copy(update={"ranges": ranges}), quantized, context)
    lost, left = (100 - accuracy(model, context.data) for model in (quantized, tuned))
    assert lost > 5
    assert left < lost / 2
    assert ir.to_proto(quantized.ir).SerializeToString() == before


@pytest.mark.parametrize("ranges", ["frozen", "learned"])
def test_only_numbers_change(floats, taught, ranges):
    quantized = run(BAD, floats, taught)
    tuned = run(STEP.model_copy(update={"ranges": ranges}), quantized, taught)
    for one, other in zip(quantized.ir.graph, tuned.ir.graph, strict=True):
        assert (one.name, one.op_type) == (other.name, other.op_type)
        assert [v.name for v in (*one.inputs, *one.outputs)] == [v.name for v in (*other.inputs, *other.outputs)]
    before, after = arrays(quantized), arrays(tuned)
    assert [(name, array.dtype, array.shape) for name, array in before.items()] == [
        (name, array.dtype, array.shape) for name, array in after.items()
    ]
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert {name.rpartition("_")[2] for name in changed} == {"quantized"} | (
        {"scale"} if ranges == "learned" else set()
    )
    assert len({name for name in changed if name.endswith("_quantized")}) == 6


def test_records_stay_and_say_how_it_went(floats, taught):
    quantized = run(BAD, floats, taught)
    tuned = run(STEP, quantized, taught)
    records = json.loads(json.dumps(tuned.records))
    assert records.keys() == {"ranges", "quantization", "finetune_int8"}
    found = records["finetune_int8"]
    assert found["ranges"] == "frozen" and found["score"] > found["score_before"]
    assert found["objective"] == {"labels": 0.3, "outputs": 0.7}
    assert found["data"] == taught.data.fingerprint("training")
    assert tuned.signature == quantized.signature


def test_the_same_seed_gives_the_same_bits(floats, taught):
    quantized = run(BAD, floats, taught)
    one, other = (arrays(run(STEP, quantized, taught)) for _ in range(2))
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_what_no_epoch_improves_is_given_back(floats, taught, caplog):
    quantized = run(QuantizeInt8(activations="static", calibrate=Calibration(method="max")), floats, taught)
    with caplog.at_level(logging.WARNING):
        tuned = run(STEP.model_copy(update={"train": FineTuning(epochs=1, learning_rate=1e-9)}), quantized, taught)
    assert tuned is quantized
    assert "finetune_int8: no epoch was better than what came in (top1 " in caplog.text


def test_a_pytorch_model_teaches_without_labels(floats, taught, clusters):
    original = TorchModel(GraphModule(floats), floats.signature)
    context = replace(taught, data=clusters(label=None, metric="agreement"), original=original, original_onnx=None)
    quantized = run(BAD, floats, context)
    tuned = run(STEP, quantized, context)
    assert accuracy(tuned, clusters()) > accuracy(quantized, clusters()) + 5
    assert tuned.records["finetune_int8"]["objective"] == {"outputs": 0.7}


def test_labels_teach_without_a_model(floats, taught):
    context = replace(taught, original_onnx=None)
    quantized = run(BAD, floats, context)
    tuned = run(STEP, quantized, context)
    assert tuned.records["finetune_int8"]["objective"] == {"labels": 1.0}
    assert accuracy(tuned, context.data) > accuracy(quantized, context.data) + 5


def test_the_pipeline_hands_it_the_model_that_came_in(floats, taught):
    context = replace(taught, original_onnx=None)
    stages = run_passes([BAD, STEP], floats, context)
    assert stages[-1].model.records["finetune_int8"]["objective"] == {"labels": 0.3, "outputs": 0.7}
    quantized = stages[1].model
    assert with_original(replace(context, original_onnx=floats), quantized).original_onnx is floats


def test_zeros_of_a_pruned_model_stay(floats, taught):
    weight = floats.ir.graph.initializers["w0"]
    pruned = weight.const_value.numpy().copy()
    pruned[:, ::4] = 0
    weight.const_value = ir.tensor(pruned, name="w0")
    model = replace(floats, records={"sparsity": {"pattern": "unstructured", "parameters": {"0.weight": 0.75}}})
    quantized = run(BAD, model, taught)
    tuned = run(STEP, quantized, taught)
    assert tuned.records["sparsity"] == model.records["sparsity"]
    name = next(name for name, array in arrays(tuned).items() if array.shape == (16, 16))
    assert (arrays(tuned)[name][:, ::4] == 0).all()
    assert not np.array_equal(arrays(tuned)[name], arrays(quantized)[name])


def test_sums_in_16_bits_stay_in_bounds(floats, taught):
    context = replace(taught, target=Careful())
    quantized = run(BAD.model_copy(update={"weights": "max"}), floats, context)
    tuned = run(STEP.model_copy(update={"train": TRAIN.model_copy(update={"learning_rate": 4.0})}), quantized, context)
    weights = [array for array in arrays(tuned).values() if array.dtype == np.int8 and array.ndim == 2]
    assert len(weights) == 3
    assert max(reach_of_rows(weight.astype(int)).max() for weight in weights) == MOST


class Wrapped(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


class Wraps(Hooks):
    def student(self, module):
        return Wrapped(module)


class Replaces(Hooks):
    def student(self, module):
        return torch.nn.Linear(16, 8)


def test_hooks_may_wrap_the_student_and_must_not_replace_it(floats, taught):
    quantized = run(BAD, floats, taught)
    tuned = run(STEP.model_copy(update={"hooks": f"{__file__}:Wraps"}), quantized, taught)
    assert accuracy(tuned, taught.data) > accuracy(quantized, taught.data) + 5
    with pytest.raises(PreconditionError, match="student does not hold the module that it was made of"):
        run(STEP.model_copy(update={"hooks": f"{__file__}:Replaces"}), quantized, taught)


def test_a_recipe_sets_every_field_and_keeps_the_gentle_defaults():
    recipe = Recipe.parse("passes: [{use: quantize_int8}, {use: finetune_int8, ranges: learned, train: {epochs: 2}}]")
    step = recipe.passes[1]
    assert isinstance(step, FinetuneInt8)
    assert (step.ranges, step.train.epochs, step.train.learning_rate, step.train.amp) == ("learned", 2, 2e-2, False)
    assert Recipe.parse(recipe.to_yaml()) == recipe
    assert FinetuneInt8.search_space().keys() >= {"ranges", "train.learning_rate", "loss.temperature"}


def test_the_twin_in_float_does_without():
    recipe = Recipe.parse("passes: [{use: quantize_int8}, {use: finetune_int8}, {use: build_engine}]")
    assert [step.use for step in twin_passes(recipe, recipe.passes[1:])] == ["build_engine"]


def test_needs_data(floats, taught):
    with pytest.raises(PreconditionError, match="finetune_int8 needs training data: add a `data:` section"):
        STEP.requires(floats, replace(taught, data=None))


def test_needs_a_target_with_int8(floats, taught):
    quantized = run(BAD, floats, taught)
    with pytest.raises(PreconditionError, match="has no INT8: choose another target, or drop finetune_int8"):
        STEP.requires(quantized, replace(taught, target=FloatOnly()))


def test_refuses_a_float_model(floats, taught):
    with pytest.raises(PreconditionError, match="put quantize_int8 before finetune_int8"):
        STEP.requires(floats, taught)


def test_refuses_ranges_that_are_found_at_each_call(floats, taught):
    quantized = run(QuantizeInt8(activations="dynamic"), floats, taught)
    with pytest.raises(PreconditionError, match=r"node '.+' \(.+\) finds its ranges at each call.*activations: static"):
        STEP.requires(quantized, taught)


def test_nothing_to_learn_from(floats, taught, clusters):
    context = replace(taught, data=clusters(label=None, metric="agreement"), original_onnx=None)
    quantized = run(BAD, floats, context)
    with pytest.raises(PreconditionError, match="nothing to learn from"):
        STEP.run(quantized, context)


def test_labels_that_the_data_do_not_have(floats, taught, clusters):
    context = replace(taught, data=clusters(label=None, metric="agreement"))
    step = STEP.model_copy(update={"loss": Objective(labels=1.0)})
    with pytest.raises(DataError, match=r"labels .* and the data have none"):
        step.run(run(BAD, floats, context), context)


def test_an_operator_that_cannot_be_trained(net, taught, clusters):
    model = net(
        "g (float[batch,16] x) => (float[batch,16] logits) { a = MatMul(x, w) logits = Asinh(a) }",
        w=np.eye(16, dtype="f"),
    )
    context = replace(taught, original_onnx=model)
    with pytest.raises(PreconditionError, match=r"\(Asinh\) cannot be trained: .*; leave finetune_int8 out"):
        STEP.run(run(BAD, model, context), context)
