"""What TensorRT makes of one op beside a quantizer: it may move the one across the other, and must not change numbers.

TensorRT 8.5.3 is wrong with some, from which optkit therefore keeps it (``benchmarks/gpu/results/clips-h200.txt`` and
``quantizers-h200.txt``).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from optkit.models import OnnxModel
from optkit.numerics import compare
from optkit.passes.build_engine import BuildEngine
from optkit.targets.onnxruntime import open_onnx
from optkit.targets.tensorrt import TensorRtTarget

OPS = {
    "abs": "b = Abs(a)",
    "add": "b = Add(a, one)",
    "average pool": "b = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(a)",
    "clip": "b = Clip(a, minus, six)",
    "clip pool": "c = Clip(a, zero, six) b = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(c)",
    "concat": "c = Neg(a) b = Concat<axis=2>(a, c)",
    "cubic": 'b = Resize<mode="cubic">(a, , scales)',
    "depth to space": "c = DepthToSpace<blocksize=2>(a) b = SpaceToDepth<blocksize=2>(c)",
    "elu": "b = Elu(a)",
    "gather": "b = Gather<axis=2>(a, rows)",
    "global pool": "b = GlobalAveragePool(a)",
    "greater": "c = Greater(a, one) b = Cast<to=1>(c)",
    "half pixel": 'b = Resize<mode="linear">(a, , scales)',
    "hard sigmoid": "b = HardSigmoid(a)",
    "leaky": "b = LeakyRelu<alpha=0.1>(a)",
    "linear": 'b = Resize<mode="linear", coordinate_transformation_mode="asymmetric">(a, , scales)',
    "max": "b = Max(a, one)",
    "max pool": "b = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(a)",
    "min": "b = Min(a, six)",
    "mul": "b = Mul(a, half)",
    "nearest": 'b = Resize<coordinate_transformation_mode="asymmetric", nearest_mode="floor">(a, , scales)',
    "negate": "b = Neg(a)",
    "pad with one": "b = Pad(a, pads, one)",
    "pad with zero": "b = Pad(a, pads, zero)",
    "reduce": "b = ReduceMax<axes=[2], keepdims=1>(a)",
    "reflect": 'b = Pad<mode="reflect">(a, pads)',
    "relu": "b = Relu(a)",
    "reshape": "c = Reshape(a, rows_of_49) h = Neg(c) b = Reshape(h, maps)",
    "sigmoid": "b = Sigmoid(a)",
    "silu": "c = Sigmoid(a) b = Mul(a, c)",
    "slice": "b = Slice(a, start, end, axis)",
    "softmax": "b = Softmax<axis=1>(a)",
    "split": "c, h = Split<axis=2>(a, sevens) b = Concat<axis=2>(h, c)",
    "table": "i = ArgMax<axis=1, keepdims=0>(x) c = DequantizeLinear(t, s, z) h = Gather(c, i) "
    "b = Transpose<perm=[0,3,1,2]>(h)",
    "transpose": "b = Transpose<perm=[0,1,3,2]>(a)",
    "where": "c = Greater(x, zero) b = Where(c, a, one)",
}

NETS = {
    "quantized behind it": """
        [float] a = Conv<group=32, pads=[1,1,1,1]>(x, v) {op}
        [quantize] q = QuantizeLinear(b, s, z) d = DequantizeLinear(q, s, z)
        e = DequantizeLinear<axis=0>(w, ws) [int8] y = Conv(d, e)""",
    "between products in INT8": """
        p = QuantizeLinear(x, s, z) f = DequantizeLinear(p, s, z)
        e = DequantizeLinear<axis=0>(w, ws) [int8] a = Conv(f, e) {op}
        [quantize] q = QuantizeLinear(b, s, z) d = DequantizeLinear(q, s, z) [int8_too] y = Conv(d, e)""",
    "quantized around it": """
        [float] f = Conv<group=32, pads=[1,1,1,1]>(x, v)
        p = QuantizeLinear(f, s, z) a = DequantizeLinear(p, s, z) {op} q = QuantizeLinear(b, s, z)
        d = DequantizeLinear(q, s, z) e = DequantizeLinear<axis=0>(w, ws) [int8] y = Conv(d, e)""",
    "dequantized before it": """
        q = QuantizeLinear(x, s, z) [dequantize] a = DequantizeLinear(q, s, z) {op}
        [float] y = Conv<group=32, pads=[1,1,1,1]>(b, v)""",
}

GRAPH = """
g (float[4,32,14,14] x, float[32,1,3,3] v, int8[32,32,1,1] w, float[32] ws, int8[32,32] t) => (float[4,32,H,W] y)
  <float s = {0.05}, int8 z = {0}, float zero = {0}, float one = {1}, float half = {0.5}, float six = {6},
   float minus = {-2}, float[4] scales = {1,1,2,2}, int64[8] pads = {0,0,1,1,0,0,1,1}, int64[3] rows = {5,1,2},
   int64[2] sevens = {7,7}, int64[4] rows_of_49 = {4,32,4,49}, int64[4] maps = {4,32,14,14},
   int64[1] start = {2}, int64[1] end = {9}, int64[1] axis = {2}> { %s }
"""


def network(onnx_model, net: str, op: str) -> OnnxModel:
    """The op in the net."""
    rng = np.random.default_rng(0)
    weights = {
        "v": rng.standard_normal((32, 1, 3, 3)).astype(np.float32),
        "w": rng.integers(-127, 128, (32, 32, 1, 1), np.int8),
        "ws": np.linspace(5e-3, 1e-2, 32).astype(np.float32),
        "t": rng.integers(-127, 128, (32, 32), np.int8),
    }
    return onnx_model(GRAPH % NETS[net].format(op=OPS[op]), opset=17, weights=weights)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return TensorRtTarget(tf32=False, timing_cache=str(tmp_path_factory.mktemp("timing")))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("net", NETS)
def test_a_quantizer_beside_an_op_changes_no_numbers(target, onnx_model, context, net, op):
    model = network(onnx_model, net, op)
    feeds = model.signature.random_feeds(np.random.default_rng(1))
    with open_onnx(model, optimize=False) as reference:
        wanted = reference.run(feeds)
    with target.open(BuildEngine(target=target).run(model, replace(context, target=target)), 1) as runner:
        found = runner.run(feeds)
    assert compare(wanted, found).sqnr_db > 35, compare(wanted, found)
