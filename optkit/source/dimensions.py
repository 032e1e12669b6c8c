"""The names, sizes and ranges of the inputs' dimensions: what a file fixes, the recipe asks and the data suggests."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from optkit.errors import CheckpointError, did_you_mean
from optkit.models import DimRange, TensorSpec

if TYPE_CHECKING:
    from optkit.recipe import Recipe

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Declared:
    """The inputs as a file fixes them: a dimension is a size, a symbol, or a symbol that serves as its name too."""

    inputs: tuple[TensorSpec, ...]
    ranges: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)
    named: frozenset[str] = frozenset()


def inputs_of(recipe: Recipe) -> tuple[TensorSpec, ...]:
    """The inputs that the recipe describes."""
    return tuple(TensorSpec.parse(name, text) for name, text in recipe.inputs.items())


def settle(
    declared: Declared, recipe: Recipe, data_inputs: tuple[TensorSpec, ...], where: str
) -> tuple[tuple[TensorSpec, ...], dict[str, DimRange]]:
    """The inputs under their final names, and the ranges; a range of one size makes a dimension static.

    Raises:
        CheckpointError: the recipe asks for what the file rules out, or names what is not there.
    """
    names = _names(declared, recipe, data_inputs, where)
    dims = _ranges(declared, names, recipe, where)
    fixed = {dim: bounds.min for dim, bounds in dims.items() if bounds.min == bounds.max}

    def final(dim: int | str) -> int | str:
        name = names[dim] if isinstance(dim, str) else dim
        return fixed.get(name, name) if isinstance(name, str) else name

    inputs = tuple(replace(spec, shape=tuple(map(final, spec.shape))) for spec in declared.inputs)
    return inputs, {dim: bounds for dim, bounds in dims.items() if dim not in fixed}


def _names(declared: Declared, recipe: Recipe, data_inputs: tuple[TensorSpec, ...], where: str) -> dict[str, str | int]:
    """A name or a fixed size for every symbol of the file: the recipe's, the file's own, the data's, or a fresh one."""
    names: dict[str, str | int] = {}
    ours = {spec.name: spec for spec in declared.inputs}
    for wish in inputs_of(recipe):
        if wish.name not in ours:
            raise CheckpointError(f"{where}: has no input {wish.name!r}; {did_you_mean(wish.name, ours)}")
        for symbol, want in _paired(ours[wish.name], wish, where):
            if names.setdefault(symbol, want) != want:
                raise CheckpointError(
                    f"{where}: {names[symbol]} and {want} are one dimension in this file; give them one name"
                )
    for symbol in declared.named:
        names.setdefault(symbol, symbol)
    for spec in data_inputs:
        if spec.name in ours:
            for symbol, name in _suggested(ours[spec.name], spec, spec.name in recipe.inputs, where):
                names.setdefault(symbol, name)
    fronts = [spec.shape[0] if spec.shape else 0 for spec in declared.inputs]
    if all(isinstance(front, str) and front not in names for front in fronts) and "batch" not in names.values():
        names.update(dict.fromkeys(map(str, fronts), "batch"))
    spare = itertools.chain(
        (dim for dim in recipe.dims if dim not in names.values()), (f"dim_{i}" for i in itertools.count())
    )
    for dim in (dim for spec in declared.inputs for dim in spec.shape):
        if isinstance(dim, str) and dim not in names:
            names[dim] = next(name for name in spare if name not in names.values())
    return names


def _paired(ours: TensorSpec, wish: TensorSpec, where: str) -> Iterator[tuple[str, str | int]]:
    """The symbols of an input with what the recipe calls them."""
    fits = ours.dtype == wish.dtype and len(ours.shape) == len(wish.shape)
    if not fits or any(isinstance(dim, int) and dim != want for dim, want in zip(ours.shape, wish.shape, strict=True)):
        raise CheckpointError(
            f"{where}: input {ours.name!r} is {ours} in the file and cannot become {wish}; export it anew for that"
        )
    return ((dim, want) for dim, want in zip(ours.shape, wish.shape, strict=True) if isinstance(dim, str))


def _suggested(ours: TensorSpec, data: TensorSpec, decided: bool, where: str) -> Iterator[tuple[str, str]]:
    """The symbols of an input with what the data calls them; where nobody decided, a size may be unintended."""
    for dim, theirs in zip(ours.shape, data.shape, strict=False):
        if not isinstance(theirs, str):
            continue
        if isinstance(dim, str):
            yield dim, theirs
        elif not decided:
            advice = "%s: input %r is fixed at %s, though the data gives %s; export it with dynamic_shapes for that"
            log.warning(advice, where, ours.name, ours, data)
            return


def _ranges(declared: Declared, names: Mapping[str, str | int], recipe: Recipe, where: str) -> dict[str, DimRange]:
    """The ranges that the recipe asks, or that the file has; the recipe's must fit the file's."""
    dynamic = {name for name in names.values() if isinstance(name, str)}
    for dim in recipe.dims:
        if dim not in dynamic:
            hint = did_you_mean(dim, dynamic) if dynamic else "all of them are fixed"
            raise CheckpointError(f"{where}: `dims` names {dim!r}, which is no dynamic dimension of the inputs; {hint}")
    dims = dict(recipe.dims)
    for symbol, (low, high) in declared.ranges.items():
        name = names.get(symbol)
        if name is None:
            continue
        if isinstance(name, str) and name not in recipe.dims:
            old = dims.get(name, DimRange(low, low, high or max(low, 32)))
            low, high = max(low, old.min), min(high or old.max, old.max)
            dims[name] = DimRange(low, low, high)
        asked = dims[name] if isinstance(name, str) else DimRange(name, name, name)
        if asked.min < low or (high is not None and asked.max > high):
            raise CheckpointError(
                f"{where}: {name} may be {low} to {high or 'any size'} in this file, not {asked.min} to {asked.max}; "
                "change `dims`, or export it anew with that range"
            )
    return dims
