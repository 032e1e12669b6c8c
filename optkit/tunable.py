"""What a tuner may vary: a marker on the fields of a pass, and the search space that they make together."""

from __future__ import annotations

from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, GetJsonSchemaHandler
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema


@dataclass(frozen=True)
class Tunable:
    """Marks a field: ``fraction: Annotated[float, Tunable(low=0.1, high=0.9)] = 0.5``.

    Without arguments the range is what the field's type lists: the words of a ``Literal``, or true and false.

    Attributes:
        choices: the values worth trying; other values may be valid too.
        low: the least worth trying, of a number.
        high: the most worth trying.
        log: whether a tuner had better step by factors than by differences.
    """

    choices: tuple[Any, ...] = ()
    low: float | None = None
    high: float | None = None
    log: bool = False

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """The field's schema with its range under ``tune``."""
        return {**handler(schema), "tune": self.document()}

    def document(self) -> dict[str, Any]:
        """The range as JSON: ``{choices}``, ``{low, high}`` or ``{low, high, log}``; empty for all the type lists."""
        if self.choices:
            return {"choices": list(self.choices)}
        if self.low is None:
            return {}
        return {"low": self.low, "high": self.high, **({"log": True} if self.log else {})}


def search_space(model: type[BaseModel]) -> dict[str, Tunable]:
    """The marked fields of a configuration by name, those of nested ones as ``calibrate.method``, ranges filled in."""
    found: dict[str, Tunable] = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found.update({f"{name}.{inner}": tunable for inner, tunable in search_space(field.annotation).items()})
        marker = next((mark for mark in field.metadata if isinstance(mark, Tunable)), None)
        if marker is not None:
            found[name] = marker if marker.document() else Tunable(choices=_listed(model, name, field))
    return found


def _listed(model: type[BaseModel], name: str, field: FieldInfo) -> tuple[Any, ...]:
    values = _values(field.annotation)
    if not values:
        raise TypeError(f"{model.__name__}.{name} is marked Tunable() but its type lists no values: give a range")
    return values


def _values(annotation: Any) -> tuple[Any, ...]:
    """What a type lists: nothing if it takes more."""
    if annotation is bool:
        return (False, True)
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    parts = [_values(part) for part in get_args(annotation)] if get_origin(annotation) in (Union, UnionType) else []
    return tuple(value for part in parts for value in part) if all(parts) else ()
