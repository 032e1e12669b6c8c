"""Real networks, node by node: each node reads what ONNX Runtime computed before it, so no rounding adds up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from optkit.compiler import fit_to_data
from optkit.data import open_data
from optkit.models import OnnxModel
from optkit.passes.quantize_int8 import QuantizeInt8
from optkit.pipeline import run_passes
from optkit.quantize.calibration import Calibration
from optkit.recipe import Recipe
from optkit.source import load_model
from optkit.targets.base import ORT_CPU, TENSORRT, Dialect
from optkit.targets.onnxruntime import OnnxRuntimeTarget, open_onnx
from optkit.training.graph_module import GraphModule

ROOT = Path(__file__).resolve().parents[3]
needs_data = pytest.mark.skipif(not (ROOT / ".data/bbc").is_dir(), reason="`make data` has not been run")


class Symmetric(OnnxRuntimeTarget):
    @property
    def dialect(self):
        return Dialect(int8=TENSORRT)


class Asymmetric(OnnxRuntimeTarget):
    @property
    def dialect(self):
        return Dialect(int8=ORT_CPU)


# The large ones once: all that differs between targets is where the pairs are
RECIPES = {
    "digits-int8": (Asymmetric(), Symmetric()),
    "fashion-resnet8-int8": (Asymmetric(), Symmetric()),
    "efficientnet-lite0-int8": (Asymmetric(),),
    "minilm-bbc-int8": (Symmetric(),),
}


def every_tensor(model, feeds):
    """All that ONNX Runtime computes on the way, without its own optimizations."""
    told = model.clone()
    outputs = told.ir.graph.outputs
    for node in told.ir.graph:
        outputs.extend(value for value in node.outputs if value not in outputs)
    with open_onnx(OnnxModel(told.ir, replace(model.signature, outputs=())), 1, optimize=False) as runner:
        return runner.run(feeds)


def check(model, feeds, **options):
    """Every module of the graph gives what ONNX Runtime gives, and is relieved by it."""
    wanted = every_tensor(model, feeds)
    module = GraphModule(model, **options)
    wrong = []

    def watch(node, name):
        def compare(part, inputs, output):
            right = wanted[name]
            given = output.numpy()
            if node.op_type == "QuantizeLinear" or right.dtype.kind != "f":
                same = np.array_equal(given, right)
            else:
                finite = np.where(np.isfinite(right), right, 0)
                same = np.allclose(given, right, rtol=1e-4, atol=1e-5 * np.abs(finite).max(initial=0), equal_nan=True)
            if not same or given.dtype != right.dtype:
                wrong.append((node.name, node.op_type))
            return torch.from_numpy(right.copy())

        module.nodes[node.name.replace(".", "_")].register_forward_hook(compare)

    for node in model.ir.graph:
        # QuantizeLinear gives what its integers stand for
        told = (
            next(iter(node.outputs[0].uses())).node.outputs[0] if node.op_type == "QuantizeLinear" else node.outputs[0]
        )
        watch(node, told.name)
    with torch.no_grad():
        module(*(torch.from_numpy(feeds[spec.name]) for spec in model.signature.inputs))
    assert not wrong


@needs_data
@pytest.mark.parametrize("name", RECIPES)
def test_every_node_of_a_real_network_in_float_and_in_int8(name, context):
    torch.set_num_threads(1)
    recipe = Recipe.load(ROOT / f"recipes/{name}.yaml")
    data = open_data(recipe.data)
    loaded = fit_to_data(load_model(recipe.model.checkpoint, recipe, data.inputs).model, data, recipe)
    passes = [step for step in recipe.passes if step.use in ("export_onnx", "optimize_graph")]
    floats = run_passes(passes, loaded, replace(context, data=data))[-1].model
    feeds = next(data.batches("validation", 2)).feeds
    check(floats, feeds)
    step = QuantizeInt8(
        activations="static",
        calibrate=Calibration(method="max", samples=4, batch_size=4),
        smooth=False,
        correct_bias=False,
    )
    for target in RECIPES[name]:
        quantized = step.run(floats, replace(context, data=data, target=target))
        assert any(node.op_type == "QuantizeLinear" for node in quantized.ir.graph)
        check(quantized, feeds, learned=True)
