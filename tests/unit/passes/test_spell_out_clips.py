from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from optkit.models import OnnxModel
from optkit.passes.spell_out_clips import SpellOutClips
from optkit.targets.onnxruntime import open_onnx

SCALE = 0.047
STEPS = np.arange(-1.5, 1.75, 0.25)
"""How far a bound is from the last number that the quantizer has, in numbers."""

CLIPPED = """
g ({float}[16] x) => (float[M] y, {float}[K] z)
  <float s = {{0.04724}}, {kind} o = {{{zero}}}, {float} l = {{{low}}}, {float} h = {{{high}}}, int64[1] start = {{1}},
   int64[1] end = {{9}}> {{
    a = Clip(x, l, h) {between} q = QuantizeLinear(b, s, o) y = DequantizeLinear(q, s, o) z = Abs({other}) }}
"""

MOVED = "c = Unsqueeze(a, start) b = Squeeze(c, start)"


def clips(model: OnnxModel) -> list[str]:
    return [node.op_type for node in model.ir.graph if node.op_type in ("Clip", "Relu", "Max", "Min")]


def run(model: OnnxModel, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    with open_onnx(model, optimize=False) as runner:
        return list(runner.run(feeds).values())


def test_no_number_changes_whatever_the_bounds(onnx_model, context):
    feeds = {"x": np.linspace(SCALE * -140, SCALE * 140, 9999, dtype=np.float32)}
    seen = set()
    for low, high in [(0, 127 + step) for step in STEPS] + [(-128 + step, 128) for step in STEPS]:
        model = onnx_model(
            f"""g (float[9999] x) => (float[9999] y)
              <float s = {{{SCALE}}}, int8 z = {{0}},
               float l = {{{SCALE * low:.9g}}}, float h = {{{SCALE * high:.9g}}}> {{
                a = Clip(x, l, h) q = QuantizeLinear(a, s, z) y = DequantizeLinear(q, s, z) }}"""
        )
        before = onnx.printer.to_text(ir.to_proto(model.ir))
        edited = SpellOutClips().run(model, context)
        seen.add(next(iter(edited.ir.graph)).op_type)
        np.testing.assert_array_equal(run(edited, feeds), run(model, feeds))
        assert onnx.printer.to_text(ir.to_proto(model.ir)) == before
        assert SpellOutClips().run(edited, context) is edited
    assert seen == {"Relu", "Max", "QuantizeLinear"}


@pytest.mark.parametrize(
    ("change", "becomes"),
    [
        ({}, ["Relu"]),
        ({"low": -7}, []),
        ({"low": -1}, ["Max"]),
        ({"high": 5}, ["Relu", "Min"]),
        ({"low": -1, "high": 5}, ["Max", "Min"]),
        ({"low": -7, "high": 5}, ["Min"]),
        ({"between": "c = Clip(a, l, h) b = Identity(c)"}, ["Relu", "Min", "Relu"]),
        ({"between": "b = Relu(a)", "low": -1}, ["Max", "Min", "Relu"]),
        ({"between": "b = Clip(a, l, h)", "low": -7}, []),
        ({"between": "b = Concat<axis=0>(a, a)"}, ["Relu"]),
        ({"between": "b = Slice(a, start, end)"}, ["Relu"]),
        ({"between": "c = Unsqueeze(a, start) d, e = Split<axis=0, num_outputs=2>(c) b = Squeeze(d, start)"}, ["Relu"]),
        ({"between": "b = Abs(a)"}, ["Clip"]),
        ({"between": "b = Identity(a)", "other": "a"}, ["Relu", "Min"]),
        ({"kind": "uint8"}, ["Relu", "Min"]),
        ({"zero": 5}, ["Relu", "Min"]),
        ({"float": "float16", "between": "b = Cast<to=1>(a)"}, ["Clip"]),
    ],
)
def test_keeps_the_bounds_that_the_quantizers_do_not_repeat(onnx_model, context, change, becomes):
    given = {"float": "float", "kind": "int8", "zero": 0, "low": 0, "high": 6, "between": MOVED, "other": "x", **change}
    model = onnx_model(CLIPPED.format(**given))
    edited = SpellOutClips().run(model, context)
    assert clips(edited) == becomes
    onnx.checker.check_model(ir.to_proto(edited.ir), full_check=True)
    feeds = {"x": np.linspace(-9, 9, 16).astype("float16" if given["float"] == "float16" else "float32")}
    for found, wanted in zip(run(edited, feeds), run(model, feeds), strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(("high", "becomes"), [(6, ["Relu"]), (5, ["Clip"])])
def test_leaves_to_the_kernel_what_a_convolution_in_int8_gives(onnx_model, context, high, becomes):
    model = onnx_model(f"""g (float[1,2,4,4] x) => (float[1,2,4,4] y)
      <int8[2,2,1,1] w = {{1,2,3,4}}, float s = {{0.04724}}, int8 o = {{0}}, float l = {{0}}, float h = {{{high}}}> {{
        p = QuantizeLinear(x, s, o) d = DequantizeLinear(p, s, o) e = DequantizeLinear(w, s, o) c = Conv(d, e)
        a = Clip(c, l, h) q = QuantizeLinear(a, s, o) y = DequantizeLinear(q, s, o) }}""")
    assert clips(SpellOutClips().run(model, context)) == becomes


def test_leaves_alone_a_clip_that_says_where_to_slice(onnx_model, context):
    model = onnx_model("""g (float[1,L] x) => (float[1,M] y) <float s = {0.04724}, int8 z = {0}, int64[1] start = {0},
      int64[1] axis = {1}, int64 most = {8}> {
        n = Shape<start=1, end=2>(x) end = Clip(n, , most) b = Slice(x, start, end, axis)
        q = QuantizeLinear(b, s, z) y = DequantizeLinear(q, s, z) }""")
    assert SpellOutClips().run(model, context) is model


def test_keeps_both_bounds_where_the_largest_is_asked_for(onnx_model, context):
    model = onnx_model("""g (float[1,1,8] x) => (float[1,1,4] y, float[1,1,4] w) <float s = {0.04724}, int8 z = {0},
      float l = {-7}, float h = {7}> {
        a = Clip(x, l, h) m, i = MaxPool<kernel_shape=[2], strides=[2]>(a) q = QuantizeLinear(m, s, z)
        y = DequantizeLinear(q, s, z) w = Cast<to=1>(i) }""")
    edited = SpellOutClips().run(model, context)
    assert clips(edited) == ["Max", "Min"]
    feeds = {"x": np.array([[[8, 9, -9, -8, 1, 2, 6, 7]]], dtype=np.float32)}
    for found, wanted in zip(run(edited, feeds), run(model, feeds), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_takes_no_longer_for_many_branches(onnx_model, context):
    doubled = " ".join(f"a{i + 1} = Concat<axis=0>(a{i}, a{i})" for i in range(18))
    model = onnx_model(
        f"""g (float[1] x) => (float[N] y) <float s = {{0.04724}}, int8 z = {{0}}, float l = {{0}}, float h = {{6}}> {{
        a0 = Clip(x, l, h) {doubled} q = QuantizeLinear(a18, s, z) y = DequantizeLinear(q, s, z) }}"""
    )
    assert clips(SpellOutClips().run(model, context)) == ["Relu"]


def clipped(onnx_model, low: float, high: float, scale: float = 0.05) -> OnnxModel:
    return onnx_model(f"""g (float[8] x) => (float[8] y)
      <float s = {{{scale}}}, int8 z = {{0}}, float l = {{{low}}}, float h = {{{high}}}> {{
        a = Clip(x, l, h) q = QuantizeLinear(a, s, z) y = DequantizeLinear(q, s, z) }}""")


def test_the_largest_float_is_no_bound(onnx_model, context):
    assert clips(SpellOutClips().run(clipped(onnx_model, 0, 3.4028235e38), context)) == ["Relu"]


def test_a_bound_that_is_no_number_stays_with_clip_which_ignores_it(onnx_model, context):
    model = clipped(onnx_model, 0, 5)
    model.ir.graph.initializers["l"].const_value = ir.tensor(np.array(np.nan, np.float32), name="l")
    assert SpellOutClips().run(model, context) is model


def test_a_negative_scale_repeats_no_bound(onnx_model, context):
    model = clipped(onnx_model, 7, 8, scale=-0.05)
    feeds = {"x": np.linspace(-9, 9, 8, dtype=np.float32)}
    for found, wanted in zip(run(SpellOutClips().run(model, context), feeds), run(model, feeds), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_a_function_that_is_named_like_an_op_is_another(onnx_model, context):
    model = onnx_model("""<ir_version: 10, opset_import: ["" : 20, "local" : 1]>
      g (float[8] x) => (float[8] y) <float s = {0.05}, int8 z = {0}, float l = {-7}, float h = {7}> {
        a = Clip(x, l, h) b = local.Identity(a) q = QuantizeLinear(b, s, z) y = DequantizeLinear(q, s, z) }
      <domain: "local", opset_import: ["" : 20]> Identity (v) => (r) { r = Add(v, v) }""")
    assert SpellOutClips().run(model, context) is model


def test_new_names_stand_beside_those_that_exporters_give(onnx_model, context):
    model = onnx_model("""g (float[8] x, bool c) => (float[8] y, float[8] o)
      <float s = {0.05}, int8 z = {0}, float l = {-1}, float h = {5}> {
        [clip] a = Clip(x, l, h) [clip_low] q = QuantizeLinear(a, s, z) y = DequantizeLinear(q, s, z)
        o = If(c) <then_branch = t () => (float[8] r) { val_0 = Abs(a) r = Neg(val_0) },
                   else_branch = e () => (float[8] u) { u = Abs(a) }> }""")
    edited = SpellOutClips().run(model, context)
    feeds = {"x": np.linspace(-9, 9, 8, dtype=np.float32), "c": np.array(True)}
    for found, wanted in zip(run(edited, feeds), run(model, feeds), strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("beside", ["", "m = Neg(c)"])
def test_only_what_alone_reads_a_convolution_in_int8_is_in_its_kernel(onnx_model, context, beside):
    outputs = "float[1,2,4,4] y" + (", float[1,2,4,4] m" if beside else "")
    model = onnx_model(f"""g (float[1,2,4,4] x) => ({outputs})
      <int8[2,2,1,1] w = {{1,2,3,4}}, float s = {{0.04724}}, int8 o = {{0}}, float l = {{0}}, float h = {{5}}> {{
        p = QuantizeLinear(x, s, o) d = DequantizeLinear(p, s, o) e = DequantizeLinear(w, s, o) c = Conv(d, e) {beside}
        a = Clip(c, l, h) q = QuantizeLinear(a, s, o) y = DequantizeLinear(q, s, o) }}""")
    assert clips(SpellOutClips().run(model, context)) == (["Relu", "Min"] if beside else ["Clip"])
