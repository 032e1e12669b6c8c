from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from optkit.context import Context
from optkit.emulation import halves_in_float32
from optkit.errors import PreconditionError
from optkit.passes.cast_bf16 import CastBf16
from optkit.targets.onnxruntime import open_onnx
from optkit.targets.tensorrt_rtx import TensorRtRtxTarget

CONV = """g (float[n,1,4,4] x) => (float[n,1,4,4] y) <float[1,1,1,1] w = {1.25}, float big = {1e30}> {
    c = Conv<kernel_shape = [1, 1]>(x, w) b = Mul(c, big) y = Relu(b) }"""


@pytest.fixture
def rtx(context: Context) -> Context:
    return replace(context, target=TensorRtRtxTarget())


def test_everything_fits_the_range_of_bf16(onnx_model: Any, rtx: Context) -> None:
    model, step = onnx_model(CONV, opset=22), CastBf16()
    step.requires(model, rtx)
    after = step.run(model, rtx)
    assert [node.op_type for node in after.ir.graph] == ["Cast", "Conv", "Mul", "Relu", "Cast"]
    assert {value.dtype for value in after.ir.graph.initializers.values()} == {ir.DataType.BFLOAT16}
    assert after.records["kept_float32"] == {}
    step.ensures(model, after, rtx)
    assert step.run(after, rtx) is after


def test_the_emulation_rounds_as_bf16_does(onnx_model: Any, rtx: Context) -> None:
    step = CastBf16()
    after = step.run(onnx_model("g (float[1] x) => (float[1] y) { y = Relu(x) }", opset=22), rtx)
    with open_onnx(halves_in_float32(after)) as runner:
        assert runner.run({"x": np.array([1.001], np.float32)})["y"] == [1.0]


def test_onnx_runtime_has_no_kernels(onnx_model: Any, context: Context) -> None:
    with pytest.raises(PreconditionError, match="the target 'onnxruntime' has no BF16 kernels: use cast_fp16"):
        CastBf16().requires(onnx_model(CONV, opset=22), context)


def test_convolutions_need_opset_22(onnx_model: Any, rtx: Context) -> None:
    with pytest.raises(PreconditionError, match="Conv takes no BF16 at opset 20: export with `opset: 22`"):
        CastBf16().requires(onnx_model(CONV), rtx)
