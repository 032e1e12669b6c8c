"""How much each channel of a group matters.

Let :math:`W` be the weights with which a layer reads channel :math:`c`, :math:`x_c` what it reads, and :math:`f` the
model's outputs. All sums run over the layers that read the channel.

- ``magnitude``: the squared weights that write and read the channel, relative to the mean of the group (DepGraph).
- ``activation``: :math:`\\sum E[x_c^2] \\lVert W \\rVert^2`, the energy that the channel brings to its readers,
  relative to the mean of the group.
- ``taylor``: :math:`E[(\\sum \\langle W, \\partial_W v^T f \\rangle)^2]` with random signs :math:`v`, which is the
  squared change of the outputs without the channel, to first order (Molchanov et al. 2017). It needs neither labels nor
  a loss, and compares channels of different groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from optkit.pruning.groups import Group, columns
from optkit.pruning.layers import layer_of

if TYPE_CHECKING:
    import torch

Importance: TypeAlias = Literal["taylor", "activation", "magnitude"]

Examples: TypeAlias = "tuple[torch.Tensor, ...]"

Array = np.ndarray[Any, Any]


def importance(
    kind: Importance, module: torch.nn.Module, groups: Sequence[Group], batches: Sequence[Examples], seed: int
) -> dict[str, Array]:
    """Scores by the root of a group, float64[channels]; the larger, the more it matters.

    Args:
        kind: which score.
        module: what the groups are of; its parameters need gradients.
        groups: the groups.
        batches: inputs; ``magnitude`` looks at none.
        seed: of the random signs.
    """
    if kind == "magnitude":
        return {group.root: _magnitude(group) for group in groups}
    read = {reader.layer for group in groups for reader in group.readers}
    parts = _energy(module, read, batches) if kind == "activation" else _effects(module, read, batches, seed)
    return {group.root: _gathered(group, parts, kind) for group in groups}


def _magnitude(group: Group) -> Array:
    import torch_pruning

    found: Array = torch_pruning.importance.MagnitudeImportance()(group.handle).double().numpy()
    return found


def _gathered(group: Group, parts: Mapping[str, Array], kind: Importance) -> Array:
    """Sum over the readers, before squares are taken: readers may make up for each other."""
    rows = len(next(iter(parts.values())))
    total = np.zeros((rows, group.width))
    for reader in group.readers:
        np.add.at(total.T, np.asarray(reader.channels), parts[reader.layer][:, np.asarray(reader.inputs)].T)
    if kind == "taylor":
        mean: Array = np.square(total).mean(0)
        return mean
    relative: Array = total[0] / max(total[0].mean(), 1e-30)
    return relative


def _energy(module: torch.nn.Module, read: set[str], batches: Sequence[Examples]) -> dict[str, Array]:
    """By layer, float64[1, input channels]."""
    import torch

    energy: dict[str, Any] = {}
    count: dict[str, int] = {}

    def watch(name: str, layer: Any, given: Any) -> None:
        axis = 1 if isinstance(layer, torch.nn.modules.conv._ConvNd) else -1
        table = given[0].detach().movedim(axis, 0).flatten(1).double()
        energy[name] = energy.get(name, 0) + table.square().sum(1)
        count[name] = count.get(name, 0) + table.shape[1]

    hooks = [
        layer_of(module, name).register_forward_pre_hook(lambda layer, given, name=name: watch(name, layer, given))
        for name in read
    ]
    try:
        with torch.no_grad():
            for batch in batches:
                module(*batch)
    finally:
        for hook in hooks:
            hook.remove()
    layers = {name: layer_of(module, name) for name in energy}
    squares = {
        name: columns(layer, layer.weight).detach().double().flatten(1).square() for name, layer in layers.items()
    }
    return {name: (energy[name] / count[name] * squares[name].sum(1)).numpy()[None] for name in energy}


def _effects(module: torch.nn.Module, read: set[str], batches: Sequence[Examples], seed: int) -> dict[str, Array]:
    """By layer, float64[batches, input channels]: what the signed outputs lose without the channel, to first order."""
    import torch
    from torch.utils import _pytree

    generator = torch.Generator().manual_seed(seed)
    layers = {name: layer_of(module, name) for name in sorted(read)}
    weights = [layer.weight for layer in layers.values()]
    rows: dict[str, list[Array]] = {name: [] for name in layers}
    for batch in batches:
        with torch.enable_grad():
            outputs = [one for one in _pytree.tree_leaves(module(*batch)) if getattr(one, "requires_grad", False)]
            signed = torch.stack([(one * _signs(one, generator)).sum() for one in outputs]).sum()
        slopes = torch.autograd.grad(signed, weights, allow_unused=True, materialize_grads=True)
        for (name, layer), slope in zip(layers.items(), slopes, strict=True):
            effect = columns(layer, layer.weight.detach() * slope).flatten(1).double().sum(1)
            rows[name].append(effect.numpy())
    return {name: np.stack(found) for name, found in rows.items()}


def _signs(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    import torch

    return torch.randint(0, 2, like.shape, generator=generator).to(like.dtype) * 2 - 1
