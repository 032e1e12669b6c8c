from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from optkit.errors import BuildError, PassError, UnavailableError, UsageError
from optkit.models import DimRange, Engine, OnnxModel
from optkit.numerics import compare
from optkit.passes.build_engine import BuildEngine
from optkit.quantize.placement import name_nodes
from optkit.targets import cuda
from optkit.targets.arrays import lies_on_gpu
from optkit.targets.onnxruntime import open_onnx
from optkit.targets.tensorrt import TensorRtTarget
from optkit.targets.worker.gpu import Cuda, CudaError

CONV = """
g ({float}[N,32,28,28] x, {float}[32,32,3,3] w) => ({float}[N,32,28,28] y) {{
    c = Conv<pads=[1,1,1,1]>(x, w)
    y = Relu(c)
}}
"""
INT8 = """
g (float[N,32,28,28] x, int8[32,32,3,3] w, float[32] ws) => (float[N,32,28,28] y)
  <float xs = {0.03}, int8 z = {0}, float ys = {0.05}> {
    q = QuantizeLinear(x, xs, z)
    d = DequantizeLinear(q, xs, z)
    e = DequantizeLinear<axis=0>(w, ws)
    [first] c = Conv<pads=[1,1,1,1]>(d, e)
    %s
    q2 = QuantizeLinear(r, ys, z)
    d2 = DequantizeLinear(q2, ys, z)
    f = DequantizeLinear<axis=0>(w, ws)
    [second] s = Conv<pads=[1,1,1,1]>(d2, f)
    %s
}
"""
QDQ = INT8 % ("r = Relu(c)", "t = Add(s, d)  y = Relu(t)")
MIXED = INT8 % ("[gate] g = Sigmoid(c)  [silu] r = Mul(c, g)", "h = Cast<to=10>(s)  a = Relu(h)  y = Cast<to=1>(a)")
RELU6 = """
g (float[N,32,28,28] x, float[32,1,3,3] v, int8[32,32,1,1] w, float[32] ws) => (float[N,32,28,28] y)
  <float s = {%s}, int8 z = {0}, float low = {0}, float high = {6}> {
    [depthwise] c = Conv<group=32, pads=[1,1,1,1]>(x, v)
    [clip] a = Clip(c, low, high)
    q = QuantizeLinear(a, s, z)
    d = DequantizeLinear(q, s, z)
    e = DequantizeLinear<axis=0>(w, ws)
    [next] y = Conv(d, e)
}
"""
ENCODER = """
g (float[N,16,64] x, float[64] scale, float[64] bias, float[64,64] w) => (float[N,16,64] y) {
    n = LayerNormalization<axis=-1>(x, scale, bias)
    m = MatMul(n, w)
    a = Gelu(m)
    y = Add(a, x)
}
"""


def batched(model: OnnxModel) -> OnnxModel:
    """Let the batch reach from 1 to 8."""
    return replace(model, signature=replace(model.signature, dims={"N": DimRange(1, 4, 8)}))


@pytest.fixture
def target(tmp_path):
    return TensorRtTarget(timing_cache=str(tmp_path / "timing"))


@pytest.fixture
def conv(onnx_model):
    def make(kind: str = "float") -> OnnxModel:
        dtype = np.float32 if kind == "float" else np.float16
        weights = np.random.default_rng(0).standard_normal((32, 32, 3, 3)) * 0.1
        return batched(onnx_model(CONV.format(float=kind), weights={"w": weights.astype(dtype)}))

    return make


def quantized(onnx_model, text: str) -> OnnxModel:
    weights = np.random.default_rng(0).integers(-127, 128, (32, 32, 3, 3), np.int8)
    model = onnx_model(text, weights={"w": weights, "ws": np.linspace(5e-4, 1e-3, 32).astype(np.float32)})
    # 8.5 tells no formats of dynamic shapes
    return replace(model, signature=replace(model.signature, dims={"N": DimRange(4, 4, 4)}))


def build(target: TensorRtTarget, model: OnnxModel, context, name: str = "engine") -> Engine:
    folder = context.scratch / name
    folder.mkdir()
    return BuildEngine(target=target).run(model, replace(context, target=target, scratch=folder))


def feeds_of(model: OnnxModel, batch: int = 4) -> dict[str, np.ndarray]:
    return model.signature.random_feeds(np.random.default_rng(1), N=batch)


@pytest.mark.parametrize("bindings", [True, False])
def test_the_driver_moves_memory_and_takes_the_time(bindings):
    gpu = Cuda(bindings)
    stream, given, taken = gpu.stream(), np.arange(1000.0), np.zeros(1000)
    pointer, start, stop = gpu.allocate(given.nbytes), gpu.event(), gpu.event()
    gpu.record(start, stream)
    gpu.to_device(pointer, given.ctypes.data, given.nbytes, stream)
    gpu.to_host(taken.ctypes.data, pointer, taken.nbytes, stream)
    gpu.record(stop, stream)
    gpu.synchronize(stream)
    np.testing.assert_array_equal(taken, given)
    assert 0 < gpu.seconds(start, stop) < 1
    assert gpu.l2_bytes > 1 << 20
    gpu.free(pointer)
    with pytest.raises(CudaError, match="out of GPU memory: 1125899907 MB wanted") as caught:
        gpu.allocate(1 << 50)
    assert caught.value.out_of_memory


@pytest.mark.parametrize(("kind", "precision"), [("float", "FP32"), ("float16", "FP16")])
def test_builds_and_runs_a_float_model(target, conv, context, kind, precision):
    model = conv(kind)
    engine = build(target, model, context)
    assert engine.records["inspector"]["precisions"][precision] >= 1
    with target.open(engine, 1) as runner, open_onnx(model) as reference:
        for batch in (4, 1, 8):
            feeds = feeds_of(model, batch)
            found = compare(reference.run(feeds), runner.run(feeds))
            assert found.cosine > 0.9999


@pytest.mark.parametrize("scale", [6 / 127, 0.1], ids=["saturates", "has room"])
def test_clips_what_a_float_convolution_gives_before_it_is_quantized(target, onnx_model, context, scale):
    rng = np.random.default_rng(0)
    values = {
        "v": rng.standard_normal((32, 1, 3, 3)).astype(np.float32),
        "w": rng.integers(-127, 128, (32, 32, 1, 1), np.int8),
        "ws": np.linspace(5e-4, 1e-3, 32).astype(np.float32),
    }
    model = batched(onnx_model(RELU6 % scale, weights=values))
    feeds = feeds_of(model)
    with target.open(build(target, model, context), 1) as runner, open_onnx(model, optimize=False) as reference:
        assert compare(reference.run(feeds), runner.run(feeds)).cosine > 0.9999


@pytest.mark.parametrize("text", [QDQ, MIXED], ids=["alone", "beside float32"])
def test_builds_and_runs_int8(target, onnx_model, context, text):
    model = quantized(onnx_model, text)
    engine = build(target, model, context)
    inspector = engine.records["inspector"]
    assert inspector["precisions"]["INT8"] >= 2, inspector["layers"]
    assert inspector["islands"] == []
    named = {node for layer in inspector["layers"] if layer["precision"] == "INT8" for node in layer["nodes"]}
    assert {"first", "second"} <= named
    with target.open(engine, 1) as runner, open_onnx(model, optimize=False) as reference:
        feeds = feeds_of(model)
        assert compare(reference.run(feeds), runner.run(feeds)).cosine > 0.9999


def test_decomposes_what_an_old_tensorrt_lacks(target, onnx_model, context):
    rng = np.random.default_rng(0)
    shapes = {"scale": (64,), "bias": (64,), "w": (64, 64)}
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    model = batched(onnx_model(ENCODER, weights=weights))
    with target.open(build(target, model, context), 1) as runner, open_onnx(model) as reference:
        feeds = feeds_of(model)
        assert compare(reference.run(feeds), runner.run(feeds)).cosine > 0.9999


def test_feeds_int64(target, onnx_model, context):
    body = "{ y = Gather(table, ids) z = Add(ids, ids) }"
    text = f"g (int64[N,4] ids, float[10,8] table) => (float[N,4,8] y, int64[N,4] z) {body}"
    table = np.random.default_rng(0).standard_normal((10, 8)).astype(np.float32)
    model = batched(onnx_model(text, weights={"table": table}))
    with target.open(build(target, model, context), 1) as runner, open_onnx(model) as reference:
        feeds = {"ids": np.arange(8).reshape(2, 4)}
        found, wanted = runner.run(feeds), reference.run(feeds)
        assert found["z"].dtype == np.int64
        for name in wanted:
            np.testing.assert_allclose(found[name], wanted[name], rtol=1e-3)


def test_gives_outputs_whose_shape_the_data_decide(target, onnx_model, context):
    model = onnx_model("g (float[16] x) => (int64[1,A] y) { r = Relu(x) y = NonZero(r) }")
    with target.open(build(target, model, context), 1) as runner:
        for seed in (0, 1):
            x = np.random.default_rng(seed).standard_normal(16).astype(np.float32)
            np.testing.assert_array_equal(runner.run({"x": x})["y"], np.nonzero(np.maximum(x, 0)))
        runner.time({"x": x}, 3)
        assert "decide the shape" in runner.environment.settings["cuda_graph"]


def test_times_with_a_graph_and_rotated_buffers(target, conv, context):
    model = conv("float16")
    with target.open(build(target, model, context), 1) as runner:
        feeds = feeds_of(model)
        bare = np.median(runner.time(feeds, 200))
        settings = dict(runner.environment.settings)
        assert settings["cuda_graph"] is True and settings["transfers"] is False
        assert settings["rotated_buffers"] > 1 and settings["clocks_mhz"]["sm"] > 0
        assert 1e-6 < bare < np.median(runner.with_transfers().time(feeds, 200))
        layers = runner.profile(feeds)
        assert layers and all(layer["seconds"] > 0 for layer in layers)
        assert runner.run(feeds)["y"].shape == (4, 32, 28, 28)


def test_tells_the_time_of_layers_with_their_nodes(target, conv, context):
    model = conv("float16")
    name_nodes(model)
    engine = build(target, model, context)
    with target.profiler(engine, model, 1) as profiler:
        layers = profiler.layers(feeds_of(model), 10)
    assert all(layer.seconds >= 0 for layer in layers)
    assert "Conv_0" in {name for layer in layers for name in layer.nodes}


def test_takes_and_gives_what_lies_on_the_gpu(target, conv, context):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    model = conv()
    with target.open(build(target, model, context), 1) as runner:
        for batch in (4, 8, 2):  # buffers grow and shrink
            feeds = feeds_of(model, batch)
            wanted = runner.run(feeds)["y"]
            assert isinstance(wanted, np.ndarray)
            np.testing.assert_array_equal(runner.run({"x": torch.from_numpy(feeds["x"])})["y"], wanted)
            given = runner.run({"x": torch.from_numpy(feeds["x"]).cuda()})["y"]
            assert lies_on_gpu(given) and given.shape == wanted.shape and given.dtype == wanted.dtype
            np.testing.assert_array_equal(given, wanted)
            np.testing.assert_array_equal(torch.as_tensor(given, device="cuda").cpu().numpy(), wanted)
        assert "gpu_arrays" not in runner.environment.settings, "it went through host memory"
        again = runner.run({"x": given})["y"] if given.shape == feeds["x"].shape else given
        assert lies_on_gpu(again)
        with pytest.raises(UsageError, match=r"input 'x': float32\[N,32,28,28\] is wanted"):
            runner.run({"x": torch.zeros((1, 32, 28, 28), device="cuda", dtype=torch.float16)})
        np.testing.assert_array_equal(given, wanted)  # what was given stays what it was


def test_arrays_on_the_gpu_go_through_the_host_where_types_differ(target, onnx_model, context):
    """TensorRT before 10 has INT32 where the signature has INT64; any version shares no outputs of unknown shape."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    model = onnx_model("g (float[16] x) => (int64[1,A] y) { r = Relu(x) y = NonZero(r) }")
    x = np.random.default_rng(0).standard_normal(16).astype(np.float32)
    with target.open(build(target, model, context), 1) as runner:
        for _ in range(2):
            given = runner.run({"x": torch.from_numpy(x).cuda()})["y"]
            np.testing.assert_array_equal(given, np.nonzero(np.maximum(x, 0)))
        assert "through host memory" in runner.environment.settings["gpu_arrays"]


def test_times_calls_side_by_side(target, conv, context):
    model = conv("float16")
    several = target.model_copy(update={"contexts": 3})
    feeds = feeds_of(model)
    with several.open(build(several, model, context), 1) as runner:
        samples = runner.time(feeds, 300)
        assert samples.shape == (300,) and (samples > 0).all()
        assert runner.environment.calls_at_once == 3 and runner.environment.settings["cuda_graph"] is True
        with open_onnx(model) as reference:
            assert compare(reference.run(feeds), runner.run(feeds)).cosine > 0.9999


def test_says_which_sizes_no_profile_takes(target, conv, context):
    model = conv()
    with target.open(build(target, model, context), 1) as runner:
        with pytest.raises(UsageError, match=r"no optimization profile .* x \[9, 32, 28, 28\].*widen `dims`"):
            runner.run(feeds_of(model, 9))
        assert runner.run(feeds_of(model, 8))["y"].shape[0] == 8


def test_builds_several_profiles(target, conv, context):
    model = conv()
    several = target.model_copy(update={"profiles": ({"N": (1, 1, 1)}, {"N": (2, 16, 32)})})
    with several.open(build(several, model, context), 1) as runner:
        for batch in (1, 32, 1, 2):
            assert runner.run(feeds_of(model, batch))["y"].shape[0] == batch


def test_keeps_a_timing_cache_that_two_builds_share(target, conv, context, tmp_path):
    models = [conv("float"), conv("float16")]
    threads = [
        threading.Thread(target=build, args=(target, model, context, f"engine{i}")) for i, model in enumerate(models)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    caches = list(Path(tmp_path / "timing").glob("*.cache"))
    assert len(caches) == 1
    assert [path for path in caches[0].parent.iterdir() if path.suffix not in (".cache", ".lock")] == []
    told = build(target, models[1], context, "again").records["timing_cache"]
    assert told["read"] == caches[0].stat().st_size or told["read"] > 0
    caches[0].write_bytes(b"no cache")
    assert build(target, models[1], context, "damaged").records["timing_cache"]["written"] > 8


def test_refuses_plans_that_it_cannot_load(target, conv, context):
    engine = build(target, conv(), context)
    whole = engine.path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"not a plan" * 100):
        engine.path.write_bytes(damaged)
        with pytest.raises(UnavailableError, match=r"cannot be opened by TensorRT: (.|\n)*build it again"):
            target.open(engine, 1)


def test_names_the_node_that_tensorrt_does_not_take(target, onnx_model, context):
    model = onnx_model("g (float[4,4] x) => (float y) { [volume] y = Det(x) }")
    with pytest.raises(BuildError, match=r"node 'volume' \(Det\)"):
        build(target, model, context)


def test_says_which_options_this_tensorrt_lacks(target, conv, context):
    if cuda.detect().gpus and target.dialect.typed:
        pytest.skip("this TensorRT has every option")
    with pytest.raises(BuildError, match="has no `strip`: leave it out"):
        build(target.model_copy(update={"strip": True}), conv(), context)


def test_says_when_the_gpu_is_full_at_run_time(target, onnx_model, context):
    model = onnx_model("g (float[N] x) => (float[N] y) { y = Relu(x) }")
    large = replace(model, signature=replace(model.signature, dims={"N": DimRange(1, 1 << 27, 1 << 27)}))
    with target.open(build(target, large, context), 1) as runner:
        gpu = Cuda()
        hog = gpu.allocate(gpu.free_bytes - (256 << 20))
        try:
            with pytest.raises(PassError, match=r"out of GPU memory: 537 MB wanted, .* use a smaller batch"):
                runner.run({"x": np.ones(1 << 27, np.float32)})
        finally:
            gpu.free(hog)
        assert runner.run({"x": np.ones(4, np.float32)})["y"].tolist() == [1, 1, 1, 1]
