from __future__ import annotations

import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest

from optkit.context import Context
from optkit.errors import BuildError, PassError, UnavailableError, UsageError
from optkit.models import Engine, Feeds, OnnxModel, Signature, TensorSpec
from optkit.targets.cpu import Cpu, this_cpu
from optkit.targets.onnxruntime import ENGINE_FILE, OnnxRuntimeTarget, open_onnx

CONV = """
g (float[N,3,8,8] x, float[16,3,3,3] w, float[16] b, float[16,10] v) => (float[N,10] y) {
    c = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w, b)
    r = Relu(c)
    p = GlobalAveragePool(r)
    f = Flatten(p)
    y = MatMul(f, v)
}
"""
QDQ = """
g (float[N,3,8,8] x, int8[16,3,3,3] w) => (float[N,16,8,8] y)
<float xs = {0.02}, uint8 xz = {128}, float ws = {0.01}, int8 wz = {0}, float ys = {0.05}, uint8 yz = {120}> {
    q = QuantizeLinear(x, xs, xz)
    d = DequantizeLinear(q, xs, xz)
    e = DequantizeLinear(w, ws, wz)
    c = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(d, e)
    o = QuantizeLinear(c, ys, yz)
    y = DequantizeLinear(o, ys, yz)
}
"""


def saved_and_run(model: OnnxModel, folder: Path, context: Context, feeds: Feeds) -> np.ndarray:
    """What an engine that went through its file gives."""
    target = OnnxRuntimeTarget()
    with target.open(target.build(model, folder, context), 1) as runner:
        return runner.run(feeds)["y"]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def conv(onnx_model, rng):
    shapes = {"w": (16, 3, 3, 3), "b": (16,), "v": (16, 10)}
    return onnx_model(CONV, weights={k: rng.standard_normal(s, dtype=np.float32) for k, s in shapes.items()})


@pytest.fixture
def qdq(onnx_model, rng):
    # Weights near the ends: where uint8 x int8 saturates
    return onnx_model(QDQ, weights={"w": rng.choice(np.array([-127, 127], np.int8), (16, 3, 3, 3))})


def test_reads_the_engine_back_bit_for_bit(conv, tmp_path, context, rng):
    target = OnnxRuntimeTarget()
    engine = target.build(conv, tmp_path, context)
    feeds = conv.signature.random_feeds(rng, N=3)
    with target.open(engine, threads=1) as runner, open_onnx(conv) as reference:
        np.testing.assert_array_equal(runner.run(feeds)["y"], reference.run(feeds)["y"])
        samples = runner.time(feeds, 5)
    assert samples.shape == (5,)
    assert (samples > 0).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == [ENGINE_FILE, "scratch"]
    assert engine.records["nodes"]["Conv"] == 1
    assert "Relu" not in engine.records["nodes"]
    assert engine.records["bytes"] == engine.path.stat().st_size
    assert "optkit.isa" not in conv.ir.metadata_props


def test_agrees_with_the_unoptimized_graph(conv, rng):
    feeds = conv.signature.random_feeds(rng, N=2)
    fused, plain = open_onnx(conv).run(feeds), open_onnx(conv, optimize=False).run(feeds)
    np.testing.assert_allclose(fused["y"], plain["y"], rtol=1e-4, atol=1e-5)


def test_puts_large_weights_beside_the_engine(conv, tmp_path, rng):
    target = OnnxRuntimeTarget()
    engine = target.save(conv, tmp_path, external_above=100)
    (weights,) = engine.records["files"]
    assert (tmp_path / weights).stat().st_size > engine.path.stat().st_size / 2
    assert engine.records["bytes"] == engine.path.stat().st_size + (tmp_path / weights).stat().st_size
    feeds = conv.signature.random_feeds(rng)
    np.testing.assert_array_equal(target.open(engine, 1).run(feeds)["y"], open_onnx(conv).run(feeds)["y"])


def test_shares_weights_of_every_type(onnx_model, rng):
    text = "g (float[1] x, bfloat16[64,64] w) => (float[64,64] y) { c = Cast<to=1>(w) y = Add(c, x) }"
    weights = rng.standard_normal((64, 64)).astype(ml_dtypes.bfloat16)
    weights.flags.writeable = False
    model = onnx_model(text, weights={"w": weights.T})
    y = open_onnx(model).run({"x": np.zeros(1, np.float32)})["y"]
    np.testing.assert_array_equal(y, weights.T.astype(np.float32))


def test_takes_a_weight_that_no_node_uses(onnx_model, rng):
    text = "g (float[2] x, float[64,64] w) => (float[2] y) { y = Neg(x) }"
    model = onnx_model(text, weights={"w": rng.standard_normal((64, 64), dtype=np.float32)})
    np.testing.assert_array_equal(open_onnx(model).run({"x": np.ones(2, np.float32)})["y"], [-1, -1])


def test_fuses_int8_and_keeps_it_exact_on_request(qdq, tmp_path, context, rng):
    feeds = {"x": rng.uniform(-2.5, 2.5, (2, 3, 8, 8)).astype(np.float32)}
    plain = open_onnx(qdq, optimize=False).run(feeds)["y"]
    target = OnnxRuntimeTarget(exact_int8=True)
    engine = target.build(qdq, tmp_path, context)
    assert engine.records["nodes"]["QLinearConv"] == 1
    exact = target.open(engine, threads=1).run(feeds)["y"]
    np.testing.assert_allclose(exact, plain, atol=0.0501)  # one step of the output, where rounding decides
    if this_cpu().saturates_int8:
        fast = open_onnx(qdq).run(feeds)["y"]
        assert np.abs(fast - plain).max() > 0.2


def test_refuses_exact_int8_of_a_release_that_aborts(qdq, tmp_path, context, monkeypatch):
    monkeypatch.setattr("onnxruntime.__version__", "1.29.0")
    assert OnnxRuntimeTarget().can_run().ok
    with pytest.raises(UnavailableError, match=r"1.29.0 can end the whole process .*onnxruntime>=1.30"):
        OnnxRuntimeTarget(exact_int8=True).build(qdq, tmp_path, context)


def test_a_layer_left_in_float_between_int8_layers_stays_in_float(onnx_model, tmp_path, context, rng):
    text = QDQ.replace("int8[16,3,3,3] w", "float[16,3,3,3] w").replace("e = DequantizeLinear(w, ws, wz)", "")
    text = text.replace("(d, e)", "(d, w)").replace(", float ws = {0.01}, int8 wz = {0}", "")
    weight = rng.standard_normal((16, 3, 3, 3)).astype(np.float32) / 10
    weight[0] *= 100  # with one scale for all channels, those of the others would round to nearly nothing
    model = onnx_model(text, weights={"w": weight})
    feeds = {"x": rng.standard_normal((2, 3, 8, 8)).astype(np.float32)}
    with open_onnx(model, optimize=False) as runner:
        wanted = runner.run(feeds)["y"]
    with open_onnx(model) as runner:
        fused = runner.run(feeds)["y"]
    target = OnnxRuntimeTarget()
    with target.open(target.build(model, tmp_path, context), 1) as runner:
        built = runner.run(feeds)["y"]
    for found in (fused, built):
        # A sum that is halfway between two values may be rounded either way
        assert np.abs(found - wanted).max() <= 0.0501
        assert (found == wanted).mean() > 0.99


def test_half_precision_survives_the_file(onnx_model, tmp_path, context, rng):
    body = "{ h = Cast<to=10>(x) m = MatMul(h, w) y = Cast<to=1>(m) }"
    model = onnx_model(
        f"g (float[2,64] x, float16[64,64] w) => (float[2,64] y) {body}",
        weights={"w": rng.standard_normal((64, 64)).astype(np.float16)},
    )
    feeds = model.signature.random_feeds(rng)
    y = saved_and_run(model, tmp_path, context, feeds)
    np.testing.assert_array_equal(y, open_onnx(model).run(feeds)["y"])


def test_a_transposed_fp16_product_does_not_end_the_process(onnx_model, tmp_path, context, rng):
    body = "{ t = Transpose<perm=[1,0,2]>(x) y = MatMul(t, w) }"
    model = onnx_model(
        f"g (float16[2,9,32] x, float16[32,96] w) => (float16[9,2,96] y) {body}",
        weights={"w": rng.standard_normal((32, 96)).astype(np.float16)},
    )
    feeds = model.signature.random_feeds(rng)
    y = saved_and_run(model, tmp_path, context, feeds)
    np.testing.assert_allclose(y, open_onnx(model, optimize=False).run(feeds)["y"], rtol=2e-2, atol=2e-2)


def test_builds_signed_int8_of_opset_21(onnx_model, tmp_path, context, rng):
    """ONNX Runtime fuses the product and its bias into a Gemm behind a Reshape, and moves the quantizer across that."""
    model = onnx_model(
        """g (float[2,16,32] x, int8[32,64] w, float[64] b) => (float[2,16,64] y) <float s = {0.02}, int8 z = {0}> {
            q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) e = DequantizeLinear(w, s, z)
            p = MatMul(d, e) y = Add(p, b) }""",
        opset=21,
        weights={"w": rng.integers(-64, 64, (32, 64), np.int8), "b": rng.standard_normal(64).astype(np.float32)},
    )
    feeds = {"x": rng.standard_normal((2, 16, 32)).astype(np.float32)}
    y = saved_and_run(model, tmp_path, context, feeds)
    np.testing.assert_allclose(y, open_onnx(model, optimize=False).run(feeds)["y"], atol=0.05)


def test_runs_on_the_threads_it_is_given(conv, tmp_path, context):
    target = OnnxRuntimeTarget(execution="parallel", spinning=False, optimization="extended")
    engine = target.build(conv, tmp_path, context)
    assert engine.records["portable"]
    runner = target.open(engine, threads=2)
    settings = runner.environment.settings
    assert (settings["threads"], settings["execution"], settings["optimization"]) == (2, "parallel", "extended")
    options = runner._session.get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 2)


def test_refuses_an_engine_laid_out_for_another_processor(conv, tmp_path, context):
    target = OnnxRuntimeTarget()
    engine = target.build(conv, tmp_path, context)
    if engine.records["portable"]:
        pytest.skip("ONNX Runtime has no processor-specific layout here")
    saved = onnx.load(engine.path)
    (entry,) = (prop for prop in saved.metadata_props if prop.key == "optkit.isa")
    entry.value = "avx1024"
    onnx.save(saved, engine.path)
    with pytest.raises(UnavailableError, match=r"laid out for processors with avx1024.*build it again"):
        target.open(engine, threads=1)


def test_refuses_files_that_are_not_the_engine(conv, tmp_path, context):
    target = OnnxRuntimeTarget()
    engine = target.build(conv, tmp_path, context)
    other = Signature(conv.signature.inputs, (TensorSpec("z", "float32", ("N", 10)),))
    with pytest.raises(UsageError, match="takes 'x' and gives 'y', but its signature says 'x' and 'z'"):
        target.open(Engine(engine.path, "onnxruntime", other), threads=1)
    engine.path.write_bytes(engine.path.read_bytes()[:500])
    with pytest.raises(UsageError, match=r"cannot be opened: .*Protobuf parsing failed"):
        target.open(engine, threads=1)
    engine.path.unlink()
    with pytest.raises(UsageError, match="cannot be opened"):
        target.open(engine, threads=1)


def test_leaves_nothing_of_a_model_that_does_not_build(onnx_model, tmp_path, context):
    model = onnx_model("g (float[4] x) => (float[4] y) { [lost] y = NoSuchOp(x) }")
    with pytest.raises(BuildError, match=r"ONNX Runtime does not take the model: .*NoSuchOp"):
        OnnxRuntimeTarget().build(model, tmp_path, context)
    assert [path.name for path in tmp_path.iterdir()] == ["scratch"]


def test_refuses_feeds_that_do_not_fit(conv):
    runner = open_onnx(conv)
    x = np.zeros((2, 3, 8, 8), np.float32)
    for feeds, message in (
        ({"X": x}, "unknown input 'X': known: x"),
        ({"x": x[:, :2]}, r"input 'x': float32\[N,3,8,8\] is wanted, not float32\[2,2,8,8\]"),
        ({"x": x.astype(np.float64)}, r"is wanted, not float64\[2,3,8,8\]"),
    ):
        with pytest.raises(UsageError, match=message):
            runner.run(feeds)
        with pytest.raises(UsageError, match=message):
            runner.time(feeds, 1)


def test_tells_what_failed_at_run_time(onnx_model):
    runner = open_onnx(onnx_model("g (float[4] x, int64[1] i) => (float[1] y) { y = Gather(x, i) }"))
    with pytest.raises(PassError, match=r"failed to run the model: .*indices element out of data bounds, idx=9"):
        runner.run({"x": np.zeros(4, np.float32), "i": np.array([9])})


def test_says_how_to_install_onnxruntime(conv, tmp_path, context, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    target = OnnxRuntimeTarget()
    availability = target.can_build()
    assert not availability.ok
    assert availability.mend == "pip install 'optkit[cpu]'"
    assert target.versions() == {}
    with pytest.raises(UnavailableError, match=r"onnxruntime cannot be imported.*pip install 'optkit\[cpu\]'"):
        target.build(conv, tmp_path, context)
    with pytest.raises(UnavailableError, match="pip install"):
        open_onnx(conv)


@pytest.mark.parametrize(
    ("flags", "isa", "saturates"),
    [
        ("fpu avx2 fma", "avx2", True),
        ("fpu avx2 avx512f avx512_vnni", "avx512f", False),
        ("fpu avx2 avx_vnni", "avx2", False),
    ],
)
def test_reads_the_processor(tmp_path, flags, isa, saturates):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: {flags}\n")
    cpu = this_cpu(cpuinfo)
    assert (cpu.name, cpu.isa, cpu.saturates_int8) == ("Some CPU @ 2 GHz", isa, saturates)


def test_knows_nothing_of_a_processor_that_is_not_told(tmp_path):
    cpu = this_cpu(tmp_path / "missing")
    assert cpu.features == ()
    assert not cpu.saturates_int8
    assert Cpu("arm", ("asimd",)).isa == "asimd"


def test_a_normalization_after_an_addition_stays_two_kernels_that_are_faster_than_one(onnx_model, tmp_path, context):
    model = onnx_model(
        "g (float[n,4,8] x, float[n,4,8] skip, float[8] scale, float[8] bias) => (float[n,4,8] y)"
        " { sum = Add(x, skip) y = LayerNormalization(sum, scale, bias) }"
    )
    engine = OnnxRuntimeTarget().build(model, tmp_path, context)
    assert engine.records["nodes"] == {"Add": 1, "LayerNormalization": 1}
