"""ONNX in, from files and from memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from checkpoints import recipe, truncated

from optkit.errors import CheckpointError
from optkit.models import DimRange, OnnxModel
from optkit.source import load_model

ONNX = (
    '<ir_version: 10, opset_import: ["": 20]> g (float[N,4] x) => (float[N,M] y) <float[4,2] w = {%s}> {y=MatMul(x,w)}'
)
ONNX_TEXT_TYPE = '<ir_version: 10, opset_import: ["": 20]> g (string[N] x) => (string[N] y) {y=Identity(x)}'


def onnx_text(weights: str = "1,2,3,4,5,6,7,8") -> onnx.ModelProto:
    return onnx.parser.parse_model(ONNX % weights)


def test_onnx_file(tmp_path: Path) -> None:
    path = tmp_path / "misleading.pt"
    onnx.save(onnx_text(), path)
    result = load_model(path, recipe(None))
    assert isinstance(result.model, OnnxModel) and result.provenance["kind"] == "onnx"
    assert str(result.model.signature.inputs[0]) == "float32[N,4]"
    assert str(result.model.signature.outputs[0]) in ("float32[N,2]", "float32[N,M]")
    changed = load_model(path, recipe(None, inputs={"x": "float32[batch,4]"}, dims={"batch": [1, 2, 8]})).model
    assert isinstance(changed, OnnxModel)
    assert changed.signature.inputs[0].shape == ("batch", 4) and changed.signature.dims == {"batch": DimRange(1, 2, 8)}
    assert changed.signature.outputs[0].shape[0] == "batch"
    assert ir.to_proto(changed.ir).graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    fixed = load_model(path, recipe(None, dims={"N": 3})).model
    assert fixed.signature.inputs[0].shape == (3, 4) and fixed.signature.outputs[0].shape[0] == 3


def test_onnx_without_names_for_its_dimensions(tmp_path: Path) -> None:
    onnx.save(onnx.parser.parse_model(ONNX.replace("[N", "[?") % "1,2,3,4,5,6,7,8"), tmp_path / "m")
    model = load_model(tmp_path / "m", recipe(None)).model
    assert model.signature.inputs[0].shape == ("batch", 4)
    assert str(model.ir.graph.inputs[0].shape[0]) == "batch"  # type: ignore[union-attr, index]


def test_onnx_with_external_data(tmp_path: Path) -> None:
    proto = onnx_text()
    weights = np.arange(8, dtype=np.float32).reshape(4, 2)
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weights, "w"))
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    result = load_model(tmp_path / "m.onnx", recipe(None))
    assert list(result.provenance["external_data"]) == ["m.data"]
    assert isinstance(result.model, OnnxModel)
    tensor = result.model.ir.graph.initializers["w"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    np.testing.assert_array_equal(tensor.numpy(), weights)
    truncated(tmp_path / "m.data")
    with pytest.raises(CheckpointError, match=r"m.onnx"):
        load_model(tmp_path / "m.onnx", recipe(None))
    (tmp_path / "m.data").unlink()
    with pytest.raises(CheckpointError, match=r"m.data, which is not beside it"):
        load_model(tmp_path / "m.onnx", recipe(None))


def test_truncated_and_invalid_onnx(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    size = len(onnx_text().SerializeToString())
    for keep in range(2, size, 7):
        onnx.save(onnx_text(), path)
        with pytest.raises(CheckpointError, match=r"m.onnx"):
            load_model(truncated(path, keep), recipe(None))
    proto = onnx_text()
    proto.graph.node[0].op_type = "MatMull"
    onnx.save(proto, path)
    with pytest.raises(CheckpointError, match=r"not a valid ONNX model.*MatMull"):
        load_model(path, recipe(None))


def test_onnx_with_a_type_that_optkit_lacks() -> None:
    model = ir.from_proto(onnx.parser.parse_model(ONNX_TEXT_TYPE))
    with pytest.raises(CheckpointError, match="input 'x' is string"):
        load_model(model, recipe(None))


def test_onnx_with_nan(tmp_path: Path) -> None:
    proto = onnx_text()
    weights = onnx.numpy_helper.to_array(proto.graph.initializer[0]).copy()
    weights[1, 1] = np.nan
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weights, "w"))
    onnx.save(proto, tmp_path / "m.onnx")
    for source in (tmp_path / "m.onnx", ir.from_proto(proto)):
        with pytest.raises(CheckpointError, match=r"NaN in 1 weight\(s\): w"):
            load_model(source, recipe(None))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float", "double", "int8", "bool"])
def test_onnx_types(dtype: str, onnx_model: Callable[..., OnnxModel]) -> None:
    text = f"g ({dtype}[N,4] x) => ({dtype}[N,4] y) {{ y = Identity(x) }}"
    model = load_model(onnx_model(text).ir, recipe(None)).model
    assert model.signature.inputs[0].dtype == {"float": "float32", "double": "float64"}.get(dtype, dtype)


def test_onnx_in_memory_is_never_changed(onnx_model: Callable[..., OnnxModel]) -> None:
    model = onnx_model("g (float[N,4] x) => (float[N,4] y) { y = Relu(x) }")
    before = ir.to_proto(model.ir).SerializeToString()
    assert load_model(model, recipe(None)).model is model
    for source in (model, model.ir):
        renamed = load_model(source, recipe(None, inputs={"x": "float32[batch,4]"})).model
        assert renamed.signature.outputs[0].shape == ("batch", 4)
    assert ir.to_proto(model.ir).SerializeToString() == before
