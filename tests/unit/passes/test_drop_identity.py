from typing import Any

from optkit.passes.drop_identity import DropIdentity


def test_an_inner_identity_goes(rewrites: Any) -> None:
    rewrites(
        DropIdentity(),
        "g (float[4] x) => (float[4] y) { a = Identity(x) y = Relu(a) }",
        "g (float[4] x) => (float[4] y) { y = Relu(x) }",
    )


def test_a_graph_output_passes_its_name_on(rewrites: Any) -> None:
    rewrites(
        DropIdentity(),
        "g (float[4] x) => (float[4] y, float[4] z) { a = Relu(x) y = Identity(a) z = Neg(a) }",
        "g (float[4] x) => (float[4] y, float[4] z) { y = Relu(x) z = Neg(y) }",
    )


def test_names_of_the_boundary_stay(leaves: Any) -> None:
    leaves(DropIdentity(), "g (float[4] x) => (float[4] y) { y = Identity(x) }")
    leaves(DropIdentity(), "g (float[4] x) => (float[4] y, float[4] z) { y = Relu(x) z = Identity(y) }")
