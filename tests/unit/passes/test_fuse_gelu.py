from dataclasses import replace
from typing import Any

import pytest

from optkit.passes.fuse_gelu import FuseGelu
from optkit.targets.base import Dialect
from optkit.targets.onnxruntime import OnnxRuntimeTarget

CONSTANTS = (
    "<float root = {1.4142135}, float inverse = {0.70710677}, float half = {0.5}, float one = {1}, float three = {3},"
    " float k = {0.7978846}, float q = {0.044715}>"
)
ERF = [
    "d = Div(x, root) e = Erf(d) s = Add(e, one) p = Mul(x, s) y = Mul(p, half)",
    "d = Mul(inverse, x) e = Erf(d) s = Add(one, e) h = Mul(half, x) y = Mul(s, h)",
    "d = Div(x, root) e = Erf(d) s = Add(e, one) h = Mul(s, half) y = Mul(x, h)",
]
GATE = "u = Mul(k, a) h = Tanh(u) s = Add(one, h) m = Mul(half, x) y = Mul(m, s)"
TANH = [
    f"c = Pow(x, three) t = Mul(q, c) a = Add(x, t) {GATE}",
    f"r = Mul(x, x) c = Mul(r, x) t = Mul(c, q) a = Add(t, x) {GATE}",
    f"r = Mul(x, x) t = Mul(r, q) f = Add(one, t) a = Mul(x, f) {GATE}",
]


def graph(nodes: str) -> str:
    return f"g (float[2,4] x) => (float[2,4] y) {CONSTANTS} {{ {nodes} }}"


@pytest.mark.parametrize("nodes", ERF)
def test_erf_becomes_gelu(rewrites: Any, nodes: str) -> None:
    rewrites(FuseGelu(), graph(nodes), graph('y = Gelu<approximate = "none">(x)'))


@pytest.mark.parametrize("nodes", TANH)
def test_tanh_becomes_the_approximation(rewrites: Any, nodes: str) -> None:
    rewrites(FuseGelu(), graph(nodes), graph('y = Gelu<approximate = "tanh">(x)'))


@pytest.mark.parametrize(
    "nodes",
    [
        "d = Div(x, root) e = Erf(d) s = Add(e, one) p = Mul(x, s) y = Mul(p, one)",  # not halved
        "d = Mul(x, half) e = Erf(d) s = Add(e, one) p = Mul(x, s) y = Mul(p, half)",  # another argument
        "d = Div(x, root) e = Erf(d) s = Add(e, half) p = Mul(x, s) y = Mul(p, half)",  # another summand
        "n = Neg(x) d = Div(x, root) e = Erf(d) s = Add(e, one) p = Mul(n, s) y = Mul(p, half)",  # another factor
    ],
)
def test_near_misses_stay(leaves: Any, nodes: str) -> None:
    leaves(FuseGelu(), graph(nodes))


def test_an_inner_value_that_is_needed_elsewhere_stays(rewrites: Any) -> None:
    before = f"g (float[2,4] x) => (float[2,4] y, float[2,4] e) {CONSTANTS} {{ {ERF[0]} }}"
    after = f"""g (float[2,4] x) => (float[2,4] y, float[2,4] e) {CONSTANTS} {{
        d = Div(x, root) e = Erf(d) y = Gelu<approximate = "none">(x) }}"""
    rewrites(FuseGelu(), before, after)


class OldTarget(OnnxRuntimeTarget):
    @property
    def dialect(self) -> Dialect:
        return Dialect(int8=None, opsets=(13, 17))


def test_stays_where_graph_or_target_has_no_gelu(leaves: Any, context: Any) -> None:
    leaves(FuseGelu(), graph(ERF[0]), opset=19)
    leaves(FuseGelu(), graph(ERF[0]), context=replace(context, target=OldTarget()))
