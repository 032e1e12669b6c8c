from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from optkit.context import Context
from optkit.data import Batch
from optkit.errors import PostconditionError, PreconditionError
from optkit.models import OnnxModel
from optkit.passes.cast_fp16 import CastFp16
from optkit.recipe import Recipe
from optkit.targets.onnxruntime import open_onnx
from optkit.targets.tensorrt_rtx import TensorRtRtxTarget

F16, F32 = ir.DataType.FLOAT16, ir.DataType.FLOAT


class Samples:
    """Calibration data of one input: constant samples, of 100 if not said otherwise."""

    def __init__(self, *values: float) -> None:
        self.values = values or (100.0,)

    def batches(self, split: str, size: int, limit: int | None = None) -> Iterator[Batch]:
        for value in self.values[:limit]:
            yield Batch({"x": np.full((size, 2), value, np.float32)}, None)


def kept(model: OnnxModel) -> dict[str, str]:
    return dict(model.records["kept_float32"])


def test_casts_stand_at_the_boundary(rewrites: Any) -> None:
    after = rewrites(
        CastFp16(),
        "g (float[n,2] x) => (float[n,2] y) <float[2,2] w = {1, 2, 3, 4}, float[2] b = {1, 2}> { y = Gemm(x, w, b) }",
        """g (float[n,2] x) => (float[n,2] y) <float[2,2] w = {1, 2, 3, 4}, float[2] b = {1, 2}> {
            h = Cast<to = 10>(x) g = Gemm(h, w, b) y = Cast<to = 1>(g) }""",
    )
    assert kept(after) == {}
    assert {value.dtype for value in after.ir.graph.initializers.values()} == {F16}


def test_what_has_no_float_stays(leaves: Any) -> None:
    leaves(CastFp16(), "g (int64[n,2] x) => (int64[n,2] y) <int64 one = {1}> { y = Add(x, one) }")
    leaves(CastFp16(), "g (float[n,2] x) => (int64[2] y) { y = Shape(x) }")


def test_indices_and_sizes_stay_exact(rewrites: Any) -> None:
    """Relu runs in FP16; the index arithmetic behind it does not, and Resize takes its scales in float32."""
    rewrites(
        CastFp16(),
        """g (float[1,1,2,2] x) => (float[1,1,4,4] y, int64[1,1,2,2] i) <
            float[4] s = {1, 1, 2, 2}, float half = {0.5}> {
            r = Relu(x) y = Resize(r, , s) p = Mul(r, half) f = Floor(p) i = Cast<to = 7>(f) }""",
        """g (float[1,1,2,2] x) => (float[1,1,4,4] y, int64[1,1,2,2] i) <
            float[4] s = {1, 1, 2, 2}, float half = {0.5}> {
            h = Cast<to = 10>(x) r = Relu(h) k = Cast<to = 1>(r) z = Resize(r, , s) y = Cast<to = 1>(z)
            p = Mul(k, half) f = Floor(p) i = Cast<to = 7>(f) }""",
    )


def test_a_small_epsilon_and_the_sums_around_it_stay(rewrites: Any) -> None:
    text = """g (float[n,4] x) => (float[n,4] y) <float eps = {0.000000000001}, int64[1] axis = {-1}> {
        v = ReduceSumSquare(x, axis) w = Add(v, eps) r = Sqrt(w) y = Div(x, r) }"""
    after = """g (float[n,4] x) => (float[n,4] y) <float eps = {0.000000000001}, int64[1] axis = {-1}> {
        h = Cast<to = 10>(x) v = ReduceSumSquare(x, axis) w = Add(v, eps) r = Sqrt(w) i = Cast<to = 10>(r)
        z = Div(h, i) y = Cast<to = 1>(z) }"""
    reasons = kept(rewrites(CastFp16(), text, after))
    assert reasons == {
        "v": "ReduceSumSquare would overflow or lose digits",
        "w": "'eps' is 1e-12, which is zero in FP16",
        "r": "its inputs are float32",
    }


def test_normalizations_without_kernels_of_their_own_stay(onnx_model: Any, context: Context) -> None:
    model = onnx_model(
        """g (float[n,4] x) => (float[n,4] y) <float[4] s = {1, 1, 1, 1}> {
            a = LpNormalization<axis = -1>(x) y = LayerNormalization(a, s) }"""
    )
    assert kept(CastFp16().run(model, context)) == {"a": "LpNormalization would overflow or lose digits"}


def test_a_weight_beyond_the_range_stays_and_is_named(onnx_model: Any, context: Context) -> None:
    model = onnx_model(
        """g (float[n,2] x) => (float[n,2] y) <float[2,2] w = {100000, 2, 3, 4}, float scale = {0.00001}> {
            a = Relu(x) m = MatMul(a, w) y = Mul(m, scale) }"""
    )
    after = CastFp16().run(model, context)
    assert kept(after)["m"] == "'w' holds 1e+05, FP16 ends at 65504"
    assert after.ir.graph.initializers["w"].dtype == F32
    CastFp16().ensures(model, after, context)


def test_minus_infinity_in_a_mask_becomes_the_lowest_number(onnx_model: Any, context: Context) -> None:
    model = onnx_model(
        """g (float[n,4] x, bool[n,4] m) => (float[n,4] y) <float low = {-3.4e38}, float zero = {0}> {
            k = Where(m, zero, low) s = Add(x, k) y = Softmax(s) }"""
    )
    after = CastFp16().run(model, context)
    assert kept(after) == {}
    lowest = after.ir.graph.initializers["low_float16"].const_value
    assert lowest is not None
    assert float(lowest.numpy()) == -65504
    CastFp16().ensures(model, after, context)


GROWING = """g (float[n,2] x) => (float[n,2] y) <float k = {500}> {
    a = Relu(x) b = Mul(a, k) c = Neg(b) y = Sigmoid(c) }"""


def test_what_overflows_on_calibration_data_stays(onnx_model: Any, context: Context) -> None:
    model = onnx_model(GROWING)
    with_data = replace(context, data=Samples())  # type: ignore[arg-type]  # batches is all that the pass asks for
    after = CastFp16().run(model, with_data)
    assert kept(after) == {
        name: f"{value!r} reaches 5e+04 on calibration data" for name, value in {"b": "b", "c": "b", "y": "c"}.items()
    }
    assert kept(CastFp16(headroom=1).run(model, with_data)) == {}
    assert kept(CastFp16(samples=0).run(model, with_data)) == {}
    assert kept(CastFp16().run(model, context)) == {}


def test_every_sample_is_looked_at(onnx_model: Any, context: Context) -> None:
    with_data = replace(context, data=Samples(*[1.0] * 20, 100.0))  # type: ignore[arg-type]
    assert set(kept(CastFp16().run(onnx_model(GROWING), with_data))) == {"b", "c", "y"}
    assert kept(CastFp16(samples=20).run(onnx_model(GROWING), with_data)) == {}


def test_an_output_beyond_the_range_is_computed_in_float32(onnx_model: Any, context: Context) -> None:
    model = onnx_model("g (float[n,2] x) => (float[n,2] y) { a = Abs(x) y = Mul(a, a) }")
    with_data = replace(context, data=Samples(300.0))  # type: ignore[arg-type]
    after = CastFp16().run(model, with_data)
    assert kept(after) == {"y": "'y' reaches 9e+04 on calibration data"}
    with open_onnx(after) as runner:
        np.testing.assert_array_equal(runner.run({"x": np.full((1, 2), 300, np.float32)})["y"], 9e4)


def test_an_input_beyond_the_range_is_not_cast(onnx_model: Any, context: Context) -> None:
    model = onnx_model("g (float[n,2] x) => (float[n,2] y) <float k = {0.00002}> { a = Mul(x, k) y = Relu(a) }")
    with_data = replace(context, data=Samples(90_000.0))  # type: ignore[arg-type]
    after = CastFp16().run(model, with_data)
    assert kept(after) == {"a": "'x' reaches 9e+04 on calibration data"}
    with open_onnx(after) as runner:
        np.testing.assert_allclose(runner.run({"x": np.full((1, 2), 9e4, np.float32)})["y"], 1.8, rtol=1e-3)


def test_what_is_too_small_for_fp16_on_calibration_data_stays(onnx_model: Any, context: Context) -> None:
    """Numbers below 2**-14 have fewer digits in FP16, and those below 2**-24 none. Zeros have all they need."""
    model = onnx_model(
        """g (float[n,2] x) => (float[n,2] y, float[n,2] z) <float k = {0.001}, float big = {1000}> {
            a = Mul(x, k) b = Mul(a, k) c = Mul(b, big) y = Mul(c, big) m = Neg(x) r = Relu(m) z = Mul(r, big) }"""
    )
    with_data = replace(context, data=Samples(1.0))  # type: ignore[arg-type]
    after = CastFp16().run(model, with_data)
    reason = "'b' stays below 6.1e-05 on calibration data, where FP16 loses digits"
    assert kept(after) == {"b": reason, "c": reason, "y": "its inputs are float32"}
    assert kept(CastFp16().run(model, context)) == {}


def test_an_overflow_that_nobody_saw_coming_is_named(onnx_model: Any, context: Context) -> None:
    model = onnx_model(GROWING.replace("500", "60000").replace("Sigmoid(c)", "Mul(c, k)"))
    after = CastFp16().run(model, context)
    with pytest.raises(PostconditionError, match="outputs are not finite, first at the node that gives 'b'"):
        CastFp16().ensures(model, after, context)


def test_nodes_and_ops_can_be_kept_by_name(onnx_model: Any, context: Context) -> None:
    model = onnx_model(GROWING)
    assert kept(CastFp16(keep=("b", "Sigmoid")).run(model, context)) == {
        "b": "the recipe keeps it",
        "c": "its inputs are float32",
        "y": "the recipe keeps it",
    }
    with pytest.raises(
        PreconditionError, match=r"`keep` names 'Sigmoit', which is no node and no op: did you mean 'Sigmoid'"
    ):
        CastFp16(keep=("Sigmoit",)).requires(model, context)


def test_a_quantized_graph_keeps_its_pairs(onnx_model: Any, context: Context) -> None:
    text = """g (float[n,2] x) => (float[n,2] y) <
        float sx = {0.03}, float sw = {0.01}, int8 z = {0}, float tiny = {0.00001},
        int32[2] b = {5, 6}, int32 zb = {0}, float[2,2] w = {0.5, 1, -1, 0.25}> {
        xq = QuantizeLinear(x, sx, z) xd = DequantizeLinear(xq, sx, z)
        wq = QuantizeLinear(w, sw, z) wd = DequantizeLinear(wq, sw, z) bd = DequantizeLinear(b, tiny, zb)
        y = Gemm(xd, wd, bd) }"""
    model = onnx_model(text)
    after = CastFp16().run(model, context)
    scales = {str(node.inputs[1].dtype) for node in after.ir.graph if "Linear" in node.op_type and node.inputs[1]}
    assert scales == {"FLOAT16", "FLOAT"}
    assert kept(after) == {"bd": "'tiny' holds a scale of 1e-05, too small for FP16"}
    assert sum(node.op_type == "QuantizeLinear" for node in after.ir.graph) == 2
    CastFp16().ensures(model, after, context)


TINY_CHANNEL = """g (float[n,4,2] x, float[n,4,2] o) => (float[n,4,2] y, float[n,4,2] v, float[n,4,2] u) <
    float s = {0.03}, float sw = {0.01}, float[2] st = {0.01, 0.00001}, int8 z = {0}, int8[2] zt = {0, 0},
    int8[2,2] w = {1, 2, 3, 4}> {
    q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) e = DequantizeLinear(q, s, z)
    t = DequantizeLinear<axis=1>(w, st, zt) k = DequantizeLinear(w, sw, z)
    y = MatMul(d, t) v = MatMul(e, k)
    p = QuantizeLinear(o, s, z) r = DequantizeLinear(p, s, z) m = DequantizeLinear(w, sw, z) u = MatMul(r, m) }"""


def test_both_scales_of_a_product_are_of_one_type(onnx_model: Any, context: Context) -> None:
    model = onnx_model(TINY_CHANNEL, opset=20)
    after = CastFp16().run(model, context)
    other = "the scale of a product's other operand is float32"
    assert kept(after) == {
        "t": "'st' holds a scale of 1e-05, too small for FP16",
        **dict.fromkeys(("q", "d", "e", "k"), other),  # e shares the scale of d, and k its product with e
    }
    CastFp16().ensures(model, after, context)


def test_below_opset_19_the_pairs_stay_in_float32(onnx_model: Any, context: Context) -> None:
    model = onnx_model(
        """g (float[n,2] x) => (float[n,2] y) <float s = {0.03}, int8 z = {0}> {
            q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) y = Relu(d) }""",
        opset=18,
    )
    after = CastFp16().run(model, context)
    assert set(kept(after)) == {"q", "d"}
    onnx.checker.check_model(ir.to_proto(after.ir), full_check=True)


def test_subgraphs_and_sequences_stay_in_float32(onnx_model: Any, context: Context) -> None:
    model = onnx_model(
        """g (float[n,4] x, bool c) => (float[n,4] y) {
            a = Relu(x)
            b = If(c) <then_branch = t () => (float[n,4] p) { p = Neg(a) }, else_branch = e () => (float[n,4] q) {
                q = Identity(a) }>
            s = SplitToSequence<axis = 1>(b) k = ConcatFromSequence<axis = -1>(s) y = Relu(k) }"""
    )
    after = CastFp16().run(model, context)
    assert set(kept(after)) == {"b", "s", "k"}
    onnx.checker.check_model(ir.to_proto(after.ir), full_check=True)
    with open_onnx(model) as before, open_onnx(after) as runner:
        feeds = {"x": np.array([[1.0, -2, 3, -4]], np.float32), "c": np.array(False)}
        np.testing.assert_allclose(runner.run(feeds)["y"], before.run(feeds)["y"])


def test_a_target_without_fast_kernels_is_warned_about(onnx_model: Any, context: Context, caplog: Any) -> None:
    CastFp16().requires(onnx_model(GROWING), context)
    assert "has no fast FP16 kernels" in caplog.text


def test_native_only_leaves_other_targets_alone(onnx_model: Any, context: Context, caplog: Any) -> None:
    step, model = CastFp16(native_only=True), onnx_model("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    step.requires(model, context)
    assert step.run(model, context) is model
    assert not caplog.records
    there = replace(context, target=TensorRtRtxTarget())
    assert step.run(model, there) is not model


def test_the_rest_of_int8_is_fp16_where_the_target_computes_in_it() -> None:
    for name, halves in (("onnxruntime", False), ("tensorrt", True), ("tensorrt-rtx", True)):
        recipe = Recipe.load("int8").updated(target=name)
        (cast,) = (step for step in recipe.passes if isinstance(step, CastFp16))
        assert cast.native_only
        assert ("float16" in recipe.target.dialect.floats) is halves
