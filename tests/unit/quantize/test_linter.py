from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from optkit.quantize.linter import is_quantized, lint
from optkit.targets.base import ORT_CPU, TENSORRT
from optkit.targets.onnxruntime import OnnxRuntimeTarget

RNG = np.random.default_rng(0)
ARRAYS = {
    "s": np.float32(0.1),
    "s2": np.float32(0.2),
    "z": np.int8(0),
    "u": np.uint8(7),
    "ws": np.full(32, 0.01, np.float32),
    "wz": np.zeros(32, np.int8),
    "w": RNG.integers(-127, 128, (32, 32, 3, 3)).astype(np.int8),
    "f": RNG.standard_normal((32, 32, 3, 3)).astype("f"),
    "m": RNG.integers(-127, 128, (32, 8)).astype(np.int8),
    "stem": RNG.integers(-127, 128, (32, 3, 3, 3)).astype(np.int8),
    "dw": RNG.integers(-127, 128, (32, 1, 3, 3)).astype(np.int8),
    "b": np.arange(32, dtype=np.int32),
    "bias": np.arange(8, dtype=np.float32),
}
HEAD = "g (float[n,32,8,8] x) => (float[n,c,h,v] y) {"
PAIR = "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)"
WEIGHT = "wd = DequantizeLinear <axis = 0> (w, ws, wz)"
GOOD = f"{HEAD} {PAIR} {WEIGHT} c1 = Conv(d, wd) y = Exp(c1) }}"

DEPTHWISE = f"{HEAD} {PAIR} wd = DequantizeLinear <axis = 0> (dw, ws, wz) c1 = Conv <group = 32> (d, wd)"

AT_RUN_TIME = "q, qs, qz = DynamicQuantizeLinear(x) i0 = MatMulInteger(q, m, qz) f0 = Cast <to = 1> (i0)"
FLAT = f"g (float[n,32] x) => (float[n,8] y) {{ {PAIR} wd = DequantizeLinear(m, s, z)"
SATURATES = replace(ORT_CPU, sums_in_16_bits=True)

# rule, the graph that breaks it, the op type of the node that is named, and the policy that objects
BROKEN = [
    (
        "E1",
        f"{HEAD} q = QuantizeLinear(x, s, u) d = DequantizeLinear(q, s, u) {WEIGHT} c1 = Conv(d, wd) y = Exp(c1) }}",
        "QuantizeLinear",
        TENSORRT,
    ),
    ("E2", GOOD, "QuantizeLinear", TENSORRT),
    (
        "E3",
        f"{HEAD} {PAIR} {WEIGHT} bd = DequantizeLinear <axis = 0> (b, ws) c1 = Conv(d, wd, bd) y = Exp(c1) }}",
        "Conv",
        TENSORRT,
    ),
    (
        "E4",
        f"{HEAD} q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s2, z) {WEIGHT} c1 = Conv(d, wd) y = Exp(c1) }}",
        "DequantizeLinear",
        TENSORRT,
    ),
    ("E5", f"{HEAD} q, t, u0 = DynamicQuantizeLinear(x) y = Exp(x) }}", "DynamicQuantizeLinear", TENSORRT),
    (
        "W1",
        f"{HEAD} q = QuantizeLinear(x, ws, wz) d = DequantizeLinear(q, ws, wz) y = Exp(d) }}",
        "QuantizeLinear",
        TENSORRT,
    ),
    (
        "W2",
        f"{HEAD} {PAIR} wd = DequantizeLinear <axis = 1> (w, ws, wz) c1 = Conv(d, wd) y = Exp(c1) }}",
        "Conv",
        TENSORRT,
    ),
    ("W3", f"{HEAD} {PAIR} a = Add(d, d) y = Exp(a) }}", "Add", TENSORRT),
    (
        "W4",
        f"{HEAD} {PAIR} r = QuantizeLinear(d, s2, z) e = DequantizeLinear(r, s2, z) y = Exp(e) }}",
        "QuantizeLinear",
        TENSORRT,
    ),
    (
        "W5",
        f"{HEAD} {PAIR} wd = DequantizeLinear(m, s, z) c1 = MatMul(d, wd) y = Exp(c1) }}",
        "MatMul",
        TENSORRT,
    ),
    ("W7", f"{HEAD} q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }}", "DequantizeLinear", TENSORRT),
    ("W8", f"{HEAD} {PAIR} c1 = Conv(d, f) y = Exp(c1) }}", "Conv", TENSORRT),
    ("W9", GOOD, "Conv", ORT_CPU),
    ("W9", f"{DEPTHWISE} g = Sigmoid(c1) a = Mul(c1, g) y = Exp(a) }}", "Conv", TENSORRT),
    ("W10", f"{HEAD} {AT_RUN_TIME} r = Exp(f0) t = Mul(qs, ws) y = Mul(f0, t) }}", "MatMulInteger", ORT_CPU),
    ("W10", f"{HEAD} {AT_RUN_TIME} y = Mul(f0, qs) }}", "MatMulInteger", ORT_CPU),
    (
        "W10",
        f"{HEAD} q = QuantizeLinear(x, s, u) i0 = MatMulInteger(q, m, u) y = Cast <to = 1> (i0) }}",
        "MatMulI",
        ORT_CPU,
    ),
    ("E2", f"{HEAD} {AT_RUN_TIME} t = Mul(qs, s) y = Mul(f0, t) }}", "MatMulInteger", ORT_CPU),
    ("W13", f"{FLAT} c1 = MatMul(d, wd) b0 = Add(c1, bias) y = Exp(b0) }}", "MatMul", ORT_CPU),
    ("W13", f"{FLAT} c1 = Gemm(d, wd, bias) y = Exp(c1) }}", "Gemm", ORT_CPU),
    ("W11", f"{HEAD} q, qs, qz = DynamicQuantizeLinear(x) y = ConvInteger(q, w, qz) }}", "ConvInteger", ORT_CPU),
    ("W12", f"{HEAD} {AT_RUN_TIME} t = Mul(qs, s) y = Mul(f0, t) }}", "MatMulInteger", SATURATES),
    (
        "W12",
        f"{HEAD} q = QuantizeLinear(x, s, u) d = DequantizeLinear(q, s, u) {WEIGHT} c1 = Conv(d, wd) y = Exp(c1) }}",
        "Conv",
        SATURATES,
    ),
]


def parsed(net, text, **replaced):
    arrays = {name: array for name, array in (ARRAYS | replaced).items() if f"{name})" in text or f"{name}," in text}
    model = net(text, **arrays)
    for index, node in enumerate(model.ir.graph):
        node.name = f"{node.op_type}_{index}"
    return model


@pytest.mark.parametrize(("rule", "text", "op_type", "policy"), BROKEN, ids=[f"{row[0]}-{row[2]}" for row in BROKEN])
def test_each_rule_finds_its_fault(net, rule, text, op_type, policy):
    replaced = {"s": np.float32(0)} if rule == "E2" else {}
    findings = [finding for finding in lint(parsed(net, text, **replaced), policy) if finding.rule == rule]
    assert findings
    assert findings[0].node.startswith(op_type)
    assert findings[0].is_error == rule.startswith("E")
    assert findings[0].mend
    assert str(findings[0]).startswith(f"{rule} {findings[0].node}: ")


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"{DEPTHWISE} g = Sigmoid(c1) a = Mul(c1, g) r = QuantizeLinear(a, s2, z) e = DequantizeLinear(r, s2, z) "
        "y = Exp(e) }",
        f"{DEPTHWISE} t = Cast <to = 1> (c1) r = QuantizeLinear(t, s2, z) e = DequantizeLinear(r, s2, z) y = Exp(e) }}",
        f"{DEPTHWISE} r = QuantizeLinear(c1, s2, z) e = DequantizeLinear(r, s2, z) t = QuantizeLinear(c1, s2, z) "
        "k = DequantizeLinear(t, s2, z) y = Mul(e, k) }",
        "g (float16[n,3,8,8] i) => (float[n,c,h,v] y) { x = Cast <to = 1> (i) "
        f"{PAIR} wd = DequantizeLinear <axis = 0> (stem, ws, wz) c1 = Conv(d, wd) y = Exp(c1) }}",
    ],
    ids=[
        "a convolution",
        "a depthwise one whose result is quantized",
        "behind a Cast",
        "twice",
        "a stem behind a Cast",
    ],
)
def test_a_sound_model_has_no_findings(net, text):
    assert lint(parsed(net, text), TENSORRT) == ()


@pytest.mark.parametrize("product", ["c0 = MatMul(d, wd) c1 = Add(c0, bias)", "c1 = Gemm(d, wd, bias)"])
def test_onnx_runtime_quantizes_the_bias_of_a_product_whose_output_is_quantized(net, product, tmp_path, context):
    text = f"{FLAT} {product} r = QuantizeLinear(c1, s, u) y = DequantizeLinear(r, s, u) }}".replace("s, z", "s, u", 2)
    model = parsed(net, text)
    assert lint(model, ORT_CPU) == ()
    assert OnnxRuntimeTarget().build(model, tmp_path, context).records["nodes"]["QGemm"] == 1


def test_products_at_run_time_are_sound_where_their_neighbours_do_not_saturate(net):
    text = f"{HEAD} {AT_RUN_TIME} t = Mul(ws, qs) y = Mul(t, f0) }}"
    narrow = np.full((32, 8), 64, np.int8)
    assert lint(parsed(net, text, m=narrow, ws=np.full(8, 0.1, np.float32)), SATURATES) == ()
    # What one channel has too much of is counted
    narrow[:2, 3] = 65
    (finding,) = lint(parsed(net, text, m=narrow, ws=np.full(8, 0.1, np.float32)), SATURATES)
    assert finding.message == "neighbouring weights add up to more than 128 in 1 of 8 channels"


def test_signed_activations_do_not_saturate(net):
    text = f"{HEAD} {PAIR} {WEIGHT} c1 = Conv(d, wd) y = Exp(c1) }}"
    assert "W12" not in {finding.rule for finding in lint(parsed(net, text), SATURATES)}


@pytest.mark.parametrize(("place", "rule"), [(0, "W12"), (1, "E2")])
def test_an_lstm_is_judged_by_its_weights_and_scales(place, rule):
    import onnx
    import onnx_ir as ir

    from optkit.models import OnnxModel, Signature

    rng = np.random.default_rng(0)
    arrays = [rng.integers(-60, 61, (1, rows, 32)).astype(np.int8) for rows in (6, 8)]
    scales = [np.full((1, 32), 0.1, np.float32) for _ in range(2)]
    zero = np.zeros((1, 32), np.int8)

    def model():
        proto = onnx.parser.parse_model(
            '<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]> g (float[s,b,6] x) => (float[1,b,8] h) {'
            " y, h = com.microsoft.DynamicQuantizeLSTM <hidden_size = 8> (x, w, r,,,,,, ws, z, rs, z) }"
        )
        named = dict(zip(("w", "r", "ws", "rs", "z"), (*arrays, *scales, zero), strict=True))
        proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in named.items())
        return OnnxModel(ir.from_proto(proto), Signature((), ()))

    assert lint(model(), SATURATES) == ()
    # One direction, two neighbouring inputs of one gate; one scale
    arrays[1][0, 4:6, 7] = 100 - 200 * place
    if place:
        scales[1][0, 7] = np.nan
    assert rule in {finding.rule for finding in lint(model(), SATURATES)}
    assert {finding.rule for finding in lint(model(), TENSORRT)} == {"E5"}


def test_uint8_is_what_onnx_runtime_wants(net):
    text = f"{HEAD} q = QuantizeLinear(x, s, u) d = DequantizeLinear(q, s, u) y = Exp(d) }}"
    assert lint(parsed(net, text), ORT_CPU) == ()


def test_a_float_weight_behind_its_own_pair_is_as_good_as_a_stored_one(net):
    weight = "wq = QuantizeLinear <axis = 0> (f, ws, wz) wd = DequantizeLinear <axis = 0> (wq, ws, wz)"
    text = f"{HEAD} {PAIR} {weight} c1 = Conv(d, wd) y = Exp(c1) }}"
    assert lint(parsed(net, text), TENSORRT) == ()


def test_microsoft_pairs_are_named():
    import onnx
    import onnx_ir as ir

    from optkit.models import OnnxModel, Signature

    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]> g (float[4] x) => (float[4] y)'
        " <float s = {0.1}>"
        " { q = com.microsoft.QuantizeLinear(x, s) d = com.microsoft.DequantizeLinear(q, s) y = Exp(d) }"
    )
    findings = lint(OnnxModel(ir.from_proto(proto), Signature((), ())), TENSORRT)
    assert [finding.rule for finding in findings] == ["W6", "W6"]


def test_only_a_quantized_model_is_there_to_judge(net):
    assert is_quantized(parsed(net, GOOD))
    assert not is_quantized(parsed(net, f"{HEAD} y = Exp(x) }}"))
