"""The layers of a PyTorch module that have weights: their names, how often they run, what they share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from optkit.errors import PreconditionError, did_you_mean

if TYPE_CHECKING:
    import torch


def layer_of(module: torch.nn.Module, name: str) -> Any:
    """The layer of that name. Untyped: every kind has widths of its own."""
    return module.get_submodule(name)


def is_weighted(layer: Any) -> bool:
    """Whether this is a convolution or a linear layer."""
    import torch

    return isinstance(layer, (torch.nn.modules.conv._ConvNd, torch.nn.Linear))


def owns_weight(layer: Any) -> bool:
    """Whether the weight is a parameter of its own, not what a weight norm or a parametrization makes of others."""
    return "weight" in layer._parameters


def refuse_program(module: torch.nn.Module) -> None:
    """Refuse a module whose layers are no Python objects any more.

    Raises:
        PreconditionError: it is a TorchScript or torch.export program.
    """
    import torch

    parts = (torch.jit.ScriptModule, torch.fx.GraphModule)
    if any(isinstance(part, parts) for part in module.modules()):
        raise PreconditionError(
            "the checkpoint is a TorchScript or torch.export program, whose layers are fixed: "
            "hand over a state_dict with the factory of its module"
        )


def named_by(patterns: Sequence[str], names: Sequence[str]) -> set[str]:
    """The names that the patterns match; a pattern also names everything inside the module that it matches.

    Raises:
        PreconditionError: a pattern matches nothing.
    """
    matched: set[str] = set()
    for pattern in patterns:
        found = {name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")}
        if not found:
            raise PreconditionError(f"`skip`: no layer is called {pattern!r}; {did_you_mean(pattern, names)}")
        matched |= found
    return matched


def tied_layers(module: torch.nn.Module) -> dict[str, str]:
    """Layers whose weight another module has too, with that one's name."""
    owners: dict[int, list[str]] = {}
    for name, part in module.named_modules():
        for parameter in part.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    return {name: other for names in owners.values() for name in names for other in names if other != name}


def calls_of(module: torch.nn.Module, examples: tuple[torch.Tensor, ...]) -> Counter[str]:
    """How often forward calls each layer, in the order of the first calls."""
    import torch

    calls: Counter[str] = Counter()
    hooks = [
        part.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
        for name, part in module.named_modules()
        if is_weighted(part) or not list(part.children())
    ]
    try:
        with torch.no_grad():
            module(*examples)
    finally:
        for hook in hooks:
            hook.remove()
    return calls
