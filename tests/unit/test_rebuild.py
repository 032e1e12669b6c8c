from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optkit import bundle as bundles
from optkit import rebuild as rebuilding
from optkit.bundle import Bundle, verify
from optkit.cli import main
from optkit.errors import BuildError, UnavailableError, UsageError
from optkit.models import Engine, OnnxModel
from optkit.numerics import compare
from optkit.pipeline import run_passes
from optkit.rebuild import rebuild
from optkit.recipe import Recipe
from optkit.targets import cuda, onnxruntime
from optkit.targets.cpu import Cpu
from optkit.targets.onnxruntime import open_onnx
from optkit.targets.tensorrt import TensorRtTarget
from optkit.targets.tensorrt_rtx import TensorRtRtxTarget
from optkit.targets.worker_client import PYTHON_VARIABLE
from optkit.validation import Report, Verdict

ADD = "g (float[batch,4] x, float[batch,4] y) => (float[batch,4] z) { a = Add(x, y)  z = Relu(a) }"
PRODUCT = """
g (float[batch,256] x, int8[256,64] w, float[64] ws) => (float[batch,64] z) <float s = {0.02}, uint8 p = {128}> {
    q = QuantizeLinear(x, s, p)
    d = DequantizeLinear(q, s, p)
    e = DequantizeLinear<axis=1>(w, ws)
    [product] z = MatMul(d, e)
}
"""
RTX = TensorRtRtxTarget()

VNNI, AVX2 = Cpu("a processor with VNNI", ("avx2", "avx512_vnni")), Cpu("an older one", ("avx2",))


@pytest.fixture
def write(context, tmp_path) -> Callable[..., Bundle]:
    """Write a bundle of a model for a target, as a run does."""

    def made(model: OnnxModel, target: Any = "onnxruntime") -> Bundle:
        recipe = Recipe.parse("passes: [build_engine]\nname: test\nthreads: 1\n").updated(target=target)
        stages = run_passes(recipe.passes, model, replace(context, target=recipe.target))
        report = Report(Verdict("passed", ("no drop",)), {"verdict": {"status": "passed", "reasons": ["no drop"]}})
        return bundles.write(tmp_path / "b", stages, recipe, report, {"kind": "onnx"}, None, 1)

    return made


@pytest.fixture
def written(write, onnx_model) -> Bundle:
    return write(onnx_model(ADD))


def edit(bundle: Bundle, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest, as if the bundle came from elsewhere."""
    manifest = json.loads((bundle.path / "manifest.json").read_text())
    change(manifest)
    (bundle.path / "manifest.json").write_text(json.dumps(manifest))


def of_another_version(manifest: dict[str, Any]) -> None:
    manifest["versions"]["onnxruntime"] = "1.0.0"


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_builds_an_engine_of_another_version_again(written):
    edit(written, of_another_version)
    before = content(written.path)
    (problem,) = verify(written.path)
    assert "built by onnxruntime 1.0.0" in problem.what and "--rebuild" in problem.mend and problem.changes == {}
    bundle = rebuild(written.path)
    assert verify(bundle.path) == []
    assert bundle.manifest["versions"]["onnxruntime"] != "1.0.0"
    assert {name: bundle.manifest["versions"][name] for name in ("optkit", "torch")} == {
        name: written.manifest["versions"][name] for name in ("optkit", "torch")
    }
    (former,) = bundle.manifest["rebuilt"]
    assert former["versions"] == {"onnxruntime": "1.0.0"} and former["why"] == [problem.what]
    assert former["engine"]["cpu"]["name"] == written.manifest["records"]["engine"]["cpu"]["name"]
    after = content(written.path)
    assert {name for name in before if before[name] != after[name]} <= {"manifest.json", "model.ort.onnx"}
    assert [path.name for path in written.path.parent.iterdir() if path.name != "scratch"] == ["b"]
    x = np.ones((2, 4), np.float32)
    np.testing.assert_array_equal(bundle(x, x)["z"], 2 * x)


def test_remembers_every_engine_that_was_replaced(written):
    for count in (1, 2):
        edit(written, of_another_version)
        assert len(rebuild(written.path).manifest["rebuilt"]) == count


def test_leaves_a_bundle_that_fits_as_it_is(written):
    before = content(written.path)
    rebuild(written.path)
    assert content(written.path) == before


@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(file.read_bytes()[:100]), Path.unlink])
def test_builds_a_damaged_engine_again(written, damage):
    damage(written.path / "model.ort.onnx")
    assert verify(written.path)[0].changes == {}
    assert verify(rebuild(written.path).path) == []


def test_refuses_what_no_build_mends(written):
    with (written.path / "model.onnx").open("ab") as file:
        file.write(b"x")
    (written.path / "model.ort.onnx").unlink()
    before = content(written.path)
    with pytest.raises(UsageError, match=r"does not mend it: model.onnx is not the file .*; compile it again"):
        rebuild(written.path)
    assert content(written.path) == before


def test_a_failed_build_leaves_the_old_engine(write, onnx_model, monkeypatch, tmp_path):
    if not RTX.can_build().ok:
        pytest.skip(RTX.can_build().reason)
    bundle = write(onnx_model(ADD.replace("batch", "2")), "tensorrt-rtx")
    (bundle.path / "engine.plan").write_bytes(b"truncated")
    before = content(bundle.path)
    monkeypatch.setenv(PYTHON_VARIABLE, str(tmp_path / "missing"))
    with pytest.raises(UnavailableError, match="cannot be started"):
        rebuild(bundle.path)
    assert content(bundle.path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "scratch"]


def test_builds_a_plan_of_another_tensorrt_again(write, onnx_model, capsys):
    if not RTX.can_build().ok:
        pytest.skip(RTX.can_build().reason)
    bundle = write(onnx_model(ADD.replace("batch", "2")), "tensorrt-rtx")
    edit(bundle, lambda manifest: manifest["versions"].update({"tensorrt-rtx": "1.0.0.1"}))
    assert main(["verify", str(bundle.path)]) == 2
    assert "built by tensorrt-rtx 1.0.0.1" in capsys.readouterr().err
    code = main(["verify", str(bundle.path), "--rebuild"])
    captured = capsys.readouterr()
    assert "its engine was built again here" in captured.out
    assert bundles.load(bundle.path).manifest["versions"]["tensorrt-rtx"] == RTX.versions()["tensorrt-rtx"]
    if not RTX.can_run().ok:
        assert code == 4 and RTX.can_run().mend in captured.err
    assert main(["verify", str(bundle.path), "--rebuild", "--json"]) == code
    assert json.loads(capsys.readouterr().out)["rebuilt"] is False  # it fits, as far as this machine can tell


def test_builds_an_engine_for_another_kind_of_processor_again(written):
    def elsewhere(manifest: dict[str, Any]) -> None:
        manifest["records"]["engine"].update(cpu={"name": "another", "features": ["sve"]}, portable=False)

    edit(written, elsewhere)
    (problem,) = verify(written.path)
    assert "its weights were laid out for processors with" in problem.what and problem.exit_code == 4
    bundle = rebuild(written.path)
    assert verify(bundle.path) == []
    assert bundle.manifest["records"]["engine"]["cpu"]["name"] != "another"


@pytest.fixture
def overflowing(onnx_model) -> OnnxModel:
    """A product whose weights fill all eight bits, so that neighbours overflow where they are added in 16."""
    rng = np.random.default_rng(0)
    arrays = {"w": rng.integers(90, 128, (256, 64)).astype(np.int8), "ws": np.full(64, 0.01, np.float32)}
    made: OnnxModel = onnx_model(PRODUCT, weights=arrays)
    return made


@pytest.mark.parametrize(
    ("built_on", "here", "fits"), [(VNNI, AVX2, False), (AVX2, AVX2, True), (VNNI, VNNI, True), (AVX2, VNNI, True)]
)
def test_int8_made_for_exact_sums_gets_them(write, overflowing, monkeypatch, built_on, here, fits):
    bundle = write(overflowing)

    def elsewhere(manifest: dict[str, Any]) -> None:
        record = {"name": built_on.name, "features": list(built_on.features)}
        manifest["records"]["engine"].update(cpu=record, portable=True)

    edit(bundle, elsewhere)
    for module in (bundles, onnxruntime):
        monkeypatch.setattr(module, "this_cpu", lambda: here)
    problems = verify(bundle.path)
    assert (problems == []) is fits
    if fits:
        return
    assert "INT8 weights of 'product' were made for a processor with VNNI" in problems[0].what
    assert problems[0].changes == {"exact_int8": True}
    again = rebuild(bundle.path)
    assert verify(again.path) == []
    assert again.recipe.target.exact_int8
    feeds = {"x": np.random.default_rng(1).uniform(1, 2.5, (4, 256)).astype(np.float32)}  # every sum would overflow
    with open_onnx(overflowing, optimize=False) as reference:
        assert compare(reference.run(feeds), again(feeds)).sqnr_db > 60


def test_an_engine_that_computes_something_else_is_refused(write, onnx_model, context):
    bundle = write(onnx_model(ADD))
    other = onnx_model(ADD.replace("Add", "Sub"))
    engine = Engine(bundle.engine.path, "onnxruntime", other.signature)
    with pytest.raises(BuildError, match=r"differs from its float32 ONNX model .*was not taken"):
        rebuilding._compare(engine, other, bundle.recipe.target, context)
    rebuilding._compare(engine, onnx_model(ADD), bundle.recipe.target, context)


def test_a_bundle_that_cannot_be_replaced_says_so(written, monkeypatch):
    edit(written, of_another_version)
    before = content(written.path)

    def full(*given: Any, **named: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copytree", full)
    with pytest.raises(UsageError, match="cannot be replaced: No space left on device; make room"):
        rebuild(written.path)
    assert content(written.path) == before


# Which machine a plan is for


H100 = cuda.Gpu("NVIDIA H100", "9.0", 80 << 30)
H200 = cuda.Gpu("NVIDIA H200", "9.0", 140 << 30)
A100 = cuda.Gpu("NVIDIA A100", "8.0", 80 << 30)
T4 = cuda.Gpu("Tesla T4", "7.5", 16 << 30)
L4 = cuda.Gpu("NVIDIA L4", "8.9", 24 << 30)


def engine(model: OnnxModel, **records: Any) -> Engine:
    return Engine(Path("engine.plan"), "tensorrt", model.signature, records)


@pytest.mark.parametrize(
    ("compatibility", "here", "fits"),
    [
        (None, (H100,), True),
        (None, (), True),  # what cannot run here at all is told by `can_run`
        (None, (H200,), False),
        (None, (A100,), False),
        ("same_compute_capability", (H200,), True),
        ("same_compute_capability", (A100,), False),
        ("ampere_plus", (A100,), True),
        ("ampere_plus", (T4,), False),
    ],
)
def test_a_plan_belongs_to_its_kind_of_gpu(onnx_model, monkeypatch, compatibility, here, fits):
    monkeypatch.setattr(cuda, "detect", lambda: cuda.Cuda("13.0", here))
    built = engine(onnx_model(ADD), gpu=H100.name, compute_capability=H100.capability)
    misfit = TensorRtTarget(hardware_compatibility=compatibility).misfit(built)
    assert (misfit is None) is fits
    if misfit is not None:
        assert misfit.changes == {}
        assert "built for NVIDIA H100 (compute capability 9.0), not " + here[0].name in misfit.what


@pytest.mark.parametrize(
    ("capabilities", "here", "changes"),
    [
        ((), (A100,), None),
        ((), (T4,), {"compute_capabilities": ["7.5"]}),
        (("8.6",), (L4,), {"compute_capabilities": ["8.6", "8.9"]}),
        (("8.6", "8.9"), (L4,), None),
        (("8.6",), (H100,), None),  # TensorRT-RTX has no kernels for it: `can_run` says so
        (("8.6",), (), None),
    ],
)
def test_a_plan_of_rtx_has_kernels_for_chosen_capabilities(onnx_model, monkeypatch, capabilities, here, changes):
    monkeypatch.setattr(cuda, "detect", lambda: cuda.Cuda("13.0", here))
    target = TensorRtRtxTarget(compute_capabilities=capabilities)
    misfit = target.misfit(engine(onnx_model(ADD), compute_capabilities="8.6"))
    assert (misfit.changes if misfit else None) == changes
    if misfit is not None:
        TensorRtRtxTarget(**misfit.changes)
