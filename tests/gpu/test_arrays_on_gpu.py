from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from optkit import bundle as bundles
from optkit.bundle import Bundle
from optkit.models import DimRange
from optkit.pipeline import run_passes
from optkit.recipe import Recipe
from optkit.targets.arrays import as_numpy, lies_on_gpu
from optkit.validation import Report, Verdict

ROOT = Path(__file__).resolve().parents[2]

X = np.random.default_rng(0).standard_normal((4, 16)).astype(np.float32)


@pytest.fixture
def bundle(onnx_model, context, tmp_path) -> Bundle:
    model = onnx_model("g (float[batch,16] x) => (float[batch,16] y) { a = Relu(x)  y = Add(a, x) }")
    model = replace(model, signature=replace(model.signature, dims={"batch": DimRange(1, 4, 8)}))
    recipe = Recipe.parse("passes: [build_engine]\nname: add\nthreads: 1\n").updated(target="tensorrt")
    stages = run_passes(recipe.passes, model, replace(context, target=recipe.target))
    report = Report(Verdict("passed", ("no drop",)), {"verdict": {"status": "passed", "reasons": ["no drop"]}})
    return bundles.write(tmp_path / "b", stages, recipe, report, {"kind": "onnx"}, None, 1)


def test_a_bundle_takes_tensors_on_the_gpu(bundle):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    wanted = bundle(X)["y"]
    tensor = torch.from_numpy(X).cuda().requires_grad_()
    assert lies_on_gpu(tensor)
    np.testing.assert_array_equal(bundle(tensor)["y"], wanted)
    np.testing.assert_array_equal(torch.as_tensor(bundle(tensor)["y"], device="cuda").cpu().numpy(), wanted)
    with torch.cuda.stream(torch.cuda.Stream()):  # one that the default stream does not wait for
        busy = torch.ones((4096, 4096), device="cuda")
        for _ in range(20):
            busy = busy @ busy / 4096
        late = torch.from_numpy(X).cuda() + 0 * busy[0, 0]
        np.testing.assert_array_equal(as_numpy(late, "x"), X)


@pytest.fixture
def driver():
    """PyCUDA's driver with a context of its own, which no later test must find current."""
    driver = pytest.importorskip("pycuda.driver")
    driver.init()
    context = driver.Device(0).make_context()
    yield driver
    context.pop()
    context.detach()


def test_takes_pycudas_arrays_and_leaves_its_context_current(bundle, driver):
    gpuarray = pytest.importorskip("pycuda.gpuarray")
    before = driver.Context.get_current()
    np.testing.assert_array_equal(bundle(gpuarray.to_gpu(X))["y"], bundle(X)["y"])
    assert driver.Context.get_current() == before
    assert gpuarray.to_gpu(X).get().shape == X.shape


def test_the_example_with_pycuda_runs(bundle):
    pytest.importorskip("pycuda")
    example = runpy.run_path(str(ROOT / "examples/pycuda_gpuarray.py"))
    assert list(example["run"](str(bundle.path))) == ["y"]


def test_a_plan_for_another_gpu_is_built_again(bundle):
    import json

    from optkit.bundle import verify
    from optkit.rebuild import rebuild

    manifest = json.loads((bundle.path / "manifest.json").read_text())
    manifest["records"]["engine"].update(gpu="NVIDIA A100", compute_capability="8.0")
    (bundle.path / "manifest.json").write_text(json.dumps(manifest))
    (problem,) = verify(bundle.path)
    assert "it was built for NVIDIA A100 (compute capability 8.0), not" in problem.what and problem.exit_code == 4
    assert verify(rebuild(bundle.path).path) == []
