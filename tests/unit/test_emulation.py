from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from optkit.emulation import halves_in_float32
from optkit.models import OnnxModel
from optkit.passes.graph_edit import infer_types
from optkit.targets.onnxruntime import open_onnx

BF16 = """g (float[2,3] x) => (float[2,3] y) <float[3] w = {1.5, 2.5, 3.5}> {
    a = Cast<to = 16>(x) b = Mul(a, w) c = Sigmoid(b) y = Cast<to = 1>(c) }"""


@pytest.fixture
def model(onnx_model: Any) -> OnnxModel:
    made: OnnxModel = onnx_model(BF16)
    weight = made.ir.graph.initializers["w"]
    assert weight.const_value is not None
    weight.const_value = ir.tensor(bf16(weight.const_value.numpy()), name="w")
    weight.type = ir.TensorType(ir.DataType.BFLOAT16)
    infer_types(made.ir)
    return made


def bf16(array: Any) -> Any:
    return array.astype(ml_dtypes.bfloat16)


def test_every_result_is_rounded(model: OnnxModel) -> None:
    x = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
    weight = model.ir.graph.initializers["w"].const_value
    assert weight is not None
    w = weight.numpy().astype(np.float32)
    product = bf16(bf16(x).astype(np.float32) * w).astype(np.float32)
    wanted = bf16(1 / (1 + np.exp(-product))).astype(np.float32)
    for optimize in (False, True):
        with open_onnx(halves_in_float32(model), optimize=optimize) as runner:
            np.testing.assert_array_equal(runner.run({"x": x})["y"], wanted)


def test_the_model_is_not_changed_and_without_bf16_it_comes_back(model: OnnxModel, onnx_model: Any) -> None:
    before = str(model.ir)
    halves_in_float32(model)
    assert str(model.ir) == before
    plain = onnx_model("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    assert halves_in_float32(plain) is plain


def test_fp16_overflows_as_it_does_on_real_kernels(onnx_model: Any) -> None:
    model = onnx_model(
        "g (float[1] x) => (float[1] y) { a = Cast<to = 10>(x) b = Mul(a, a) c = Neg(b) y = Cast<to = 1>(c) }"
    )
    infer_types(model.ir)
    feeds = {"x": np.array([300.0], np.float32)}
    for optimize in (False, True):
        with open_onnx(halves_in_float32(model), optimize=optimize) as runner:
            assert runner.run(feeds)["y"] == [-np.inf]
