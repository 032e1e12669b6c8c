"""ONNX Runtime's kernels lead back to the ONNX nodes that they compute, through fusion and renaming."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from optkit.errors import PassError
from optkit.models import Engine
from optkit.targets.onnxruntime import OnnxRuntimeTarget
from optkit.targets.onnxruntime_kernels import kernel_nodes
from optkit.targets.profiling import Profiles

# Two convolutions, the second with a skip connection, a pool and a product
FLOAT = """g (float[1,16,8,8] x) => (float[1,4] y) {
    [stem] c = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w1, b1)
    [stem_relu] r = Relu(c)
    [body] d = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(r, w2, b1)
    [skip] s = Add(d, r)
    [body_relu] t = Relu(s)
    [pool] p = GlobalAveragePool(t)
    [flat] f = Flatten(p)
    [head] y = Gemm(f, w3, b3)
}"""

# The same with the first convolution in INT8
INT8 = """g (float[1,16,8,8] x) => (float[1,4] y)
<float xs = {0.03}, uint8 xz = {128}, float ws = {0.001}, int8 wz = {0}, float rs = {0.01}, uint8 rz = {0}> {
    [x_q] xq = QuantizeLinear(x, xs, xz)
    [x_dq] xd = DequantizeLinear(xq, xs, xz)
    [w_dq] wd = DequantizeLinear(q1, ws, wz)
    [stem] c = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(xd, wd)
    [stem_relu] r = Relu(c)
    [r_q] rq = QuantizeLinear(r, rs, rz)
    [r_dq] rd = DequantizeLinear(rq, rs, rz)
    [body] d = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(rd, w2, b1)
    [skip] s = Add(d, rd)
    [body_relu] t = Relu(s)
    [pool] p = GlobalAveragePool(t)
    [flat] f = Flatten(p)
    [head] y = Gemm(f, w3, b3)
}"""


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"w1": (16, 16, 3, 3), "w2": (16, 16, 3, 3), "b1": (16,), "w3": (16, 4), "b3": (4,)}
    return {
        **{name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()},
        "q1": rng.integers(-127, 128, (16, 16, 3, 3)).astype(np.int8),
    }


@pytest.fixture
def make(net, tmp_path, context):
    """A model from text, and its engine."""

    def built(text: str, optimization: str = "all"):
        model = net(text, **{name: array for name, array in arrays().items() if name in text})
        folder = tmp_path / f"engine-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        return model, OnnxRuntimeTarget(optimization=optimization).build(model, folder, context)

    return built


def kernels_of(model, engine: Engine) -> dict[str, tuple[str, ...]]:
    """Nodes by the type of the kernel."""
    kernels = list(onnx.load(engine.path).graph.node)
    found = kernel_nodes(model, kernels)
    return {f"{kernel.op_type} {i}": nodes for i, (kernel, nodes) in enumerate(zip(kernels, found, strict=True))}


def parts(model, engine: Engine) -> list[tuple[str, ...]]:
    return [nodes for nodes in kernels_of(model, engine).values() if len(nodes) > 1]


@pytest.mark.parametrize("optimization", ["all", "extended", "none"])
def test_every_node_is_in_a_kernel(make, optimization):
    for text in (FLOAT, INT8):
        model, engine = make(text, optimization)
        kernels = kernels_of(model, engine)
        assert all(kernels.values()), kernels
        assert {name for nodes in kernels.values() for name in nodes} == {node.name for node in model.ir.graph}


def test_a_fused_convolution_takes_what_follows_it(make):
    assert parts(*make(FLOAT)) == [("stem", "stem_relu"), ("body", "skip", "body_relu")]
    assert parts(*make(FLOAT, "extended"))[0] == ("stem", "stem_relu")
    assert parts(*make(FLOAT, "none")) == []


def test_a_quantized_convolution_takes_its_pairs(make):
    kernels = kernels_of(*make(INT8))
    assert [nodes for kind, nodes in kernels.items() if kind.startswith("QuantizeLinear")] == [("x_q",)]
    (convolution,) = (set(nodes) for kind, nodes in kernels.items() if kind.startswith("QLinearConv"))
    assert convolution - {"r_q"} == {"x_dq", "w_dq", "stem", "stem_relu"}  # r_q goes with the transposition, if any
    assert [nodes for kind, nodes in kernels.items() if kind.startswith("DequantizeLinear")] == [
        ("r_dq",)
    ] * 2  # one for each reader


def test_a_product_that_finds_its_ranges_itself_takes_all_of_that(net, tmp_path, context):
    model = net(
        """g (float[2,8] x) => (float[2,8] y) <float s = {0.1}> {
            [before] a = Tanh(x) [ranges] q, u, z = DynamicQuantizeLinear(a) [product] p = MatMulInteger(q, w, z)
            [real] r = Cast<to = 1>(p) [scale] k = Mul(u, s) [scaled] y = Mul(r, k) }""",
        w=np.random.default_rng(0).integers(-127, 128, (8, 8)).astype(np.int8),
    )
    engine = OnnxRuntimeTarget().build(model, tmp_path, context)
    assert list(kernels_of(model, engine).values()) == [("before",), ("ranges", "product", "real", "scale", "scaled")]


def test_what_only_moves_data_counts_with_its_reader(make):
    model, _ = make(FLOAT)
    nodes = [
        onnx.helper.make_node("ReorderInput", ["x"], ["blocked"], "ReorderInput"),
        onnx.helper.make_node("Conv", ["blocked"], ["elsewhere"], "r_nchwc"),
        onnx.helper.make_node("Mystery", ["unknown"], ["nowhere"], "mystery"),
    ]
    assert kernel_nodes(model, nodes)[0] == ("stem_relu",)
    assert set(kernel_nodes(model, nodes)[1]) >= {"stem", "stem_relu"}
    assert kernel_nodes(model, nodes)[2] == ()


def test_times_every_kernel_and_leaves_nothing_behind(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, engine = make(INT8)
    before = sorted(tmp_path.rglob("*"))
    target = OnnxRuntimeTarget()
    assert isinstance(target, Profiles)
    with target.profiler(engine, model, 1) as profiler:
        layers = profiler.layers(model.signature.random_feeds(np.random.default_rng(0)), 5)
    assert {name for layer in layers for name in layer.nodes} == {node.name for node in model.ir.graph}
    assert sum(layer.seconds for layer in layers) > 0
    assert sorted(tmp_path.rglob("*")) == before


def test_the_time_is_that_of_the_kernel_that_took_it(net, tmp_path, context):
    """By a factor of thousands, so that no noise hides it: a product of 2 * 512**3 operations beside 512."""
    model = net(
        """g (float[512,512] x, float[1,512] s) => (float[512,512] y, float[1,512] t) {
            [light] t = Tanh(s) [heavy] y = MatMul(x, w) }""",
        w=np.ones((512, 512), np.float32),
    )
    engine = OnnxRuntimeTarget().build(model, tmp_path, context)
    with OnnxRuntimeTarget().profiler(engine, model, 1) as profiler:
        layers = profiler.layers(model.signature.random_feeds(np.random.default_rng(0)), 9)
    seconds = {layer.nodes: layer.seconds for layer in layers}
    assert seconds["heavy",] > 10 * seconds["light",]


def test_a_branch_counts_once(net, tmp_path, context):
    model = net(
        """g (float[64,64] x, bool c) => (float[64,64] y) {
            [before] a = Relu(x)
            [choice] b = If(c) <then_branch = t () => (float[64,64] p) { [inner] p = MatMul(a, a) },
                              else_branch = e () => (float[64,64] q) { [other] q = Neg(a) }>
            [after] y = MatMul(b, b) }"""
    )
    engine = OnnxRuntimeTarget().build(model, tmp_path, context)
    feeds = {"x": np.ones((64, 64), np.float32), "c": np.array(True)}
    with OnnxRuntimeTarget().profiler(engine, model, 1) as profiler:
        layers = {layer.nodes: layer.seconds for layer in profiler.layers(feeds, 9)}
    assert set(layers) == {("before",), ("choice",), ("after",)}
    assert layers["choice",] > layers["before",]


def test_an_engine_that_does_not_run_is_told(make):
    model, engine = make(FLOAT)
    with OnnxRuntimeTarget().profiler(engine, model, 1) as profiler, pytest.raises(PassError, match="under its profil"):
        profiler.layers({"x": np.zeros((1, 2, 8, 8), np.float32)}, 1)
