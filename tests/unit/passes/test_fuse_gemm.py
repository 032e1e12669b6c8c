from typing import Any

import pytest

from optkit.passes.fuse_gemm import FuseGemm

CONSTANTS = "<float[2,3] w = {1, 2, 3, 4, 5, 6}, float[3] b = {1, 2, 3}, float[1,1,3] deep = {1, 2, 3}>"


def graph(nodes: str, ends: str = "(float[n,2] x) => (float[n,3] y)") -> str:
    return f"g {ends} {CONSTANTS} {{ {nodes} }}"


@pytest.mark.parametrize("add", ["Add(p, b)", "Add(b, p)"])
def test_product_and_bias_become_gemm(rewrites: Any, add: str) -> None:
    rewrites(FuseGemm(), graph(f"p = MatMul(x, w) y = {add}"), graph("y = Gemm(x, w, b)"))


@pytest.mark.parametrize(
    ("nodes", "ends"),
    [
        ("p = MatMul(x, w) y = Add(p, b)", "(float[n,5,2] x) => (float[n,5,3] y)"),  # not a matrix
        ("p = MatMul(x, w) y = Add(p, deep)", "(float[n,2] x) => (float[1,n,3] y)"),  # the bias widens it
        ("p = MatMul(x, w) y = Add(p, r)", "(float[n,2] x, float[n,3] r) => (float[n,3] y)"),  # not constant
        ("p = MatMul(x, w) y = Add(p, b)", "(float[n,2] x) => (float[n,3] y, float[n,3] p)"),  # needed elsewhere
    ],
)
def test_others_stay(leaves: Any, nodes: str, ends: str) -> None:
    leaves(FuseGemm(), graph(nodes, ends))
