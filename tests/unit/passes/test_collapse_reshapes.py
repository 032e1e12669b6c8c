from typing import Any

from optkit.passes.collapse_reshapes import CollapseReshapes


def test_two_reshapes_become_one(rewrites: Any) -> None:
    before = """g (float[2,3] x) => (float[6] y) <int64[2] s = {3, 2}, int64[1] t = {6}> {
        a = Reshape(x, s) y = Reshape(a, t) }"""
    rewrites(CollapseReshapes(), before, "g (float[2,3] x) => (float[6] y) <int64[1] t = {6}> { y = Reshape(x, t) }")


def test_flatten_becomes_a_reshape(rewrites: Any) -> None:
    before = "g (float[n,3,2] x) => (float[n,6] y) { y = Flatten(x) }"
    after = "g (float[n,3,2] x) => (float[n,6] y) <int64[2] s = {0, 6}> { y = Reshape(x, s) }"
    rewrites(CollapseReshapes(), before, after)


def test_a_reshape_whose_middle_is_needed_keeps_it(leaves: Any) -> None:
    leaves(CollapseReshapes(), "g (float[2,3] x) => (float[6] y) <int64[1] t = {6}> { y = Reshape(x, t) }")
