from typing import Any

import pytest

from optkit.passes.fuse_activation import FuseActivation

CONSTANTS = "<float zero = {0}, float low = {-1}, float three = {3}, float six = {6}>"


def graph(nodes: str, constants: str = CONSTANTS) -> str:
    return f"g (float[2,4] x) => (float[2,4] y) {constants} {{ {nodes} }}"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("a = Relu(x) y = Relu(a)", "y = Relu(x)"),
        ("a = Relu(x) y = Clip(a, low, six)", "y = Clip(x, zero, six)"),
        ("a = Clip(x, low, six) y = Relu(a)", "y = Clip(x, zero, six)"),
        ("a = Clip(x, low, six) y = Clip(a, zero, three)", "y = Clip(x, zero, three)"),
        ("a = Add(x, three) c = Clip(a, zero, six) m = Mul(c, x) y = Div(m, six)", "y = HardSwish(x)"),
    ],
)
def test_activations_fuse(rewrites: Any, before: str, after: str) -> None:
    rewrites(FuseActivation(), graph(before), graph(after))


def test_others_stay(leaves: Any) -> None:
    leaves(FuseActivation(), graph("y = Clip(x, zero, six)"))
    leaves(FuseActivation(), graph("a = Add(x, three) c = Clip(a, zero, three) m = Mul(c, x) y = Div(m, six)"))
