from typing import Any

from optkit.passes.merge_nodes import MergeNodes


def test_equal_nodes_become_one(rewrites: Any) -> None:
    rewrites(
        MergeNodes(),
        "g (float[2] x) => (float[2] y) { a = Exp(x) b = Exp(x) y = Add(a, b) }",
        "g (float[2] x) => (float[2] y) { a = Exp(x) y = Add(a, a) }",
    )


def test_random_nodes_stay_two(leaves: Any) -> None:
    leaves(
        MergeNodes(),
        "g (float[2] x) => (float[2] y) { a = RandomNormalLike(x) b = RandomNormalLike(x) y = Sub(a, b) }",
    )
