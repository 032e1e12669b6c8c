"""Whole runs from Python: what comes in, what comes out, and that nothing is left behind when it goes wrong."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import optkit
from optkit.bundle import verify
from optkit.errors import GateError, OutputError, UsageError
from optkit.recipe import Recipe

QUICK = {"samples": 64, "stage_samples": 4, "latency": {"rounds": 2, "seconds": 0.01, "warmup": 0.0}}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )


def recipe(preset: str = "fp32", **changes: object) -> Recipe:
    fields = {"inputs": {"input": "float32[batch,1,8,8]"}, "validation": QUICK, "threads": 1, **changes}
    return Recipe.load(preset).updated(**fields)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> optkit.Bundle:
    return optkit.compile(net(), recipe(), tmp_path_factory.mktemp("out") / "net")


def test_a_module_becomes_a_bundle_that_computes_the_same(bundle):
    image = np.random.default_rng(0).standard_normal((3, 1, 8, 8)).astype(np.float32)
    with torch.no_grad():
        expected = net().eval()(torch.from_numpy(image)).numpy()
    (output,) = optkit.load(bundle.path)(image).values()
    np.testing.assert_allclose(output, expected, atol=1e-5)


def test_the_bundle_is_whole_and_says_what_made_it(bundle):
    assert verify(bundle.path) == []
    assert bundle.manifest["verdict"] == "passed"
    assert bundle.recipe.name == "fp32"
    assert {"torch", "onnxruntime", "optkit"} <= set(bundle.manifest["versions"])
    assert [step["name"] for step in bundle.report["passes"]] == ["export_onnx", "optimize_graph", "build_engine"]
    assert "PASSED" in bundle.summary
    assert any("random" in warning for warning in bundle.report["warnings"])


def test_nothing_stands_beside_the_bundle(bundle):
    assert [path.name for path in bundle.path.parent.iterdir()] == ["net"]


def test_the_callers_module_is_not_changed(tmp_path):
    module = net().train()
    module[0].register_forward_hook(lambda *args: None)
    before = copy.deepcopy(module.state_dict())
    optkit.compile(module, recipe(), tmp_path / "out")
    assert module.training and all(parameter.requires_grad for parameter in module.parameters())
    assert len(module[0]._forward_hooks) == 1
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


def test_an_output_that_exists_is_kept_unless_forced(bundle, tmp_path):
    (tmp_path / "plain").mkdir()
    options = recipe()
    with pytest.raises(OutputError, match="--force"):
        optkit.compile(net(), options, bundle.path)
    with pytest.raises(OutputError, match="not an optkit bundle"):
        optkit.compile(net(), options, tmp_path / "plain", force=True)
    with pytest.raises(UsageError, match="there is no model"):
        optkit.compile(None, options, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


def test_a_missed_gate_leaves_only_what_was_rejected(tmp_path):
    options = recipe(
        gate={"min_speedup": 1000.0}, validation={**QUICK, "latency": {"rounds": 6, "seconds": 0.01, "warmup": 0.0}}
    )
    with pytest.raises(GateError, match="gate was missed") as caught:
        optkit.compile(net(), options, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out.rejected"]
    assert caught.value.bundle is not None and caught.value.bundle.report["verdict"]["status"] == "missed"
    assert json.loads((tmp_path / "out.rejected/manifest.json").read_text())["verdict"] == "missed"


def test_validate_compares_a_bundle_with_its_module(bundle):
    report = optkit.validate(bundle.path, net(), recipe())
    assert report.verdict.status == "passed"
    worse = net()
    with torch.no_grad():
        worse[4].weight.neg_()
    assert optkit.validate(bundle.path, worse, recipe()).verdict.status == "missed"


def test_validate_needs_a_baseline(bundle, tmp_path: Path):
    with pytest.raises(UsageError, match="--baseline"):
        optkit.validate(bundle.path)


def test_dynamic_dimensions_are_tuned_for_the_sizes_in_the_data(tmp_path):
    class Pool(nn.Module):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return tokens.sum(1)

    (tmp_path / "rows.py").write_text(
        "import numpy as np\n"
        "def rows():\n"
        "    for i in range(40):\n"
        "        yield {'tokens': np.ones((5 + 2 * (i % 3), 4), np.float32) * i}\n"
    )
    (tmp_path / "data.yaml").write_text(
        "name: rows\nsource: {kind: python, function: 'rows.py:rows'}\n"
        "splits: {calibration: {count: 12}, validation: {count: 20}}\n"
        "inputs: {tokens: {column: tokens, transform: [{use: pad, axis: 0, size: longest, dim: time}]}}\n"
        "metric: cosine\n"
    )
    options = Recipe.load("fp32").updated(
        data=str(tmp_path / "data.yaml"), validation={**QUICK, "batch_size": 1}, threads=1, gate={"max_drop": 5.0}
    )
    bundle = optkit.compile(Pool(), options, tmp_path / "out")
    assert bundle.signature.range("time").opt == 7
    fixed = options.updated(dims={"time": [2, 9, 16]})
    assert optkit.compile(Pool(), fixed, tmp_path / "fixed").signature.range("time").opt == 9
