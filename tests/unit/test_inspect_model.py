from __future__ import annotations

import json
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from safetensors.torch import save_file

from optkit.cli import main
from optkit.errors import CheckpointError
from optkit.inspect_model import describe, inspect_path


def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.BatchNorm1d(3)).eval()


LINEAR = {"0.weight": "float32[3,4]", "0.bias": "float32[3]"}


def test_a_state_dict_lists_its_tensors_without_a_factory(tmp_path):
    torch.save({"model": net().state_dict(), "epoch": 3}, tmp_path / "m.pt")
    found = inspect_path(tmp_path / "m.pt")
    assert found["kind"] == "torch.save"
    assert found["tensors"]["model.0.weight"] == "float32[3,4]"
    assert found["dtypes"]["float32"] == {"tensors": 6, "elements": 27, "bytes": 108}
    assert found["dtypes"]["int64"]["tensors"] == 1  # num_batches_tracked


def test_safetensors_in_any_dtype(tmp_path):
    tensors = {"a": torch.zeros(2, 3, dtype=torch.bfloat16), "b": torch.zeros(4, dtype=torch.uint8), "c": torch.ones(1)}
    save_file({**tensors, "d": torch.zeros(2, dtype=torch.bool)}, tmp_path / "m.safetensors")
    found = inspect_path(tmp_path / "m.safetensors")
    assert found["kind"] == "safetensors"
    assert found["tensors"] == {"a": "bfloat16[2,3]", "b": "uint8[4]", "c": "float32[1]", "d": "bool[2]"}
    assert found["dtypes"]["bfloat16"] == {"tensors": 1, "elements": 6, "bytes": 12}


def test_an_exported_program_tells_its_signature_and_operators(tmp_path):
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(net(), (torch.randn(2, 4),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "m.pt2")
    found = inspect_path(tmp_path / "m.pt2")
    assert found["kind"] == "torch.export"
    assert list(found["inputs"].values()) == ["float32[batch,4]"]
    assert list(found["outputs"].values()) == ["float32[batch,3]"]
    assert found["dims"]["batch"][2] == 8
    assert found["operators"]["aten.linear.default"] == 1


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_torchscript(tmp_path):
    torch.jit.script(net()).save(tmp_path / "m.pt")
    found = inspect_path(tmp_path / "m.pt")
    assert found["kind"] == "torchscript"
    assert found["inputs"] == {"input": "Tensor"}
    assert found["operators"]["aten::linear"] == 1
    assert LINEAR.items() <= found["tensors"].items()


class Payload:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def test_a_pickle_that_would_run_code_is_named_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": net(), "payload": Payload()}, tmp_path / "m.pt")
    found = inspect_path(tmp_path / "m.pt")
    assert "could run code" in found["note"]
    assert "tensors" not in found
    assert not (tmp_path / "ran").exists()


def test_a_model_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    found = inspect_path(tmp_path)
    assert (found["kind"], found["model_type"], found["tensors"]) == ("huggingface", "bert", {"w": "float32[2]"})


QDQ = """g (float[batch,4] x) => (float[batch,3] y)
<float s = {0.1}, uint8 z = {100}, int8[4,3] w = {1,2,3,4,5,6,7,8,9,10,11,12}, float[3] sw = {0.1,0.2,0.3},
 int8[3] zw = {0,0,0}, float[3,3] v = {1,0,0,0,1,0,0,0,1}> {
    q = QuantizeLinear(x, s, z)
    dx = DequantizeLinear(q, s, z)
    dw = DequantizeLinear <axis = 1> (w, sw, zw)
    h = MatMul(dx, dw)
    r = Relu(h)
    y = MatMul(r, v)
}"""


def test_an_onnx_model_tells_where_it_is_quantized(onnx_model, tmp_path):
    ir.save(onnx_model(QDQ).ir, tmp_path / "m.onnx")
    found = inspect_path(tmp_path / "m.onnx")
    assert found["kind"] == "onnx"
    assert found["opsets"] == {"ai.onnx": 20}
    assert (found["inputs"], found["outputs"]) == ({"x": "float32[batch,4]"}, {"y": "float32[batch,3]"})
    assert found["operators"] == {"DequantizeLinear": 2, "MatMul": 2, "QuantizeLinear": 1, "Relu": 1}
    assert found["quantization"] == {
        "operators": {"MatMul": {"quantized": 1, "of": 2}},
        "activations": {"uint8 asymmetric per tensor": 1},
        "weights": {"int8 symmetric per channel": 1},
    }
    assert found["tensors"]["w"] == "int8[4,3]"


def test_an_onnx_model_without_quantization(onnx_model, tmp_path):
    ir.save(onnx_model("g (float[4] x) => (float[4] y) { y = Relu(x) }").ir, tmp_path / "m.onnx")
    assert inspect_path(tmp_path / "m.onnx")["quantization"] is None


def test_an_engine_is_recognised(tmp_path):
    (tmp_path / "a.plan").write_bytes(b"ftrt" + bytes(40))
    (tmp_path / "b.plan").write_bytes(b"vtrt" + bytes(40))
    assert inspect_path(tmp_path / "a.plan")["kind"] == "TensorRT engine"
    assert inspect_path(tmp_path / "b.plan")["kind"] == "TensorRT-RTX engine"


@pytest.mark.parametrize("suffix", ["pt", "pt2", "safetensors", "onnx"])
def test_a_truncated_file_is_an_error(suffix, tmp_path, onnx_model):
    file = tmp_path / f"m.{suffix}"
    if suffix == "pt2":
        torch.export.save(torch.export.export(net(), (torch.randn(2, 4),)), file)
    elif suffix == "onnx":
        ir.save(onnx_model(QDQ).ir, file)
    elif suffix == "safetensors":
        save_file(net().state_dict(), file)
    else:
        torch.save(net().state_dict(), file)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match=r"truncated or damaged"):
        inspect_path(file)


def test_a_missing_file_and_a_foreign_one(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        inspect_path(tmp_path / "m.pt")
    (tmp_path / "m.pt").write_text("hello")
    with pytest.raises(CheckpointError, match="optkit reads"):
        inspect_path(tmp_path / "m.pt")


def test_the_text_cuts_long_lists_and_json_does_not(tmp_path, capsys):
    save_file({f"layer{i}": torch.zeros(1) for i in range(20)}, tmp_path / "m.safetensors")
    assert "… and 8 more" in describe(inspect_path(tmp_path / "m.safetensors"))
    assert main(["inspect", str(tmp_path / "m.safetensors"), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["tensors"]) == 20
