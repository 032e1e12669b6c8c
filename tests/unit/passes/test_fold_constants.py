from typing import Any

from optkit.passes.fold_constants import FoldConstants


def test_what_is_constant_is_computed(rewrites: Any) -> None:
    rewrites(
        FoldConstants(),
        """g (float[n,2] x) => (float[n,2] y) <float[2,2] w = {1, 2, 3, 4}> {
            two = Constant<value = float {2.0}>() t = Transpose<perm = [1, 0]>(w) s = Mul(t, two) y = MatMul(x, s) }""",
        "g (float[n,2] x) => (float[n,2] y) <float[2,2] s = {2, 6, 4, 8}> { y = MatMul(x, s) }",
    )


def test_quantized_weights_and_large_expansions_stay(leaves: Any) -> None:
    leaves(
        FoldConstants(),
        """g (float[n,2] x) => (float[n,2] y) <float[2,2] w = {1, 2, 3, 4}, float s = {0.1}, int8 z = {0}> {
            q = QuantizeLinear(w, s, z) d = DequantizeLinear(q, s, z) y = MatMul(x, d) }""",
    )
    leaves(
        FoldConstants(),
        """g (float[2048,2048] x) => (float[2048,2048] y) <float one = {1}, int64[2] s = {2048, 2048}> {
            e = Expand(one, s) y = Add(x, e) }""",
    )
