"""Both commands on files: what they print, what they exit with, and what they refuse."""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir
import pytest

from optkit.cli import main
from optkit.compiler import lint
from optkit.errors import CheckpointError, UsageError
from optkit.targets.onnxruntime import OnnxRuntimeTarget

CONV = "c = Conv(d, wd) y = Exp(c) }"
WEIGHT = "wd = DequantizeLinear <axis = 0> (w, ws, wz)"
ARRAYS = {
    "s": np.float32(0.1),
    "z": np.int8(0),
    "u": np.uint8(7),
    "w": np.random.default_rng(0).integers(-63, 64, (32, 32, 3, 3)).astype(np.int8),  # no pair of them saturates
    "ws": np.full(32, 0.01, np.float32),
    "wz": np.zeros(32, np.int8),
}


@pytest.fixture
def convolution(net, tmp_path):
    """A quantized convolution as a file, whose activation has the zero point ``z`` (0) or ``u`` (7)."""

    def make(zero_point):
        text = (
            f"g (float[n,32,8,8] x) => (float[n,32,6,6] y) {{ q = QuantizeLinear(x, s, {zero_point}) "
            f"d = DequantizeLinear(q, s, {zero_point}) {WEIGHT} {CONV}"
        )
        file = tmp_path / f"{zero_point}.onnx"
        used = {name: array for name, array in ARRAYS.items() if name not in ("z", "u") or name == zero_point}
        ir.save(net(text, **used).ir, file)
        return file

    return make


def test_lint_names_rule_node_fault_and_mend(convolution, capsys):
    file = convolution("u")
    assert main(["lint", str(file), "--target", "tensorrt"]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "E1  QuantizeLinear_0: uint8 with zero point 7, but the target takes symmetric INT8 only"
    )  # the file names no node
    assert lines[1] == "    > quantize for this target"
    assert lines[-1] == f"{file} for tensorrt: errors: 2, warnings: 0"


def test_lint_exits_with_0_where_there_are_only_warnings(convolution, capsys):
    file = convolution("u")
    assert main(["lint", str(file), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["target"] == "onnxruntime"
    (finding,) = document["findings"]
    assert (finding["rule"], finding["node"]) == ("W9", "Conv_3")
    assert finding["mend"]


def test_lint_has_nothing_to_say_of_a_sound_model(convolution, capsys):
    file = convolution("z")
    assert main(["lint", str(file), "--target", "tensorrt"]) == 0
    assert capsys.readouterr().out == f"{file} for tensorrt: errors: 0, warnings: 0\n"


def test_lint_refuses_what_it_cannot_judge(residual, convolution, tmp_path):
    here = OnnxRuntimeTarget()
    ir.save(residual.ir, tmp_path / "float.onnx")
    with pytest.raises(UsageError, match="nothing in it is quantized"):
        lint(tmp_path / "float.onnx", here)
    whole = convolution("z").read_bytes()
    (tmp_path / "cut.onnx").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        lint(tmp_path / "cut.onnx", here)
    np.savez(tmp_path / "other.onnx", a=np.zeros(3))
    with pytest.raises(CheckpointError, match=r"other\.onnx"):
        lint(tmp_path / "other.onnx", here)


def test_lint_misses_weights_that_are_not_beside_the_file(convolution, tmp_path):
    file = convolution("z")
    ir.save(ir.load(file), tmp_path / "split.onnx", external_data="split.data", size_threshold_bytes=8)
    assert lint(tmp_path / "split.onnx", OnnxRuntimeTarget())
    (tmp_path / "split.data").unlink()
    with pytest.raises(CheckpointError, match=r"split\.data"):
        lint(tmp_path / "split.onnx", OnnxRuntimeTarget())


@pytest.fixture
def images_spec(tmp_path, residual):
    """A model and the data spec of 96 images for it, as files."""
    images = np.random.default_rng(6).standard_normal((96, 3, 16, 16)).astype("f")
    np.savez(tmp_path / "images.npz", image=images)
    spec = tmp_path / "images.yaml"
    spec.write_text(
        "version: 1\nsource: {kind: npz, path: images.npz}\ninputs: {image: image}\n"
        "splits: {calibration: {count: 64}, validation: {count: 32}}\n"
    )
    for index, node in enumerate(residual.ir.graph):
        node.name = f"layer{index}"
    ir.save(residual.ir, tmp_path / "net.onnx")
    return tmp_path / "net.onnx", spec


def test_sensitivity_prints_a_ranking_by_the_names_of_the_file(images_spec, tmp_path, capsys):
    model, spec = images_spec
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("passes: [{use: quantize_int8, calibrate: {method: max}}, build_engine]\nthreads: 1\n")
    arguments = ["sensitivity", str(model), "--data", str(spec), "--recipe", str(recipe), "--target", "tensorrt"]
    assert main(arguments) == 0
    header, *rows, total = capsys.readouterr().out.splitlines()
    assert header.split() == ["SQNR", "dB", "noise", "MACs", "op", "layer"]
    alone = [float(row.split()[0]) for row in rows]
    assert alone == sorted(alone)
    assert {row.split()[-1] for row in rows} == {"layer0", "layer2", "layer4", "layer7", "layer9", "layer10"}
    assert "16 samples, for tensorrt" in total
    assert sum(float(row.split()[2].rstrip("%")) for row in rows) == pytest.approx(100, abs=0.5)


def test_sensitivity_takes_the_built_in_recipe_and_answers_in_json(images_spec, capsys):
    model, spec = images_spec
    assert main(["sensitivity", str(model), "--data", str(spec), "--samples", "40", "--threads", "1", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["target"] == "onnxruntime"
    assert len(document["nodes"]) == 7
    assert sum(node["noise"] for node in document["nodes"]) == pytest.approx(1)


def test_sensitivity_needs_data_and_a_float_model(images_spec, convolution, capsys):
    model, spec = images_spec
    assert main(["sensitivity", str(model)]) == 5
    assert "needs data" in capsys.readouterr().err
    assert main(["sensitivity", str(convolution("z")), "--data", str(spec), "--input", "x=float32[n,32,8,8]"]) == 5
    assert "already quantized" in capsys.readouterr().err
