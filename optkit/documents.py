"""Strict YAML documents: what does not fit is an error with file, line, key and the nearest valid key."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from optkit.errors import RecipeError, did_you_mean

Loc = tuple[int | str, ...]


class Strict(BaseModel):
    """A part of a document: unknown keys are errors, and values do not change after reading."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


D = TypeVar("D", bound=Strict)


def parse_yaml(cls: type[D], text: str, origin: str) -> D:
    """Read a document; ``origin`` is what messages call it, as a rule the file's path.

    Raises:
        RecipeError: the text is not YAML, repeats a key, or does not fit ``cls``.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{origin}:{mark.line + 1}" if mark else origin
        raise RecipeError(f"{where}: not YAML: {getattr(error, 'problem', error)}") from error
    if not isinstance(document, dict):
        raise RecipeError(f"{origin}: a mapping of keys to values is wanted, not {type(document).__name__}")
    lines: dict[Loc, int] = {}
    for loc, line in _lines(node, ()):
        if loc in lines:
            raise RecipeError(f"{origin}:{line}: the key {_dotted(loc)} is already set in line {lines[loc]}")
        lines[loc] = line
    return validate(cls, document, origin, lines)


def validate(cls: type[D], document: dict[str, Any], origin: str, lines: dict[Loc, int] | None = None) -> D:
    """Check a document that is already Python objects; ``lines`` tells where each key stands in the file.

    Raises:
        RecipeError: the document does not fit ``cls``.
    """
    try:
        return cls.model_validate(document)
    except ValidationError as error:
        # A tuple whose items are wrong is also reported as too short: once is enough
        details = [d for d in error.errors() if d["type"] != "too_short" or not d["input"]]
        # A misspelt key also leaves its right name missing: the spelling comes first
        details.sort(key=lambda d: d["type"] != "extra_forbidden")
        problems = [_explain(cls, detail, origin, lines or {}) for detail in details]
        raise RecipeError("\n".join(problems)) from error


def _lines(node: yaml.Node | None, loc: Loc) -> Iterator[tuple[Loc, int]]:
    """Where every key and list item stands, 1-based."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*loc, key.value)
            yield here, key.start_mark.line + 1
            yield from _lines(value, here)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            here = (*loc, index)
            yield here, value.start_mark.line + 1
            yield from _lines(value, here)


def _explain(cls: type[BaseModel], detail: ErrorDetails, origin: str, lines: dict[Loc, int]) -> str:
    # pydantic puts the tags of unions into the path; the document does not have them
    loc: Loc = ()
    for part in detail["loc"]:
        if (*loc, part) in lines or not lines:
            loc = (*loc, part)
    where = f"{origin}:{lines[loc]}" if loc in lines else origin
    ctx = detail.get("ctx", {})
    name = detail["loc"][-1] if detail["loc"] else ""
    if detail["type"] == "extra_forbidden":
        return f"{where}: unknown key {_dotted((*loc, name) if loc[-1:] != (name,) else loc)}: " + did_you_mean(
            str(name), _keys_at(cls, detail["loc"][:-1])
        )
    if detail["type"] == "union_tag_invalid":
        known = [tag.strip().strip("'") for tag in str(ctx["expected_tags"]).split(",")]
        return f"{where}: {_dotted(loc)}: {ctx['tag']!r} is unknown, {did_you_mean(ctx['tag'], known)}"
    if detail["type"] == "missing":
        return f"{where}: the key {_dotted((*loc, name) if loc[-1:] != (name,) else loc)} is missing"
    message = detail["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    return f"{where}: {_dotted(loc)}: {message}" if loc else f"{where}: {message}"


def _dotted(loc: Sequence[int | str]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)
    return text.removeprefix(".")


def _keys_at(cls: type[BaseModel], loc: Sequence[int | str]) -> set[str]:
    """The keys that the document may have at ``loc``."""
    here = {cls}
    for part in loc:
        fields = [model.model_fields[part] for model in here if part in model.model_fields]
        # An index is no tag: 0 would be the default of every field that is False
        tags = [part] if isinstance(part, str) else []
        tagged = {m for m in here for tag in tags if tag in (field.default for field in m.model_fields.values())}
        if fields:
            here = {model for field in fields for model in _models_in(field.annotation)}
        elif tagged:
            here = tagged
    return {key for model in here for key in model.model_fields}


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _models_in(argument)
