from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from optkit.errors import PreconditionError
from optkit.passes.quantize_int8 import QuantizeInt8
from optkit.quantize.placement import Use, name_nodes, place
from optkit.targets.base import ORT_CPU


def weight(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype("f")


def placed(model, exclude=()):
    name_nodes(model)
    return place(model, ORT_CPU, exclude)


def names(model, op_type):
    return [node.name for node in model.ir.graph if node.op_type == op_type]


def test_a_residual_network_is_quantized_throughout(residual):
    placement = placed(residual)
    assert placement.outputs == {"x0", "ar", "c", "x1", "er", "f", "h", "x2", "p", "q"}
    assert placement.tensors == placement.outputs | {"image"}
    assert placement.observed == placement.tensors - {"q"}
    assert placement.same_scale == {"q": "p"}
    assert len(placement.weights) == len(placement.biases) == 7
    assert not placement.kept_float


def test_relu_and_clip_from_zero_are_absorbed_and_other_clips_are_not(net):
    model = net(
        """g (float[b,2,4,4] x) => (float[b,2,4,4] y) <float zero = {0}, float six = {6}, float minus = {-1}> {
            a = Conv(x, w) ar = Relu(a) c = Conv(ar, w) cr = Clip(c, zero, six)
            d = Conv(cr, w) dr = Clip(d, minus, six) e = Conv(dr, w) y = Softmax(e)
        }""",
        w=weight(2, 2, 1, 1),
    )
    assert placed(model).outputs == {"ar", "cr", "d", "e"}


def test_an_activation_that_others_read_is_not_absorbed(net):
    model = net(
        "g (float[b,2,4,4] x) => (float[b,2,4,4] y) { a = Conv(x, w) r = Relu(a) s = Sigmoid(a) y = Mul(r, s) }",
        w=weight(2, 2, 1, 1),
    )
    assert placed(model).outputs == {"a"}


def test_products_with_constants_are_quantized_on_their_inputs_only(net):
    model = net(
        """g (float[b,8,16] x) => (float[b,8,16] y) {
            q = MatMul(x, w) k = MatMul(x, w) t = Transpose <perm = [0, 2, 1]> (k)
            s = MatMul(q, t) p = Softmax(s) y = MatMul(p, q)
        }""",
        w=weight(16, 16),
    )
    placement = placed(model)
    first, second, third, fourth = names(model, "MatMul")
    assert placement.inputs == {Use(first, 0), Use(second, 0)}
    assert not placement.outputs
    assert placement.weights == {Use(first, 1): 1, Use(second, 1): 1}
    assert placement.kept_float == dict.fromkeys((third, fourth), "its second operand is not a constant")


def test_gemm_has_its_axis_by_transposition_and_its_bias_in_int32(net):
    model = net(
        "g (float[b,4] x) => (float[b,3] y) { a = Gemm <transB = 1> (x, w, c) y = Gemm(a, v) }",
        w=weight(3, 4),
        v=weight(3, 3),
        c=weight(3),
    )
    placement = placed(model)
    first, second = names(model, "Gemm")
    assert placement.weights == {Use(first, 1): 0, Use(second, 1): 1}
    assert placement.biases == {Use(first, 2)}


def test_gemm_that_no_kernel_takes_stays_float(net):
    model = net(
        "g (float[b,4] x) => (float[b,3] y) { y = Gemm <transB = 1, beta = 0.5> (x, w, c) }",
        w=weight(3, 4),
        c=weight(3),
    )
    assert list(placed(model).kept_float.values()) == ["its bias is not a constant vector"]


def test_an_addition_with_a_float_side_stays_float(net):
    model = net(
        "g (float[b,2,4,4] x) => (float[b,2,4,4] y) { a = Conv(x, w) n = Exp(x) s = Add(a, n) y = Conv(s, w) }",
        w=weight(2, 2, 1, 1),
    )
    placement = placed(model)
    assert placement.outputs == {"a", "y"}
    assert placement.tensors == {"x", "a", "s", "y"}


def test_concat_and_pools_of_int8_write_int8(net):
    model = net(
        """g (float[b,2,4,4] x) => (float[b,6,2,2] y) {
            a = Conv(x, w) m = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (a)
            v = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (a)
            l = LeakyRelu(m) c = Concat <axis = 1> (m, v, l) y = Exp(c)
        }""",
        w=weight(2, 2, 1, 1),
    )
    placement = placed(model)
    assert placement.outputs == {"a", "m", "v", "l", "c"}
    assert placement.same_scale == {"m": "a"}


def test_transposed_convolutions_have_no_kernel(net):
    model = net("g (float[b,2,4,4] x) => (float[b,2,4,4] y) { y = ConvTranspose(x, w) }", w=weight(2, 2, 1, 1))
    assert list(placed(model).kept_float.values()) == ["the target has no rule for ConvTranspose"]


def test_excluded_nodes_stay_float_by_name_or_pattern(residual):
    conv = [node for node in residual.ir.graph if node.op_type == "Conv"]
    for index, node in enumerate(conv):
        node.name = f"block.{index}/conv"
    placement = placed(residual, ["block.[01]/*"])
    assert placement.kept_float == dict.fromkeys(["block.0/conv", "block.1/conv"], "excluded by the recipe")
    assert {use.node for use in placement.weights}.isdisjoint(placement.kept_float)


def test_an_excluded_name_that_is_none_is_an_error(residual):
    residual.ir.graph[0].name = "stem"
    with pytest.raises(PreconditionError, match=r"exclude: no node is named 'stam'; did you mean 'stem'\?"):
        placed(residual, ["stam"])


def test_nodes_get_unique_names(net):
    model = net("g (float[4] x) => (float[4] y) { a = Exp(x) b = Exp(a) c = Exp(b) y = Exp(c) }")
    for node, name in zip(model.ir.graph, ["n", "n", None, "n_1"], strict=True):
        node.name = name
    name_nodes(model)
    given = [node.name for node in model.ir.graph]
    assert len(set(given)) == 4
    assert all(given)
    assert given[0] == "n"


BEHIND = {
    # What stands behind the product, and whether ONNX Runtime may make a float Gemm of both
    "fixed shape": ("1,4,16", "a = Add(m, b)", True),
    "fixed shape, bias first": ("1,4,16", "a = Add(b, m)", True),
    "dynamic shape": ("n,4,16", "a = Add(m, b)", False),
    "no vector": ("1,4,16", "a = Add(m, m)", False),
    "another operator": ("1,4,16", "a = Mul(m, b)", False),
    "the product is read elsewhere": ("1,4,16", "e = Exp(m) f = Add(m, b) a = Add(e, f)", False),
}


@pytest.mark.parametrize("case", BEHIND)
def test_a_product_is_kept_apart_from_its_bias_where_both_would_become_a_float_gemm(net, case):
    dims, text, apart = BEHIND[case]
    model = net(
        f"g (float[{dims}] x) => (float[{dims}] y) {{ m = MatMul(x, w) {text} y = Exp(a) }}",
        w=weight(16, 16),
        b=weight(16),
    )
    placement = placed(model)
    assert placement.int8 == ("MatMul_0",)
    assert placement.apart == ({"Add_1"} if apart else frozenset())


def test_a_matrix_product_that_was_not_made_a_gemm_stays_float_and_says_why(net):
    model = net("g (float[n,16] x) => (float[n,4] y) { m = MatMul(x, w) y = Add(m, b) }", w=weight(16, 4), b=weight(4))
    assert placed(model).kept_float == {
        "MatMul_0": "ONNX Runtime makes a float Gemm of it and its Add: run optimize_graph before"
    }


def test_a_gemm_with_an_activation_writes_int8_so_that_it_computes_in_it(net, array_data, context, tmp_path):
    """A convolutional head: without a Q after the Relu, ONNX Runtime makes a float FusedGemm of the first Gemm."""
    model = net(
        """g (float[b,8,4,4] x) => (float[b,10] y) {
            c = Conv(x, w) r = Relu(c) f = Flatten(r) g1 = Gemm(f, w1, b1) r1 = Relu(g1) y = Gemm(r1, w2, b2)
        }""",
        w=weight(8, 8, 1, 1),
        w1=weight(128, 64),
        b1=weight(64),
        w2=weight(64, 10),
        b2=weight(10),
    )
    assert "r1" in placed(model).outputs
    context = replace(context, data=array_data({"x": weight(64, 8, 4, 4)}))
    engine = context.target.build(QuantizeInt8().run(model, context), tmp_path, context)
    ops = [node.op_type for node in ir.load(engine.path).graph]
    assert ops.count("QGemm") == 2
    assert not {"FusedGemm", "Gemm", "DynamicQuantizeMatMul"} & set(ops)
