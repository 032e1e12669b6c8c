from typing import Any

from optkit.passes.merge_initializers import MergeInitializers


def test_equal_initializers_become_one(rewrites: Any) -> None:
    text = "g (float[2] x) => (float[2] y) <float[2] a = {1, 2}, float[2] b = {1, 2}> { s = Add(x, a) y = Mul(s, b) }"
    after = rewrites(MergeInitializers(), text, text)
    assert list(after.ir.graph.initializers) == ["a"]


def test_other_types_shapes_and_values_stay(leaves: Any) -> None:
    leaves(
        MergeInitializers(),
        """g (float[2] x) => (float[2] y) <float[2] a = {0, 0}, float[1] b = {0}, float[2] c = {0, 1},
        int64[1] s = {2}, int64[1] t = {0}> { p = Add(x, a) q = Add(p, b) y = Add(q, c) }""",
    )
