from __future__ import annotations

import numpy as np
import pytest

from optkit.passes.graph_edit import infer_types
from optkit.quantize.placement import Use, name_nodes, place
from optkit.targets.base import TENSORRT


def weight(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype("f")


def placed(model):
    name_nodes(model)
    return place(model, TENSORRT)


def test_a_residual_network_is_quantized_on_inputs_and_skips(residual):
    placement = placed(residual)
    nodes = {str(node.outputs[0].name): str(node.name) for node in residual.ir.graph}
    # The identity skip; and of two convolutions the one with the shorter way up
    assert {Use(nodes["d"], 1), Use(nodes["i"], 1)} <= placement.inputs
    assert not {Use(nodes["d"], 0), Use(nodes["i"], 0)} & placement.inputs
    assert placement.tensors == {"image", "x0", "ar", "x1", "er", "h", "x2"}
    assert placement.outputs == {"x2"}  # an average reads it
    assert not placement.biases
    assert placement.kept_float == {nodes["logits"]: "it makes the model's output"}


def test_the_addition_of_a_constant_is_no_residual(net):
    model = net(
        "g (float[b,16,4,4] x) => (float[b,16,4,4] y) { a = Conv(x, w) y = Add(a, c) }",
        w=weight(16, 16, 1, 1),
        c=weight(1, 16, 1, 1),
    )
    assert placed(model).tensors == {"x"}


@pytest.mark.parametrize(
    ("shape", "group", "reason"),
    [
        ((32, 16, 3, 3), 1, None),
        ((8, 16, 3, 3), 1, "a convolution from 16 to 8 channels is too small for INT8 to pay"),
        ((16, 1, 1, 1), 16, "a grouped convolution to 16 channels with kernel [1, 1] has no fast INT8"),
        ((12, 1, 3, 3), 12, "a grouped convolution to 12 channels with kernel [3, 3] has no fast INT8"),
    ],
)
def test_small_convolutions_stay_float(net, shape, group, reason):
    inputs = shape[1] * group
    model = net(
        f"g (float[b,{inputs},8,8] x) => (float[b,c,h,v] y) {{ e = Exp(x) y = Conv <group = {group}> (e, w) }}",
        w=weight(*shape),
    )
    assert list(placed(model).kept_float.values()) == ([reason] if reason else [])


def test_a_convolution_of_a_single_pixel_stays_float(net):
    """Squeeze and excitation."""
    model = net(
        """g (float[b,16,8,8] x) => (float[b,16,8,8] y) {
            m = GlobalAveragePool(x) s = Conv(m, v) r = Relu(s) e = Conv(r, v) y = Mul(x, e)
        }""",
        v=weight(16, 16, 1, 1),
    )
    infer_types(model.ir)
    assert (
        list(placed(model).kept_float.values()) == ["a convolution of a single pixel is too small for INT8 to pay"] * 2
    )


SILU = "s = Sigmoid(d) a = Mul(d, s)"


@pytest.mark.parametrize(
    ("activation", "end", "int8"),
    [
        ("a = Relu(d)", "y = Conv(a, v)", True),
        (SILU, "y = Conv(a, v)", True),
        ("a = HardSwish(d)", "f = Conv(a, v) g = Conv(a, v) y = Add(f, g)", True),
        (SILU, "m = GlobalAveragePool(a) p = Mul(a, m) y = Conv(p, v)", False),  # squeeze and excitation
        ("s = Sigmoid(d) t = Conv(s, v) a = Mul(d, s)", "y = Conv(a, v)", False),  # the gate is read elsewhere, too
        ("a = Relu(d)", "f = Conv(a, v) y = Add(f, a)", False),
        ("", "y = Identity(d)", False),
        ("", "y = Conv(d, v)", True),
        ("", "y = Conv(x, d)", False),
        ("a = Relu(d)", "y = Conv(a, narrow)", False),
        ("a = Relu(d)", "f = Conv(a, v) g = Conv(a, narrow) c = Concat <axis = 1> (f, g) y = Exp(c)", False),
        ("a = Relu(d)", "f = Conv <group = 16> (a, w) y = Conv(f, v)", True),
        ("a = Relu(d)", "f = Conv <group = 16> (a, w) y = Exp(f)", False),
        ("a = Relu(d)", "p = MaxPool <kernel_shape = [2,2]> (a) c = Concat <axis = 1> (p, p) y = Conv(c, wide)", True),
        ("a = Relu(d)", "p = MaxPool <kernel_shape = [2,2]> (a) y = Exp(p)", False),
        ("a = Relu(d)", "[left_out] y = Conv(a, v)", False),
    ],
)
def test_a_depthwise_convolution_is_quantized_only_where_convolutions_read_it(net, activation, end, int8):
    model = net(
        f"g (float[b,16,8,8] x) => (float[b,c,h,z] y) {{ d = Conv <group = 16> (x, w) {activation} {end} }}",
        w=weight(16, 1, 3, 3),
        v=weight(16, 16, 1, 1),
        narrow=weight(8, 16, 1, 1),
        wide=weight(16, 32, 1, 1),
    )
    name_nodes(model)
    exclude = ["left_out"] if "left_out" in end else []
    depthwise = model.ir.graph[0].name
    placement = place(model, TENSORRT, exclude)
    assert (depthwise in placement.int8) == int8
    reason = placement.kept_float.get(depthwise)
    assert reason == (None if int8 else "a grouped convolution whose result is not quantized has no INT8 kernel")


def test_what_reads_a_depthwise_convolution_in_the_body_of_an_if_does_not_quantize_it(net):
    model = net(
        """g (float[b,16,8,8] x, bool c) => (float[b,16,h,z] y) {
            d = Conv <group = 16> (x, w)
            y = If (c) <
                then_branch = t () => (float[b,16,h,z] p) { p = Conv(d, v) },
                else_branch = e () => (float[b,16,h,z] q) { q = Relu(x) }
            >
        }""",
        w=weight(16, 1, 3, 3),
        v=weight(16, 16, 1, 1),
    )
    assert not placed(model).tensors


def test_the_stem_is_quantized_although_an_image_has_three_channels(net):
    model = net("g (float[b,3,8,8] x) => (float[b,c,h,v] y) { y = Conv(x, w) }", w=weight(16, 3, 3, 3))
    assert placed(model).tensors == {"x"}


def test_small_products_and_the_head_stay_float(net):
    model = net(
        """g (float[b,32] x) => (float[b,32] y) {
            a = MatMul(x, w) n = MatMul(a, narrow) e = Exp(n) o = MatMul(e, wide) r = Relu(o)
            h = MatMul(r, w) hb = Add(h, c) y = Softmax(hb)
        }""",
        w=weight(32, 32),
        narrow=weight(32, 8),
        wide=weight(8, 32),
        c=weight(32),
    )
    assert list(placed(model).kept_float.values()) == [
        "a product with a 32x8 matrix is too small for INT8 to pay",
        "a product with a 8x32 matrix is too small for INT8 to pay",
        "it makes the model's output",
    ]


def test_concatenated_tensors_share_one_scale_where_they_are_quantized(net):
    model = net(
        """g (float[b,16,4,4] x) => (float[b,16,4,4] y) {
            a = Relu(x) d = Exp(x) c = Concat <axis = 1> (a, d) f = Conv(a, v) g = Conv(c, w) y = Add(f, g)
        }""",
        v=weight(16, 16, 1, 1),
        w=weight(16, 32, 1, 1),
    )
    placement = placed(model)
    assert placement.one_scale == (frozenset({"a", "c"}),)


@pytest.mark.parametrize("left_out", ["Relu_2", "GlobalAveragePool_3"])
def test_a_sum_is_not_quantized_for_an_average_that_the_recipe_excludes(net, left_out):
    model = net(
        """g (float[b,16,4,4] x) => (float[b,16,1,1] y) {
            a = Conv(x, w) s = Add(a, x) r = Relu(s) y = GlobalAveragePool(r)
        }""",
        w=weight(16, 16, 1, 1),
    )
    name_nodes(model)
    placement = place(model, TENSORRT, [left_out])
    assert placement.tensors == {"x"}
    assert left_out not in placement.int8


@pytest.mark.parametrize(("reader", "quantized"), [("GlobalAveragePool", True), ("GlobalMaxPool", False)])
def test_the_last_residual_sum_is_quantized_for_an_average(net, reader, quantized):
    model = net(
        f"""g (float[b,16,4,4] x) => (float[b,16,1,1] y) {{
            a = Conv(x, w) s = Add(a, x) r = Relu(s) y = {reader}(r)
        }}""",
        w=weight(16, 16, 1, 1),
    )
    placement = placed(model)
    assert placement.outputs == ({"r"} if quantized else set())
    assert placement.tensors == ({"x", "r"} if quantized else {"x"})


@pytest.mark.parametrize(
    ("mode", "between", "tensors", "group"),
    [
        ("linear", "b = Identity(a)", {"x", "r", "b"}, {"r", "b"}),
        ("linear", "b = Concat <axis = 1> (a)", {"x", "r", "b"}, {"r", "b"}),
        ("cubic", "m, i = MaxPool <kernel_shape = [1, 1]> (a) b = Identity(m)", {"x", "r", "b"}, {"r", "b"}),
        ("linear", 'm = Resize <mode = "linear"> (a, , two) b = Identity(m)', {"x", "r", "a", "b"}, {"r", "a", "b"}),
        ("nearest", "b = Identity(a)", {"x", "b"}, None),
        ("linear", "b = Exp(a)", {"x", "b"}, None),
        # Less than zero would widen the scale, and the quantizer is held there all the same
        ("linear", "b = Relu(a)", {"x", "b"}, None),
        ("linear", "i = Cast <to = 6> (a) b = Cast <to = 1> (i)", {"x", "b"}, None),
        ("linear", "d, e = Split <axis = 2> (a) f = Tanh(e) b = Concat <axis = 2> (d, f)", {"x", "b"}, None),
    ],
)
def test_what_is_interpolated_for_int8_is_int8_before(net, mode, between, tensors, group):
    model = net(
        f"""g (float[2,16,4,4] x) => (float[2,16,h,v] y) <float[4] two = {{1, 1, 2, 2}}> {{
            c = Conv(x, w) r = Relu(c) a = Resize <mode = "{mode}"> (r, , two) {between} y = Conv(b, w)
        }}""",
        w=weight(16, 16, 1, 1),
    )
    placement = placed(model)
    assert placement.tensors == tensors
    assert placement.one_scale == ((frozenset(group),) if group else ())


@pytest.mark.parametrize(
    ("rest", "quantized"),
    [
        ("f = Conv(x, w) g = Conv(a, w) y = Add(f, g)", True),
        ("f = Conv(a, w) g = Conv(a, w) y = Add(f, g)", True),
        ("f = Conv(x, w) y = Add(f, a)", True),  # the skip of a residual addition
        ("f = Conv(a, w) y = Add(f, a)", True),  # that and a convolution
        ("f = Conv(a, w) g = Abs(r) y = Add(f, g)", True),
        ("f = Conv(a, w) g = Exp(a) y = Add(f, g)", False),
        ("f = Conv(a, v) y = Exp(f)", False),  # too small for INT8
    ],
)
@pytest.mark.parametrize("sizes", ["2,16,4,4", "b,16,4,4", "2,16,h,v"])
def test_what_is_read_in_float_too_or_has_no_known_shape_is_interpolated_in_float(net, rest, quantized, sizes):
    model = net(
        f"""g (float[{sizes}] x) => (float[n,c,k,l] y) <int64[4] sizes = {{2, 16, 4, 4}}> {{
            r = Exp(x) a = Resize <mode = "linear"> (r, , , sizes) {rest}
        }}""",
        w=weight(16, 16, 1, 1),
        v=weight(4, 16, 1, 1),
    )
    placement = placed(model)
    resize = next(str(node.name) for node in model.ir.graph if node.op_type == "Resize")
    quantized &= sizes == "2,16,4,4"  # TensorRT 8.5.3 has no kernel for it where shapes are dynamic
    assert (Use(resize, 0) in placement.inputs) is quantized
    assert (frozenset({"r", "a"}) in placement.one_scale) is quantized
    assert place(model, TENSORRT, [resize]).one_scale == ()


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)])
def test_resizes_one_after_another_are_in_int8_in_whichever_order_they_are_read(net, order):
    readers = ["y = Conv(a, w)", 'b = Resize <mode = "linear"> (a, , two) z = Conv(b, w)'][order]
    model = net(
        f"""g (float[2,16,4,4] x) => (float[2,16,8,8] y, float[2,16,16,16] z) <float[4] two = {{1, 1, 2, 2}}> {{
            r = Conv(x, w) a = Resize <mode = "linear"> (r, , two) {" ".join(readers)}
        }}""",
        w=weight(16, 16, 1, 1),
    )
    placement = placed(model)
    assert placement.tensors == {"x", "r", "a", "b"}
    assert placement.one_scale == (frozenset({"r", "a", "b"}),)


def test_a_constant_that_is_interpolated_is_not_calibrated(net):
    model = net(
        """g (float[1,16,4,4] x) => (float[1,16,8,8] y) <float[4] two = {1, 1, 2, 2}> {
            a = Resize <mode = "linear"> (k, , two) y = Conv(a, w)
        }""",
        w=weight(16, 16, 1, 1),
        k=weight(1, 16, 4, 4),
    )
    assert placed(model).tensors == {"a"}


def test_groups_with_a_tensor_in_common_share_one_scale(net):
    model = net(
        """g (float[b,16,4,4] x, float[b,16,4,4] z) => (float[b,16,4,4] y) {
            a = Relu(x) d = Relu(z) c = Concat <axis = 1> (a, d) e = Concat <axis = 1> (c, d)
            f = Conv(a, u) g = Conv(c, v) h = Conv(e, w) i = Add(f, g) y = Add(i, h)
        }""",
        u=weight(16, 16, 1, 1),
        v=weight(16, 32, 1, 1),
        w=weight(16, 48, 1, 1),
    )
    assert placed(model).one_scale == (frozenset({"a", "c", "e"}),)
