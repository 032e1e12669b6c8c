from __future__ import annotations

from typing import Annotated, Literal

import pytest
from pydantic import Field

from optkit.documents import Strict, parse_yaml
from optkit.errors import RecipeError


class Circle(Strict):
    kind: Literal["circle"] = "circle"
    radius: float


class Square(Strict):
    kind: Literal["square"] = "square"
    side: float = Field(gt=0)


class Drawing(Strict):
    title: str = ""
    shapes: tuple[Annotated[Circle | Square, Field(discriminator="kind")], ...] = ()
    by_name: dict[str, Square] = Field(default_factory=dict)


def refusal(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_yaml(Drawing, text, "d.yaml")
    return str(caught.value)


def test_reads_a_document_that_fits():
    drawing = parse_yaml(Drawing, "title: a\nshapes:\n  - {kind: square, side: 2}\n", "d.yaml")
    assert drawing == Drawing(title="a", shapes=(Square(side=2),))


def test_an_unknown_key_names_line_path_and_nearest_key():
    assert refusal("titel: a") == "d.yaml:1: unknown key titel: did you mean 'title'?"
    text = "title: a\nshapes:\n  - kind: square\n    side: 1\n    sied: 2\n"
    assert refusal(text) == "d.yaml:5: unknown key shapes[0].sied: did you mean 'side'?"
    assert "d.yaml:3: unknown key by_name.a.radius: known: kind, side" in refusal(
        "by_name:\n  a:\n    radius: 1\n    side: 1\n"
    )


def test_an_unknown_tag_names_the_nearest():
    assert refusal("shapes:\n  - {kind: sqare}\n") == "d.yaml:2: shapes[0]: 'sqare' is unknown, did you mean 'square'?"


def test_wrong_and_missing_values_name_their_place():
    assert (
        refusal("shapes:\n  - {kind: square, side: 0}\n") == "d.yaml:2: shapes[0].side: input should be greater than 0"
    )
    assert refusal("shapes:\n  - {kind: circle}\n").startswith("d.yaml:2: the key shapes[0].radius is missing")


def test_every_problem_is_reported_at_once():
    assert len(refusal("titel: a\nshaeps: []\n").splitlines()) == 2


def test_a_repeated_key_is_an_error():
    assert refusal("title: a\ntitle: b\n") == "d.yaml:2: the key title is already set in line 1"


@pytest.mark.parametrize("text", ["shapes: [", "\tx: 1", "a: b: c"])
def test_text_that_is_not_yaml_names_the_line(text):
    assert refusal(text).startswith("d.yaml:1: not YAML")


@pytest.mark.parametrize("text", ["", "- 1", "word"])
def test_a_document_is_a_mapping(text):
    assert "a mapping of keys to values is wanted" in refusal(text)


def test_yaml_cannot_make_python_objects():
    assert "not YAML" in refusal("title: !!python/object/apply:os.system ['true']")
