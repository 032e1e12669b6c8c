from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from optkit import bundle as bundles
from optkit.bundle import Bundle
from optkit.context import Context
from optkit.errors import OutputError, UsageError
from optkit.inspect_model import inspect_path
from optkit.models import OnnxModel
from optkit.pipeline import run_passes
from optkit.recipe import Recipe
from optkit.validation import Report, Verdict

MODEL = "g (float[batch,4] x, float[batch,4] y) => (float[batch,4] z) { a = Add(x, y)  z = Relu(a) }"
RECIPE = "passes: [export_onnx, build_engine]\nname: add\n"


@pytest.fixture
def written(onnx_model: Callable[..., OnnxModel], context: Context, tmp_path: Path) -> Bundle:
    recipe = Recipe.parse(RECIPE)
    stages = run_passes(recipe.passes, onnx_model(MODEL).with_record("ranges", {"a": [0.0, 1.0]}), context)
    report = Report(Verdict("passed", ("no drop",)), REPORT)
    return bundles.write(tmp_path / "b", stages, recipe, report, {"kind": "onnx"}, None, 1)


REPORT: dict[str, object] = {"verdict": {"status": "passed", "reasons": ["no drop"]}}


@pytest.fixture(autouse=True)
def _text(monkeypatch: pytest.MonkeyPatch) -> None:
    # The text of a whole report has its own tests; here it only has to be a file
    monkeypatch.setattr(bundles, "render", lambda document: "all is well\n")


def test_holds_what_it_promises_and_loads_back(written: Bundle):
    names = {file.name for file in written.path.iterdir()}
    assert names == {
        "model.onnx",
        "model.ort.onnx",
        "recipe.yaml",
        "ranges.json",
        "report.json",
        "summary.txt",
        "manifest.json",
    }
    loaded = bundles.load(written.path)
    assert loaded.recipe == Recipe.parse(RECIPE)
    assert [spec.name for spec in loaded.signature.inputs] == ["x", "y"]
    assert json.loads((written.path / "ranges.json").read_text()) == {"a": [0.0, 1.0]}
    assert set(loaded.manifest["files"]) == names - {"manifest.json"}


def test_inspecting_it_tells_the_layers_of_its_engine(written: Bundle):
    manifest = written.path / "manifest.json"
    document = json.loads(manifest.read_text())
    layers = [
        {"name": "conv + relu", "kind": "CaskConvolution", "precision": "INT8", "nodes": ["conv", "relu"]},
        {"name": "shape", "kind": "ShapeHostToDevice", "precision": "", "nodes": []},
        {"name": "whole", "kind": "Myelin", "precision": "FP16", "nodes": ["a"], "hides": True},
    ]
    document["records"]["engine"]["inspector"] = {"precisions": {"INT8": 1, "not told": 1}, "layers": layers}
    manifest.write_text(json.dumps(document))
    told = inspect_path(written.path)
    assert told["engine_precisions"] == {"INT8": 1, "not told": 1}
    assert told["engine_layers"] == {
        "conv + relu": "INT8, CaskConvolution: conv, relu",
        "shape": "not told, ShapeHostToDevice: no node",
        "whole": "FP16 or narrower, Myelin: a",
    }


def test_runs_arrays_by_position_by_name_and_as_a_mapping(written: Bundle):
    x = np.ones((3, 4), np.float32)
    for outputs in (written(x, -2 * x), written(x, y=-2 * x), written({"x": x, "y": -2 * x})):
        np.testing.assert_array_equal(outputs["z"], np.zeros((3, 4), np.float32))
    with pytest.raises(UsageError, match=r"has 2 inputs \(x, y\), not 3"):
        written(x, x, x)


def test_takes_arrays_of_other_libraries_and_gives_what_they_take(written: Bundle):
    torch = pytest.importorskip("torch")
    x = torch.ones((3, 4), requires_grad=True)
    for y in (torch.ones((3, 4)), np.ones((3, 4), np.float32)):
        outputs = written(x, y)
        assert torch.equal(torch.from_dlpack(outputs["z"]), torch.full((3, 4), 2.0))


def test_an_array_on_a_gpu_is_refused_by_an_engine_on_the_cpu(written: Bundle):
    described = {"shape": (1, 4), "typestr": "<f4", "data": (8, False), "version": 3}
    on_gpu = SimpleNamespace(__cuda_array_interface__=described)
    with pytest.raises(UsageError, match="input 'y': it lies on a GPU, and this engine runs on the CPU"):
        written(np.ones((1, 4), np.float32), on_gpu)
    with pytest.raises(UsageError, match="input 'y': a object is no array"):
        written(np.ones((1, 4), np.float32), object())


def test_verify_accepts_what_was_written(written: Bundle):
    assert bundles.verify(written.path) == []


@pytest.mark.parametrize(
    ("file", "how", "what"),
    [
        ("model.onnx", lambda f: f.write_bytes(f.read_bytes()[:-1] + b"x"), "its SHA-256 differs"),
        ("model.ort.onnx", lambda f: f.unlink(), "model.ort.onnx is missing"),
        ("extra.bin", lambda f: f.write_bytes(b""), "extra.bin does not belong to the bundle"),
    ],
)
def test_verify_names_the_file_that_changed(written: Bundle, file, how, what):
    how(written.path / file)
    assert [what in problem.what for problem in bundles.verify(written.path)] == [True]


def test_verify_tells_of_another_runtime(written: Bundle):
    manifest = json.loads((written.path / "manifest.json").read_text())
    manifest["versions"]["onnxruntime"] = "1.0.0"
    (written.path / "manifest.json").write_text(json.dumps(manifest))
    problems = bundles.verify(written.path)
    assert len(problems) == 1 and "built by onnxruntime 1.0.0" in problems[0].what


@pytest.mark.parametrize("text", [None, "{", "[]", '{"name": 1}', '{"format_version": 99}'])
def test_what_is_not_a_bundle_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UsageError, match=r"not an optkit bundle|bundle format 99"):
        bundles.load(tmp_path)
    with pytest.raises(UsageError, match="no such bundle"):
        bundles.load(tmp_path / "none")


def test_move_replaces_a_bundle_only_when_told_to(written: Bundle, tmp_path: Path):
    there = tmp_path / "deep" / "there"
    bundles.move(written.path, there, force=False)
    assert bundles.verify(there) == [] and not written.path.exists()
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(OutputError, match="exists already"):
        bundles.move(other, there, force=False)
    (tmp_path / "plain").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        bundles.move(there, tmp_path / "plain", force=True)
    assert bundles.is_bundle(there)


def test_weights_beyond_protobuf_go_beside_the_model(onnx_model, tmp_path, monkeypatch):
    import onnx_ir as ir

    monkeypatch.setattr(bundles, "EXTERNAL_DATA_BYTES", 1000)
    text = "g (float[batch,4] x) => (float[batch,512] y) <float[4,512] w = {0}> { y = MatMul(x, w) }"
    model = onnx_model(text.replace("{0}", "{" + ",".join("1.5" for _ in range(2048)) + "}"))
    bundles.save_onnx(model, tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx.data").stat().st_size >= 8192
    back = ir.load(tmp_path / "m.onnx").graph.initializers["w"].const_value
    assert back is not None
    np.testing.assert_array_equal(back.numpy(), np.full((4, 512), 1.5, np.float32))
