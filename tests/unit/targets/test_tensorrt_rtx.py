from __future__ import annotations

import os
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from pydantic import ValidationError

from optkit.errors import BuildError, UnavailableError
from optkit.models import DimRange, Engine, OnnxModel
from optkit.passes.build_engine import BuildEngine
from optkit.passes.cast_bf16 import CastBf16
from optkit.passes.cast_fp16 import CastFp16
from optkit.targets import cuda
from optkit.targets.onnxruntime import open_onnx
from optkit.targets.tensorrt_plan import PLAN_FILE, profile
from optkit.targets.tensorrt_rtx import TensorRtRtxTarget
from optkit.targets.worker_client import PYTHON_VARIABLE

TARGET = TensorRtRtxTarget()

pytestmark = pytest.mark.skipif(not TARGET.can_build().ok, reason=f"{TARGET.can_build().reason}")

CONV = """
g ({float}[N,16,8,8] x, {float}[16,16,3,3] w) => ({float}[N,16,8,8] y) {{
    c = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w)
    y = Relu(c)
}}
"""
QDQ = """
g (float[N,16,8,8] x, int8[16,16,3,3] w, float[16] ws) => (float[N,16,8,8] y) <float xs = {0.02}, int8 z = {ZERO}> {
    q = QuantizeLinear(x, xs, z)
    d = DequantizeLinear(q, xs, z)
    e = DequantizeLinear<axis=0>(w, ws)
    c = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(d, e)
    y = Relu(c)
}
"""
PRODUCT = """
g (float[N,16,64] x, int8[64,64] w, float[64] ws, int8[64] wz) => (float[N,16,64] y) <float xs = {0.02}, int8 z = {0}> {
    q = QuantizeLinear(x, xs, z)
    d = DequantizeLinear(q, xs, z)
    e = DequantizeLinear<axis=1>(w, ws, wz)
    y = MatMul(d, e)
}
"""
ATTENTION = """
g ({float}[1,4,16,64] q, {float}[1,4,16,64] k, {float}[1,4,16,64] v) => ({float}[1,4,16,64] y) {{
    y = Attention(q, k, v)
}}
"""


def batched(model: OnnxModel) -> OnnxModel:
    """Let the batch reach from 1 to 32."""
    return replace(model, signature=replace(model.signature, dims={"N": DimRange(1, 8, 32)}))


@pytest.fixture
def conv(onnx_model):
    def make(kind: str = "float") -> OnnxModel:
        weights = np.random.default_rng(0).standard_normal((16, 16, 3, 3))
        weights = weights.astype(f"{kind}32" if kind == "float" else kind)
        return batched(onnx_model(CONV.format(float=kind), weights={"w": weights}))

    return make


@pytest.fixture
def qdq(onnx_model):
    def make(zero_point: int = 0) -> OnnxModel:
        weights = np.random.default_rng(0).integers(-127, 128, (16, 16, 3, 3), np.int8)
        text = QDQ.replace("ZERO", str(zero_point))
        return batched(onnx_model(text, weights={"w": weights, "ws": np.full(16, 0.01, np.float32)}))

    return make


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "engine"
    path.mkdir()
    return path


class Samples(CalibrationDataReader):
    """What ONNX Runtime's quantizer calibrates with."""

    def __init__(self, batches):
        self._batches = iter(batches)

    def get_next(self):
        batch = next(self._batches, None)
        return None if batch is None else {"x": batch}


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_builds_float32(conv, folder, context):
    model = conv()
    engine = TARGET.build(model, folder, context)
    assert files(folder) == [PLAN_FILE]
    assert engine.path == folder / PLAN_FILE
    assert engine.records["bytes"] == engine.path.stat().st_size > 10_000
    assert engine.records["compute_capabilities"] == "8.0 and later"
    assert engine.records["tensors"] == [
        {"name": "x", "mode": "input", "dtype": "FLOAT", "shape": [-1, 16, 8, 8]},
        {"name": "y", "mode": "output", "dtype": "FLOAT", "shape": [-1, 16, 8, 8]},
    ]
    assert engine.records["seconds"]["build"] > 0
    # The weights went out to a file for the build; the model still has them
    assert open_onnx(model).run(model.signature.random_feeds(np.random.default_rng(0)))["y"].shape == (8, 16, 8, 8)


@pytest.mark.parametrize(("kind", "dtype"), [("float16", "HALF"), ("bfloat16", "BF16")])
def test_builds_the_precision_that_the_graph_says(conv, folder, context, kind, dtype):
    types = TARGET.build(conv(kind), folder, context).records["network"]["types"]
    assert types.get(dtype, 0) >= 2
    assert "FLOAT" not in types


def test_builds_int8(qdq, folder, context):
    engine = TARGET.build(qdq(), folder, context)
    assert engine.records["network"]["types"]["INT8"] >= 2


def test_builds_int8_whose_weights_have_a_channel_too_small_for_fp16(onnx_model, folder, context):
    """With one scale of the product in float32 and one in FP16, Myelin gives up on their types."""
    scales = np.full(64, 0.01, np.float32)
    scales[3] = 1e-5
    weights = np.random.default_rng(0).integers(-127, 128, (64, 64), np.int8)
    values = {"w": weights, "ws": scales, "wz": np.zeros(64, np.int8)}
    half = CastFp16().run(batched(onnx_model(PRODUCT, weights=values)), replace(context, target=TARGET))
    assert TARGET.build(half, folder, context).records["network"]["types"]["INT8"] >= 2


@pytest.mark.parametrize(("op", "kind"), sorted(TARGET.dialect.lacks_in))
def test_builds_in_float32_what_it_lacks_in_another_type(onnx_model, folder, context, op, kind):
    weights = {"ConvTranspose": {"w": (16, 16, 3, 3)}, "GRU": {"w": (1, 24, 8), "r": (1, 24, 8)}}.get(op, {})
    inputs = "".join(f", float{list(shape)} {name}" for name, shape in weights.items())
    call = f"{op}<hidden_size=8>" if op == "GRU" else op
    rng = np.random.default_rng(0)
    model = onnx_model(
        f"""g (float[4,16,8{"" if op == "GRU" else ",8"}] x{inputs}) => (float[4,C,D,E] y) {{
            a = {call}({", ".join(("x", *weights))}) b = Relu(a) y = Sigmoid(b) }}""",
        opset=22,
        weights={name: rng.standard_normal(shape).astype(np.float32) for name, shape in weights.items()},
    )
    cast = CastFp16(keep_ops=()) if kind == "float16" else CastBf16(keep_ops=())
    lowered = cast.run(model, replace(context, target=TARGET))
    assert set(lowered.records["kept_float32"].values()) == {f"tensorrt-rtx has no {op} in {kind}"}
    types = TARGET.build(lowered, folder, context).records["network"]["types"]
    assert types["HALF" if kind == "float16" else "BF16"] >= 2  # what follows it


def test_builds_for_chosen_capabilities(conv, folder, context):
    one, two = (folder / name for name in ("one", "two"))
    one.mkdir()
    two.mkdir()
    small = TensorRtRtxTarget(compute_capabilities=("8.6",), workspace_mb=64, tf32=False).build(conv(), one, context)
    large = TensorRtRtxTarget(compute_capabilities=("8.6", "8.9", "12.0")).build(conv(), two, context)
    assert large.records["compute_capabilities"] == "8.6, 8.9, 12.0"
    assert large.records["bytes"] > small.records["bytes"]


def test_refuses_a_capability_that_does_not_exist():
    with pytest.raises(ValidationError, match=r"'8.6'.*input_value='9.0'"):
        TensorRtRtxTarget(compute_capabilities=("9.0",))


@pytest.mark.parametrize(("kind", "decomposed"), [("float", 1), ("float16", 0)])
def test_builds_attention(onnx_model, folder, context, kind, decomposed):
    model = onnx_model(ATTENTION.format(float=kind), opset=23)
    engine = TARGET.build(model, folder, context)
    assert engine.records["network"]["decomposed_attention"] == decomposed


def test_profiles_reach_over_the_dynamic_dimensions(onnx_model):
    signature = onnx_model("g (float[N,3,S] x, float[4] b) => (float[N,3,S] y) { y = Add(x, b) }").signature
    signature = replace(signature, dims={"N": DimRange(1, 8, 32), "S": DimRange(4, 4, 64)})
    assert profile(signature) == {"x": [[1, 3, 4], [8, 3, 4], [32, 3, 64]]}


def test_shows_how_far_it_is(conv, folder, context):
    seen: list[int] = []

    def progress(items, description, total=None):
        assert (description, total) == ("building the TensorRT engine", 100)
        for item in items:
            seen.append(item)
            yield item

    TARGET.build(conv(), folder, replace(context, progress=progress))
    assert seen == list(range(1, 101))


def test_names_the_nodes_that_it_cannot_take(onnx_model, folder, context):
    body = "[first] a = Relu(x) [volume] b = Det(a) c = Det(x) [fused] d = com.microsoft.BiasGelu(x, x) e = Add(b, c)"
    text = '<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]> '
    model = onnx_model(f"{text} g (float[4,4] x) => (float[4,4] y) {{ {body} y = Add(d, e) }}")
    with pytest.raises(BuildError) as caught:
        TARGET.build(model, folder, context)
    message = str(caught.value)
    assert "node 'volume' (Det): TensorRT does not support it: express it with other operators" in message
    assert "node 'number 2' (Det)" in message
    assert "node 'fused' (com.microsoft.BiasGelu): TensorRT has no such operator: build from a model that" in message
    assert files(folder) == []


def test_builds_what_onnx_runtime_quantizes_symmetrically(onnx_model, folder, context, tmp_path):
    """It stores biases in INT32."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((16, 16, 3, 3)).astype("f"), "b": rng.standard_normal(16).astype("f")}
    text = "g (float[2,16,8,8] x, float[16,16,3,3] w, float[16] b) => (float[2,16,6,6] y) { y = Conv(x, w, b) }"
    in_float = onnx_model(text, opset=17, weights=weights)
    ir.save(in_float.ir, tmp_path / "float.onnx")
    quantize_static(
        tmp_path / "float.onnx",
        tmp_path / "int8.onnx",
        Samples(rng.standard_normal((8, 2, 16, 8, 8)).astype("f")),
        per_channel=True,
        extra_options={"ActivationSymmetric": True},
    )
    model = OnnxModel(ir.load(tmp_path / "int8.onnx"), in_float.signature)
    with pytest.raises(BuildError, match="it dequantizes INT32"):
        TARGET.build(model, folder, context)
    engine = BuildEngine(target=TARGET).run(model, replace(context, target=TARGET))
    assert engine.path.stat().st_size > 0


def test_says_what_is_wrong_with_int8(qdq, folder, context, onnx_model):
    with pytest.raises(BuildError, match=r"\(QuantizeLinear\): its zero point is not 0: let quantize_int8 run"):
        TARGET.build(qdq(zero_point=3), folder, context)
    bias = "{ b = DequantizeLinear(i, s) y = Add(x, b) }"
    text = f"g (float[2] x) => (float[2] y) <int32[2] i = {{1, 2}}, float s = {{0.5}}> {bias}"
    with pytest.raises(BuildError, match="it dequantizes INT32: let quantize_int8 run for this target"):
        TARGET.build(onnx_model(text), folder, context)
    text = text.replace("int32", "int8").replace("0.5", "0.0")
    with pytest.raises(BuildError, match="a scale is not positive"):
        TARGET.build(onnx_model(text), folder, context)
    assert files(folder) == []


def test_refuses_an_input_that_decides_a_shape(onnx_model, folder, context):
    model = onnx_model("g (float[4,4] x, int64[2] size) => (float[A,B] y) { y = Reshape(x, size) }")
    with pytest.raises(BuildError, match="the values of input 'size' decide the shape of a tensor"):
        TARGET.build(model, folder, context)


def test_keeps_the_log_of_a_build_that_fails(conv, folder, context):
    model = conv()
    fixed = replace(model, signature=replace(model.signature, inputs=()))  # so that there is no profile
    with pytest.raises(BuildError, match=r"no optimization profile has been defined(.|\n)*\[ERROR\]"):
        TARGET.build(fixed, folder, context)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the worker in /proc")
def test_leaves_nothing_when_the_worker_is_killed(conv, folder, context):
    def progress(items, description, total=None):
        for item in items:
            for children in Path("/proc/self/task").glob("*/children"):
                for pid in children.read_text().split():
                    if b"worker.serve" in Path("/proc", pid, "cmdline").read_bytes():
                        os.kill(int(pid), signal.SIGKILL)
            yield item

    with pytest.raises(BuildError, match="killed by SIGKILL"):
        TARGET.build(conv(), folder, replace(context, progress=progress))
    assert files(folder) == []


def test_leaves_nothing_when_the_time_is_over(conv, folder, context):
    with pytest.raises(BuildError, match=r"did not finish within 0\.01 s"):
        TensorRtRtxTarget(timeout=0.01).build(conv(), folder, context)
    assert files(folder) == []


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_says_how_to_get_it(tmp_path, monkeypatch):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    monkeypatch.setenv(PYTHON_VARIABLE, str(bare))
    availability = TARGET.can_build()
    assert not availability.ok
    assert f"tensorrt_rtx cannot be imported by {bare}" in availability.reason
    assert "pip install 'optkit[rtx]', or set OPTKIT_TENSORRT_PYTHON" in availability.mend
    assert TARGET.versions() == {}
    monkeypatch.setenv(PYTHON_VARIABLE, str(tmp_path / "missing"))
    assert "cannot be started" in TARGET.can_build().reason
    assert TARGET.versions() == {}


def test_says_why_it_cannot_run(tmp_path, conv):
    availability = TARGET.can_run()
    assert not availability.ok
    found = cuda.detect()
    if not found.gpus:
        assert availability.reason == found.reason
    with pytest.raises(UnavailableError, match=re.escape(availability.reason)):
        TARGET.open(Engine(tmp_path / PLAN_FILE, "tensorrt-rtx", conv().signature), threads=1)


@pytest.mark.parametrize(
    ("gpu", "reason"),
    [
        (cuda.Gpu("NVIDIA H100", "9.0", 80 << 30), "does not run on compute capability 9.0 (NVIDIA H100)"),
        (cuda.Gpu("NVIDIA RTX A6000", "8.6", 48 << 30), "optkit builds TensorRT-RTX engines but cannot run them yet"),
    ],
)
def test_judges_the_gpu(monkeypatch, gpu, reason):
    monkeypatch.setattr(cuda, "detect", lambda: cuda.Cuda("13.0", (gpu,)))
    assert TARGET.can_run().reason.endswith(reason)
