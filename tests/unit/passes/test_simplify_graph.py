from typing import Any

import pytest

from optkit.passes.simplify_graph import SimplifyGraph

CONSTANTS = "<float one = {1}, float zero = {0}, float low = {-1}, float high = {2}>"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("a = Mul(x, one) y = Relu(a)", "a = Identity(x) y = Relu(a)"),
        ("a = Add(zero, x) y = Relu(a)", "a = Identity(x) y = Relu(a)"),
        ("a = Cast<to = 1>(x) y = Relu(a)", "a = Identity(x) y = Relu(a)"),
        ("a = Max(x, low) y = Min(a, high)", "y = Clip(x, low, high)"),
    ],
)
def test_what_does_nothing_goes(rewrites: Any, before: str, after: str) -> None:
    ends = "g (float[2,4] x) => (float[2,4] y)"
    rewrites(SimplifyGraph(), f"{ends} {CONSTANTS} {{ {before} }}", f"{ends} {CONSTANTS} {{ {after} }}")


def test_a_small_epsilon_is_not_zero(leaves: Any) -> None:
    constants = "<float eps = {0.000000000001}, float almost = {1.00001}>"
    leaves(SimplifyGraph(), f"g (float[2,4] x) => (float[2,4] y) {constants} {{ y = Add(x, eps) }}")
    leaves(SimplifyGraph(), f"g (float[2,4] x) => (float[2,4] y) {constants} {{ y = Mul(x, almost) }}")


def test_what_does_something_stays(leaves: Any) -> None:
    leaves(SimplifyGraph(), f"g (float[2,4] x) => (float[2,4] y) {CONSTANTS} {{ y = Mul(x, high) }}")
