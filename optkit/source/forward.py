"""What the ``forward`` of a module takes and returns, and a wrapper for one that takes or returns it otherwise."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from optkit.errors import CheckpointError, did_you_mean
from optkit.models import DTYPES, TensorSpec

if TYPE_CHECKING:
    import torch


VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def listed(parameters: Iterable[inspect.Parameter]) -> str:
    """The parameters as Python writes them, without annotations and values."""
    return ", ".join(_written(parameter) for parameter in parameters) or "nothing"


def _written(parameter: inspect.Parameter) -> str:
    if parameter.kind in VARIADIC:
        return f"{'*' * (1 + VARIADIC.index(parameter.kind))}{parameter.name}"
    return parameter.name if parameter.default is parameter.empty else f"{parameter.name}=..."


def in_order(
    inputs: tuple[TensorSpec, ...], parameters: Sequence[inspect.Parameter], forward: str
) -> tuple[TensorSpec, ...]:
    """The inputs in the order of forward's parameters."""
    # Names beside **kwargs are checked too: there a typo would be swallowed without a word
    parameters = [parameter for parameter in parameters if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
    if not parameters or any(parameter.kind in VARIADIC for parameter in parameters):
        return inputs
    order = {parameter.name: index for index, parameter in enumerate(parameters)}
    for spec in inputs:
        if spec.name not in order:
            hint = did_you_mean(spec.name, order)
            raise CheckpointError(f"{forward} takes {listed(parameters)}, but no {spec.name!r}; {hint}")
    given = {spec.name for spec in inputs}
    lacking = [p.name for p in parameters if p.default is p.empty and p.name not in given]
    if lacking:
        raise CheckpointError(
            f"{forward} takes {listed(parameters)}, and nothing describes {', '.join(lacking)}; "
            f"write --input {lacking[0]}=float32[batch,...]"
        )
    return tuple(sorted(inputs, key=lambda spec: order[spec.name]))


def by_keyword(inputs: Sequence[TensorSpec], parameters: Sequence[inspect.Parameter]) -> tuple[str, ...]:
    """The inputs that forward takes by keyword only, or after a parameter that is left out."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    fronts = [parameter.name for parameter in parameters if parameter.kind in kinds]
    if any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters):
        return ()
    names = [spec.name for spec in inputs]
    matching = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(names, fronts, strict=False))
    return tuple(names[len(list(matching)) :])


def call(module: torch.nn.Module, values: Mapping[str, Any], keywords: Sequence[str]) -> Any:
    """Call the module: what is in ``keywords`` by name, the rest by position."""
    positional = [value for name, value in values.items() if name not in keywords]
    return module(*positional, **{name: values[name] for name in keywords})


def adapted(module: torch.nn.Module, names: tuple[str, ...], keywords: tuple[str, ...]) -> torch.nn.Module:
    """A module that takes exactly these inputs, by position or by name, and returns a flat tuple of tensors."""
    import torch

    class Adapted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
            given = dict(zip(names, args, strict=False), **kwargs)
            output = call(self.module, {name: given[name] for name in names}, keywords)
            return tuple(tensor for _, tensor in tensors(output))

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature([inspect.Parameter(name, kind) for name in ("self", *names)])
    # Exporters name and match the inputs by the signature
    setattr(Adapted.forward, "__signature__", signature)  # noqa: B010
    adapted = Adapted()
    adapted.training = False  # eval() would reach into the module, and an exported one refuses it
    return adapted


def tensors(output: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in what a forward returns, with names; caches and None are left out."""
    import torch

    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(output, torch.Tensor):
        yield name or "output", output
    elif isinstance(output, Mapping):
        items = output.items()
    elif dataclasses.is_dataclass(output):
        items = ((part.name, getattr(output, part.name)) for part in dataclasses.fields(output))
    elif isinstance(output, tuple) and hasattr(output, "_fields"):
        items = zip(output._fields, output, strict=True)
    elif isinstance(output, (tuple, list)):
        name = name or "output"
        items = enumerate(output)
    for key, value in items:
        yield from tensors(value, f"{name}_{key}" if name else str(key))


def is_plain(output: Any) -> bool:
    """Whether this is a tensor, or a flat tuple, list or dict of tensors."""
    import torch

    values = list(output.values()) if type(output) is dict else output
    if type(values) not in (tuple, list):
        return isinstance(output, torch.Tensor)
    return all(isinstance(value, torch.Tensor) for value in values)


def dtype_name(dtype: torch.dtype, where: str) -> str:
    """The name of a dtype that optkit has."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise CheckpointError(f"{where} is {name}; optkit has {', '.join(DTYPES)}: cast it in forward")
    return name
