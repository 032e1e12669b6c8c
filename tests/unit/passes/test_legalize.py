from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from optkit.errors import PassError
from optkit.models import OnnxModel
from optkit.numerics import compare
from optkit.passes.legalize import legalize
from optkit.passes.lower_opset import LowerOpset
from optkit.targets.base import WEAK_TYPES, Dialect
from optkit.targets.onnxruntime import open_onnx

TENSORRT_8 = Dialect(
    int8=None, typed=False, builder_opset=17, lacks=frozenset({"LayerNormalization", "Gelu", "Mish"}), explicit=True
)

ENCODER = """
g ({float}[N,6,8] x) => ({float}[N,8] y) <{float}[8] s = {{1,2,3,4,5,6,7,8}}, {float}[8] b = {{1,0,1,0,1,0,1,0}},
  int64[1] axes = {{1}}> {{
    [norm] n = LayerNormalization<axis=-1, epsilon=0.001>(x, s, b)
    [gelu] a = Gelu<approximate="{approximate}">(n)
    [mean] y = ReduceMean<keepdims=0>(a, axes)
}}
"""


def ops(model: OnnxModel) -> list[str]:
    return [node.op_type for node in model.ir.graph]


def same(one: OnnxModel, other: OnnxModel) -> float:
    feeds = one.signature.random_feeds(np.random.default_rng(0), N=3)
    return compare(open_onnx(one).run(feeds), open_onnx(other).run(feeds)).sqnr_db


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_expresses_everything_in_opset_17(onnx_model, context, approximate):
    model = onnx_model(ENCODER.format(float="float", approximate=approximate))
    before = onnx.printer.to_text(ir.to_proto(model.ir))
    legal = legalize(model, TENSORRT_8, context)
    assert not {"LayerNormalization", "Gelu"} & set(ops(legal))
    assert legal.ir.opset_imports[""] == 17
    onnx.checker.check_model(ir.to_proto(legal.ir), full_check=True)
    assert same(model, legal) > 100
    assert legal.records[WEAK_TYPES] == {"precisions": [], "float32": []}
    assert onnx.printer.to_text(ir.to_proto(model.ir)) == before


def test_leaves_a_graph_alone_that_the_builder_reads(onnx_model, context):
    model = onnx_model(ENCODER.format(float="float", approximate="none"))
    assert legalize(model, Dialect(int8=None), context) is model


def test_says_what_a_typed_graph_held(onnx_model, context):
    body = "{ h = Cast<to=10>(x) r = Relu(h) f = Cast<to=1>(r) [exact] e = Exp(f) c = Cast<to=10>(e) y = Abs(c) }"
    model = onnx_model(f"g (float[N,4] x) => (float16[N,4] y) {body}")
    legal = legalize(model, TENSORRT_8, context)
    assert legal.records[WEAK_TYPES] == {"precisions": ["FP16"], "float32": ["exact"]}
    assert ops(legal) == ["Relu", "Exp", "Abs", "Cast"]  # the output keeps its type
    onnx.checker.check_model(ir.to_proto(legal.ir), full_check=True)
    assert same(model, legal) > 50


def test_does_not_hold_to_float32_what_reads_int8(onnx_model, context):
    body = """{
        q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) v = DequantizeLinear(w, s, z)
        [int8] m = MatMul(d, v) [exact] e = Exp(m) h = Cast<to=10>(e) y = Abs(h)
    }"""
    weights = "<float s = {0.1}, int8 z = {0}, int8[4,4] w = {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16}>"
    model = onnx_model(f"g (float[N,4] x) => (float16[N,4] y) {weights} {body}")
    legal = legalize(model, TENSORRT_8, context)
    assert legal.records[WEAK_TYPES] == {"precisions": ["FP16", "INT8"], "float32": ["exact"]}


def test_does_not_hold_to_float32_what_reads_int8_behind_casts_that_go(onnx_model, context):
    body = """{
        q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) h = Cast<to=10>(d) f = Cast<to=1>(h)
        [mean] m = ReduceMean(f) c = Cast<to=10>(m) y = Abs(c)
    }"""
    model = onnx_model(f"g (float[N,4] x) => (float16[1,1] y) <float s = {{0.1}}, int8 z = {{0}}> {body}")
    legal = legalize(model, TENSORRT_8, context)
    assert legal.records[WEAK_TYPES] == {"precisions": ["FP16", "INT8"], "float32": []}
    assert ops(legal) == ["QuantizeLinear", "DequantizeLinear", "ReduceMean", "Abs", "Cast"]


def test_what_is_held_behind_a_node_in_float32_is_in_float32(onnx_model, context):
    body = """{
        h = Cast<to=10>(x) r = Relu(h) f = Cast<to=1>(r) [up] e = Resize<mode="linear">(f, , two)
        q = QuantizeLinear(e, s, z) d = DequantizeLinear(q, s, z) c = Cast<to=10>(d) y = Abs(c)
    }"""
    weights = "<float s = {0.1}, int8 z = {0}, float[4] two = {1,1,2,2}>"
    model = onnx_model(f"g (float[N,2,4,4] x) => (float16[N,2,8,8] y) {weights} {body}")
    legal = legalize(model, TENSORRT_8, context)
    assert legal.records[WEAK_TYPES] == {"precisions": ["FP16", "INT8"], "float32": ["up", "up.held"]}
    assert same(model, legal) > 50


def test_keeps_an_fp16_input(onnx_model, context):
    model = onnx_model("g (float16[N,4] x) => (float16[N,4] y) { y = Relu(x) }")
    legal = legalize(model, TENSORRT_8, context)
    assert ops(legal) == ["Cast", "Relu", "Cast"]
    onnx.checker.check_model(ir.to_proto(legal.ir), full_check=True)
    assert same(model, legal) > 50


def test_spells_out_what_onnx_assumes(onnx_model, context):
    text = """g (float[N,2,5,5] x, int8[4,2,3,3] w) => (float[N,4,3,3] y) <float s = {0.1}, float[4] t = {1, 1, 1, 1}> {
        d = DequantizeLinear<axis=0>(w, t) y = Conv(x, d) }"""
    model = onnx_model(text)
    legal = legalize(model, replace(TENSORRT_8, typed=True), context)
    dequantize, conv = legal.ir.graph
    assert tuple(conv.attributes["kernel_shape"].value) == (3, 3)
    assert dequantize.inputs[2].const_value.numpy().tolist() == [0, 0, 0, 0]
    assert same(model, legal) > 100


def test_spells_out_which_part_of_a_shape_is_meant(onnx_model, context):
    text = """g (float[N,T,4] x) => (int64[1] y, int64[2] z, int64[2] most)
      <int64[1] least = {-9223372036854775808}, int64[1] cut = {-1}> {
        y = Shape<start=1, end=2>(x) z = Shape<start=-2>(x) s = Shape(x) most = Slice(s, least, cut) }"""
    model = onnx_model(text)
    legal = legalize(model, replace(TENSORRT_8, typed=True), context)
    shapes = [node for node in legal.ir.graph if node.op_type == "Shape"]
    assert shapes and not any(node.attributes for node in shapes)
    bounds = [[v.const_value.numpy().item() for v in n.inputs[1:3]] for n in legal.ir.graph if n.op_type == "Slice"]
    assert sorted(bounds) == [[0, 2], [1, 2], [1, 3]]
    feeds = {"x": np.zeros((3, 5, 4), np.float32)}
    with open_onnx(legal) as runner:
        found = runner.run(feeds)
    assert [found[name].tolist() for name in ("y", "z", "most")] == [[5], [5, 4], [3, 5]]
    assert legalize(legal, replace(TENSORRT_8, typed=True), context) is legal


def test_expresses_mish_in_what_opset_17_has(onnx_model, context):
    model = onnx_model("g (float[N,6] x) => (float[N,6] y) { [mish] y = Mish(x) }")
    legal = legalize(model, TENSORRT_8, context)
    assert ops(legal) == ["Softplus", "Tanh", "Mul"]
    onnx.checker.check_model(ir.to_proto(legal.ir), full_check=True)
    assert same(model, legal) > 100


@pytest.mark.parametrize(("mode", "older"), [("linear", "bilinear"), ("cubic", "bicubic"), ("nearest", "nearest")])
def test_a_grid_sample_has_its_older_mode(onnx_model, context, mode, older):
    text = f'g (float[N,2,4,4] x, float[N,3,3,2] at) => (float[N,2,3,3] y) {{ y = GridSample<mode="{mode}">(x, at) }}'
    model = onnx_model(text)
    legal = legalize(model, TENSORRT_8, context)
    (node,) = legal.ir.graph
    assert node.attributes.get_string("mode") == older
    assert same(model, legal) > 100
    with pytest.raises(PassError, match=r"node 'deep' \(GridSample\) takes only images at opset 17"):
        LowerOpset().run(
            onnx_model(
                f"""g (float[N,2,4,4,4] x, float[N,3,3,3,3] at) => (float[N,2,3,3,3] y) {{
                [deep] y = GridSample<mode="{mode}">(x, at) }}"""
            ),
            context,
        )
    newer = LowerOpset(to=20).run(onnx_model(text, opset=21), context)
    assert [node.attributes.get_string("mode") for node in newer.ir.graph] == [mode]


def test_an_opset_between_keeps_what_it_has(onnx_model, context):
    model = onnx_model(
        "g (float[N,4,4] x) => (float[N,4] y) <int64[1] axes = {1}> { y = ReduceMean<keepdims=0>(x, axes) }"
    )
    lower = LowerOpset(to=18).run(model, context)
    onnx.checker.check_model(ir.to_proto(lower.ir), full_check=True)
    assert same(model, lower) > 100


def test_names_what_the_older_opset_cannot_express(onnx_model, context):
    model = onnx_model("g (float[4,4] x) => (float[4,4] y) { [bent] y = Mish(x) }")
    with pytest.raises(PassError, match=r"node 'bent' \(Mish\) does not exist at opset 17"):
        LowerOpset().run(model, context)
    model = onnx_model(
        'g (float[4] x, float[4] z, int64[2,1] i) => (float[4] y) { [top] y = ScatterND<reduction="max">(x, i, z) }'
    )
    assert LowerOpset(to=18).run(model, context).ir.opset_imports[""] == 18


CLIPPED = """
g (float[N,1,8,8] x) => (float[N,1,H,W] y)
  <float s = {{{scale}}}, {kind} z = {{{zero}}}, float l = {{{low}}}, float h = {{{high}}}> {{
    [clip] a = Clip(x, l, h) [between] b = {between}
    [q] q = QuantizeLinear(b, s, z) [d] y = DequantizeLinear(q, s, z)
}}
"""

MOVED = "Transpose<perm=[0,1,3,2]>(a)"


@pytest.mark.parametrize(
    ("change", "becomes"),
    [
        ({}, ["Relu"]),
        ({"between": "MaxPool<kernel_shape=[2,2]>(a)"}, ["Relu"]),
        ({"scale": 0.02}, ["Relu"]),
        ({"scale": 0.05}, ["Relu", "Min"]),  # 6 is 120 then, and 127 would come through
        ({"kind": "uint8"}, ["Relu", "Min"]),  # 6 is 127 of 255
        ({"between": "Abs(a)"}, ["Clip"]),
        ({"low": -6}, ["Max"]),  # -6 is -127, and -128 would come through
        ({"low": -7}, []),
        ({"low": 1}, ["Max"]),
    ],
)
def test_leaves_to_the_quantizer_what_it_clips_anyway(onnx_model, context, change, becomes):
    given = {"scale": 0.04724, "kind": "int8", "zero": 0, "low": 0, "high": 6, "between": MOVED, **change}
    model = onnx_model(CLIPPED.format(**given))
    weak = replace(TENSORRT_8, builder_opset=None)
    legal = legalize(model, weak, context)
    assert [node.op_type for node in legal.ir.graph if node.name in ("clip", "clip.low")] == becomes
    feeds = {"x": np.linspace(-9, 9, 64, dtype=np.float32).reshape(1, 1, 8, 8)}
    wanted, found = (open_onnx(m, optimize=False).run(feeds)["y"] for m in (model, legal))
    np.testing.assert_array_equal(found, wanted)
    assert legalize(model, replace(weak, typed=True, explicit=False), context) is model


def test_keeps_every_bound_for_others_than_the_quantizer(onnx_model, context):
    model = onnx_model("""g (float[N,4] x) => (float[N,4] y, float[N,4] b)
      <float s = {0.04}, int8 z = {0}, float l = {0}, float h = {6}> {
        [clip] a = Clip(x, l, h) q = QuantizeLinear(a, s, z) y = DequantizeLinear(q, s, z) b = Abs(a) }""")
    legal = legalize(model, TENSORRT_8, context)
    assert ops(legal)[:2] == ["Relu", "Min"]
    assert same(model, legal) > 999


def test_what_is_float32_beside_fp16_stays_so_when_a_clip_is_written_in_two(onnx_model, context):
    model = onnx_model("""g (float16[8] x) => (float[8] y)
      <float s = {0.1}, int8 z = {0}, float l = {-1}, float h = {5}> {
      [n] n = Neg(x) [c] c = Cast<to=1>(n) [clip] a = Clip(c, l, h) [q] q = QuantizeLinear(a, s, z)
      [d] y = DequantizeLinear(q, s, z) }""")
    weak = legalize(model, TENSORRT_8, context).records[WEAK_TYPES]
    assert weak == {"precisions": ["FP16", "INT8"], "float32": ["clip.low", "clip"]}


def test_names_every_node_and_keeps_the_names_that_are_there(onnx_model, context):
    model = onnx_model("g (float[N,4] x) => (float[N,4] y) { a = Abs(x) [Abs_0] b = Neg(a) y = Abs(b) }")
    legal = legalize(model, TENSORRT_8, context)
    assert [node.name for node in legal.ir.graph] == ["Abs_0_", "Abs_0", "Abs_2"]
    assert not next(iter(model.ir.graph)).name
