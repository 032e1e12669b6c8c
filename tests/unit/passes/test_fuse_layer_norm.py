from typing import Any

import pytest

from optkit.passes.fuse_layer_norm import FuseLayerNorm

CONSTANTS = (
    "<int64[1] axis = {-1}, int64[1] first = {0}, float eps = {0.00001}, float two = {2}, float minus_half = {-0.5},"
    " float[4] s = {1, 2, 3, 4}, float[4] b = {1, 0, 1, 0}, float[1] wide = {2}>"
)
MOMENTS = "m = ReduceMean(x, axis) d = Sub(x, m) q = Pow(d, two) v = ReduceMean(q, axis) w = Add(v, eps)"
FORMS = [
    "r = Sqrt(w) n = Div(d, r)",
    "r = Sqrt(w) i = Reciprocal(r) n = Mul(i, d)",
    "i = Pow(w, minus_half) n = Mul(d, i)",
]
AFTER = "y = LayerNormalization<axis = -1, epsilon = 0.00001>(x, s, b)"


def graph(nodes: str) -> str:
    return f"g (float[n,4] x) => (float[n,4] y) {CONSTANTS} {{ {nodes} }}"


@pytest.mark.parametrize("form", FORMS)
def test_the_chain_becomes_one_op(rewrites: Any, form: str) -> None:
    rewrites(FuseLayerNorm(), graph(f"{MOMENTS} {form} t = Mul(n, s) y = Add(t, b)"), graph(AFTER))


def test_a_square_by_multiplication_of_a_second_difference(rewrites: Any) -> None:
    moments = """m = ReduceMean(x, axis) d = Sub(x, m) o = ReduceMean(x, axis) e = Sub(x, o) q = Mul(e, e)
        v = ReduceMean(q, axis) w = Add(eps, v)"""
    rewrites(FuseLayerNorm(), graph(f"{moments} {FORMS[0]} t = Mul(s, n) y = Add(b, t)"), graph(AFTER))


def test_without_scale_it_gets_ones(rewrites: Any) -> None:
    before = graph(f"{MOMENTS} r = Sqrt(w) y = Div(d, r)")
    after = """g (float[n,4] x) => (float[n,4] y) <float[4] ones = {1, 1, 1, 1}> {
        y = LayerNormalization<axis = -1, epsilon = 0.00001>(x, ones) }"""
    rewrites(FuseLayerNorm(), before, after)


@pytest.mark.parametrize(
    "nodes",
    [
        f"{MOMENTS} r = Sqrt(v) y = Div(d, r)",  # no epsilon
        f"{MOMENTS} r = Sqrt(w) y = Div(x, r)",  # not centered
        f"{MOMENTS} r = Sqrt(w) y = Div(d, r)".replace("axis", "first"),  # not the last dimension
    ],
)
def test_near_misses_stay(leaves: Any, nodes: str) -> None:
    leaves(FuseLayerNorm(), graph(nodes))


def test_a_residual_is_no_bias(rewrites: Any) -> None:
    before = graph(f"{MOMENTS} r = Sqrt(w) n = Div(d, r) t = Mul(n, s) y = Add(t, x)")
    rewrites(FuseLayerNorm(), before, graph("t = LayerNormalization<axis = -1, epsilon = 0.00001>(x, s) y = Add(t, x)"))


def test_stays_below_opset_17(leaves: Any) -> None:
    nodes = MOMENTS.replace("(x, axis)", "<axes = [-1]>(x)").replace("(q, axis)", "<axes = [-1]>(q)")
    leaves(FuseLayerNorm(), graph(f"{nodes} {FORMS[0]} y = Mul(n, s)"), opset=16)
