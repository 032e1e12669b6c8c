from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from optkit.quantize.measure import decibels, noise_to_signal
from optkit.quantize.placement import name_nodes, place
from optkit.quantize.qdq import Quantization, quantize_weights, write
from optkit.targets.base import ORT_CPU
from optkit.targets.onnxruntime import OnnxRuntimeTarget, open_onnx

RNG = np.random.default_rng(0)
POLICY = replace(ORT_CPU, rules=ORT_CPU.dynamic, sums_in_16_bits=True)


def normal(*shape):
    return RNG.standard_normal(shape).astype("f")


def written(model, exclude=(), policy=POLICY, method="max", biases=None):
    name_nodes(model)
    placement = place(model, policy, exclude)
    weights = quantize_weights(model, placement, policy, {}, method)
    return write(model, Quantization(placement, {}, weights, biases or {}))


def ops(model):
    return Counter(node.op_type for node in model.ir.graph)


def engine_ops(model, tmp_path, context):
    """What ONNX Runtime makes of a model."""
    engine = OnnxRuntimeTarget().build(model, tmp_path, context)
    return engine.records["nodes"]


def sqnr(model, other, **feeds):
    with open_onnx(model) as exact, open_onnx(other) as quantized:
        return decibels(noise_to_signal([exact.run(feeds)], [quantized.run(feeds)]))


@pytest.fixture
def attention(net):
    """Three products of one tensor, one of another, and one of two activations."""
    return net(
        """g (float[b,8,32] x) => (float[b,8,32] y) {
            q0 = MatMul(x, wq) q = Add(q0, bq) k0 = MatMul(x, wk) k = Add(bk, k0) v = MatMul(x, wv)
            t = Transpose <perm = [0, 2, 1]> (k) s = MatMul(q, t) p = Softmax(s) c = MatMul(p, v) y = MatMul(c, wo)
        }""",
        **{name: normal(32, 32) / 6 for name in ("wq", "wk", "wv", "wo")},
        bq=normal(32),
        bk=normal(32),
    )


@pytest.fixture
def lstm(net):
    return net(
        """g (float[s,b,12] x) => (float[s,2,b,64] y, float[2,b,64] h) {
            y, h = LSTM <hidden_size = 64, direction = "bidirectional"> (x, w, r, bias)
        }""",
        w=normal(2, 256, 12) * np.float32([[[1.0]], [[0.2]]]),
        r=normal(2, 256, 64) / 8,
        bias=normal(2, 512),
    )


def test_products_that_read_one_tensor_share_what_quantizes_it(attention):
    after = written(attention)
    assert ops(after) == Counter(
        DynamicQuantizeLinear=2, MatMulInteger=4, Cast=4, Mul=8, Add=2, MatMul=2, Transpose=1, Softmax=1
    )
    onnx.checker.check_model(ir.to_proto(after.ir), full_check=True)
    assert sqnr(attention, after, x=normal(2, 8, 32)) > 30


def test_the_float_model_stays_as_it_is(attention):
    name_nodes(attention)
    before = ir.to_proto(attention.ir).SerializeToString()
    written(attention)
    assert ir.to_proto(attention.ir).SerializeToString() == before


def test_onnx_runtime_fuses_all_of_it(attention, tmp_path, context):
    found = engine_ops(written(attention), tmp_path, context)
    assert found["DynamicQuantizeMatMul"] == 1  # reads a tensor alone
    assert found["MatMulIntegerToFloat"] == 3
    assert found["DynamicQuantizeLinear"] == 1
    assert "Add" not in found  # biases are part of the products
    assert not {"MatMulInteger", "Cast"} & found.keys()


def test_integers_are_the_float_products_of_what_they_stand_for(net):
    weight = normal(16, 4)
    model = net("g (float[b,16] x) => (float[b,4] y) { y = MatMul(x, w) }", w=weight)
    after = written(model)
    x = normal(3, 16)
    low, high = min(x.min(), 0), max(x.max(), 0)
    step = np.float32((high - low) / 255)
    zero = np.rint(-low / step)
    read = (np.clip(np.rint(x / step) + zero, 0, 255) - zero) * step
    name_nodes(model)
    (stored,) = quantize_weights(model, place(model, POLICY), POLICY, {}).values()
    with open_onnx(after) as runner:
        np.testing.assert_allclose(runner.run({"x": x})["y"], read @ stored.dequantized, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("bias", ["", ", b"])
def test_gemm_keeps_its_bias_its_factor_and_its_layout(net, transposed, bias, tmp_path, context):
    weight = normal(24, 40)
    model = net(
        f"g (float[n,24] x) => (float[n,40] y) {{ y = Gemm <transB = {transposed}, alpha = 0.5> (x, w{bias}) }}",
        w=weight.T.copy() if transposed else weight,
        **({"b": normal(40) * 10} if bias else {}),
    )
    after = written(model)
    onnx.checker.check_model(ir.to_proto(after.ir), full_check=True)
    assert sqnr(model, after, x=normal(5, 24)) > 30
    assert engine_ops(after, tmp_path, context) == {"DynamicQuantizeMatMul": 1}


def test_a_corrected_bias_is_written(net):
    model = net(
        "g (float[n,8] x) => (float[n,4] y, float[n,4] z) { y = Gemm(x, w, b) p = MatMul(x, w) z = Add(p, b) }",
        w=normal(8, 4),
        b=normal(4),
    )
    name_nodes(model)
    gemm, _, add = (str(node.name) for node in model.ir.graph)
    shift = np.float32([1, 2, 3, 4])
    before, after = written(model), written(model, biases={gemm: normal(4), add: shift})
    with open_onnx(before) as old, open_onnx(after) as new:
        feeds = {"x": np.zeros((1, 8), np.float32)}
        assert not np.allclose(old.run(feeds)["y"], new.run(feeds)["y"])
        np.testing.assert_array_equal(new.run(feeds)["z"][0], shift)


def test_weights_that_would_saturate_are_bounded_where_the_kernels_do(net):
    model = net("g (float[n,64] x) => (float[n,8] y) { y = MatMul(x, w) }", w=np.full((64, 8), 1.0, np.float32))
    stored = [
        next(iter(written(model, policy=replace(POLICY, sums_in_16_bits=narrow)).ir.graph.initializers.values()))
        for narrow in (True, False)
    ]
    assert [value.const_value.numpy().max() for value in stored] == [64, 127]


def test_an_lstm_becomes_the_one_of_onnx_runtime(lstm, tmp_path, context):
    after = written(lstm)
    assert ops(after) == {"DynamicQuantizeLSTM": 1}
    assert after.ir.graph.opset_imports["com.microsoft"] == 1
    (node,) = after.ir.graph
    scale = node.inputs[8].const_value.numpy()
    assert scale.shape == (2, 256)
    # The directions have scales of their own
    assert scale[1].mean() < scale[0].mean() / 2
    assert sqnr(lstm, after, x=normal(20, 3, 12)) > 35
    assert engine_ops(after, tmp_path, context) == {"DynamicQuantizeLSTM": 1}


def test_an_lstm_keeps_its_optional_inputs_and_attributes(net):
    model = net(
        """g (float[s,b,6] x, int32[b] lengths, float[1,b,64] h0, float[1,b,64] c0) => (float[1,b,64] h) {
            h0n = Neg(h0)
            y, h = LSTM <hidden_size = 64, direction = "reverse", clip = 3.0> (x, w, r, , lengths, h0n, c0)
        }""",
        w=normal(1, 256, 6),
        r=normal(1, 256, 64) / 8,
    )
    feeds = {"x": normal(5, 2, 6), "lengths": np.int32([5, 3]), "h0": normal(1, 2, 64), "c0": normal(1, 2, 64)}
    assert sqnr(model, written(model), **feeds) > 30


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("y, h = GRU <hidden_size = 8> (x, w, r)", "there is no INT8 GRU"),
        ("y, h = LSTM <hidden_size = 8, layout = 1> (x, w, r)", "its batch comes first"),
        ("y, h = LSTM <hidden_size = 8> (x, w, r)", "an LSTM with 8 hidden units is too small for INT8 to pay"),
        ("v = Neg(w) y, h = LSTM <hidden_size = 8> (x, v, r)", "its weights are not constants"),
    ],
)
def test_recurrent_layers_that_stay_float_say_why(net, text, reason):
    gates = 24 if "GRU" in text else 32
    model = net(f"g (float[s,b,6] x) => (float[1,b,8] h) {{ {text} }}", w=normal(1, gates, 6), r=normal(1, gates, 8))
    name_nodes(model)
    placement = place(model, POLICY)
    assert list(placement.kept_float.values()) == [reason]
    assert not placement.int8


def test_convolutions_stay_float_and_what_is_excluded_too(net):
    model = net(
        """g (float[b,4,8,8] x) => (float[b,5] y) {
            c = Conv(x, w) f = Flatten(c) h = Gemm(f, v) y = Gemm(h, u)
        }""",
        w=normal(4, 4, 1, 1),
        v=normal(256, 7),
        u=normal(7, 5),
    )
    name_nodes(model)
    placement = place(model, POLICY, ["Gemm_2"])
    assert placement.kept_float == {
        "Conv_0": "the target has no rule for Conv",
        "Gemm_2": "excluded by the recipe",
    }
    after = written(model, ["Gemm_2"])
    assert ops(after)["Conv"] == ops(after)["Gemm"] == ops(after)["MatMulInteger"] == 1
    assert after.ir.graph.node("Gemm_3").op_type == "MatMulInteger"


def test_no_activation_is_calibrated(attention):
    name_nodes(attention)
    placement = place(attention, POLICY)
    assert not placement.tensors
    assert placement.dynamic == {"MatMul_0", "MatMul_2", "MatMul_4", "MatMul_9"} == set(placement.int8)
