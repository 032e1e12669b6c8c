from typing import Any

from optkit.passes.collapse_transposes import CollapseTransposes


def test_two_transposes_become_one(rewrites: Any) -> None:
    before = """g (float[2,3,4] x) => (float[4,2,3] y) {
        a = Transpose<perm = [1, 0, 2]>(x) y = Transpose<perm = [2, 1, 0]>(a) }"""
    rewrites(
        CollapseTransposes(), before, "g (float[2,3,4] x) => (float[4,2,3] y) { y = Transpose<perm = [2, 0, 1]>(x) }"
    )


def test_two_that_undo_each_other_leave_nothing_to_compute(rewrites: Any) -> None:
    before = """g (float[2,3] x) => (float[2,3] y) {
        a = Transpose<perm = [1, 0]>(x) b = Transpose<perm = [1, 0]>(a) y = Relu(b) }"""
    after = "g (float[2,3] x) => (float[2,3] y) { b = Identity(x) y = Relu(b) }"
    rewrites(CollapseTransposes(), before, after)


def test_one_alone_stays(leaves: Any) -> None:
    leaves(CollapseTransposes(), "g (float[2,3] x) => (float[3,2] y) { y = Transpose<perm = [1, 0]>(x) }")
