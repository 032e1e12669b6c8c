"""Channels that can only go together, as Torch-Pruning's dependency graph finds them, and their removal.

A channel that leaves one layer leaves every layer that adds to it, normalizes it or reads it (Fang et al. 2023,
DepGraph). Such a set is a ``Group``. Which groups may be pruned at all is decided here, and proved: the model without
some channels must compute what the whole model computes when nothing reads them.
"""

from __future__ import annotations

import copy
import logging
import math
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from optkit.errors import PreconditionError
from optkit.failures import reason
from optkit.pruning.layers import calls_of, is_weighted, layer_of, named_by, owns_weight, tied_layers

if TYPE_CHECKING:
    import torch

log = logging.getLogger("optkit.pruning")

_HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
"""What attention modules call the number of their heads."""

_HEAD_WIDTHS = ("all_head_size", "inner_dim")
"""What they call the channels of all heads together."""

_HEAD_LAYERS = re.compile(r"(.*_)?(q|k|v|wq|wk|wv|query|key|value)(_.*)?")
"""What they call the layers that give each head its channels."""

_SAME = 1e-3
"""The largest error, relative to the largest output, that passes for rounding in other sums."""


@dataclass(frozen=True)
class Reader:
    """A weighted layer that reads the channels of a group.

    Attributes:
        layer: its name.
        width: how many input channels it has.
        inputs: those that are of the group.
        channels: of the group, the channel that each of ``inputs`` is.
    """

    layer: str
    width: int
    inputs: Sequence[int]
    channels: Sequence[int]


@dataclass(frozen=True)
class Group:
    """Layers whose channels can only be removed together.

    Attributes:
        root: name of the layer whose output channels number the group's.
        width: how many channels it has.
        unit: how many neighbours must go together: those of an attention head, else 1.
        layers: the layers whose outputs get narrower, with their channels for each channel of the group.
        readers: the layers that read them.
        exact: whether nothing mixes the channels on the way to the readers, as a LayerNorm does.
        handle: Torch-Pruning's own group.
    """

    root: str
    width: int
    unit: int
    layers: Mapping[str, int]
    readers: tuple[Reader, ...]
    exact: bool
    handle: Any = field(repr=False, compare=False)


Removal = Mapping[str, Sequence[int]]
"""Channels to remove by the root of their group."""


def prunable_groups(
    module: torch.nn.Module, examples: tuple[torch.Tensor, ...], skip: Sequence[str], multiple: int
) -> tuple[list[Group], dict[str, str]]:
    """The groups that may be pruned, and why the others may not, by the name of a layer.

    Args:
        module: parameters need gradients; it is not changed.
        examples: one tensor for each input.
        skip: patterns of names of layers that keep their width.
        multiple: how many channels go at a time.

    Raises:
        PreconditionError: the model cannot be traced, or a pattern of ``skip`` matches nothing.
    """
    calls = calls_of(module, examples)
    names = [name for name, part in module.named_modules() if is_weighted(part)]
    skipped = named_by(skip, names)
    graph = _graph(module, examples)
    known = {part: name for name, part in module.named_modules()}
    heads = _heads(module)
    allowed, refused = [], {}
    for handle in graph.get_all_groups():
        group = _group(handle, graph, known, heads)
        why = _skipped(group, skipped) or _unfit(group, graph, module, calls)
        if why is None:
            allowed.append(group)
        else:
            refused[group.root] = why
    for name in names:
        if layer_of(module, name) not in graph.module2node:
            refused[name] = "the output does not depend on it"
    # In the order of forward: Torch-Pruning begins at the output
    places = {name: place for place, name in enumerate(calls)}
    allowed.sort(key=lambda group: min(places[name] for name in group.layers))
    return _proven(module, examples, allowed, refused, multiple), refused


def remove(module: torch.nn.Module, examples: tuple[torch.Tensor, ...], removal: Removal) -> torch.nn.Module:
    """A copy without the given channels."""
    pruned = copy.deepcopy(module)
    graph = _graph(pruned, examples)
    sizes = {name: layer_of(pruned, name).out_features // count for name, count in _heads(pruned).items()}
    for root, channels in removal.items():
        if not channels:
            continue
        layer = layer_of(pruned, root)
        handle = graph.get_pruning_group(layer, graph.get_pruner_of_module(layer).prune_out_channels, list(channels))
        handle.prune()
    _recount_heads(pruned, sizes)
    return pruned


# --- Torch-Pruning ----------------------------------------------------------------------------------------------------


def _graph(module: torch.nn.Module, examples: tuple[torch.Tensor, ...]) -> Any:
    import torch
    import torch_pruning

    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")  # of parameters outside of layers: the proof below judges those groups
        try:
            return torch_pruning.DependencyGraph().build_dependency(module, examples, verbose=False)
        except Exception as error:  # whatever its tracing meets in a user's forward
            raise PreconditionError(
                f"the dependencies between the model's layers cannot be traced: {reason(error)}; "
                "prune_channels cannot prune it"
            ) from error


def _group(handle: Any, graph: Any, known: Mapping[Any, str], heads: Mapping[str, int]) -> Group:
    import torch

    layers: dict[str, int] = {}
    readers = []
    exact = True
    width = len(handle[0].idxs)
    for item in handle.items:
        target = item.dep.target.module
        mixes = isinstance(target, (torch.nn.LayerNorm, torch.nn.GroupNorm, torch.nn.RMSNorm, torch.nn.Parameter))
        exact = exact and not mixes
        if not is_weighted(target):
            continue
        name = known[target]
        if graph.is_out_channel_pruning_fn(item.dep.handler):
            layers[name] = max(1, len(item.idxs) // width)
        else:
            roots = [root for root in item.root_idxs if root is not None]
            readers.append(Reader(name, graph.get_in_channels(target), list(item.idxs), roots))
    root = known[handle[0].dep.target.module]
    unit = max((width // heads[name] for name in layers if name in heads and width % heads[name] == 0), default=1)
    return Group(root, width, unit, layers, tuple(readers), exact, handle)


# --- what may not be pruned -------------------------------------------------------------------------------------------


def _skipped(group: Group, skipped: Collection[str]) -> str | None:
    name = next((name for name in group.layers if name in skipped), None)
    if name is None:
        return None
    return "`skip` names it" if name == group.root else f"it shares its channels with {name}, which `skip` names"


def _unfit(group: Group, graph: Any, module: torch.nn.Module, calls: Mapping[str, int]) -> str | None:
    """Why the group cannot be pruned, as far as its layers tell."""
    import torch

    written = (item.dep.target for item in group.handle.items if graph.is_out_channel_pruning_fn(item.dep.handler))
    if not group.readers or any(not node.outputs for node in written):
        return "its channels are the model's output"
    tied = tied_layers(module)
    for name in [*group.layers, *(reader.layer for reader in group.readers)]:
        layer = layer_of(module, name)
        if calls[name] > 1:
            return f"{name} is shared: forward calls it {calls[name]} times"
        if name in tied:
            return f"{name} is shared: it has its weight in common with {tied[name]}"
        if not owns_weight(layer):
            return f"{name} has a weight that is computed from others"
        groups = getattr(layer, "groups", 1)
        if groups > 1 and not groups == layer.in_channels == layer.out_channels:
            return f"{name} is a grouped convolution ({groups} groups), whose channels are bound to their group"
    if len(graph.get_pruning_group(group.handle[0].dep.target.module, group.handle[0].dep.handler, [0])[0].idxs) > 1:
        return "forward cuts its output into parts whose channels are bound to each other, as fused q, k and v are"
    for item in group.handle.items:
        target = item.dep.target.module
        if isinstance(target, (torch.nn.MultiheadAttention, torch.nn.RNNBase)):
            return f"a {type(target).__name__} shares its channels, and holds its weights in one piece"
        if isinstance(target, torch.nn.GroupNorm) and 1 < target.num_groups < target.num_channels:
            return f"a GroupNorm of {target.num_groups} groups shares its channels, which are bound to their group"
    return None


# --- the proof --------------------------------------------------------------------------------------------------------


def _proven(
    module: torch.nn.Module,
    examples: tuple[torch.Tensor, ...],
    groups: Sequence[Group],
    refused: dict[str, str],
    multiple: int,
) -> list[Group]:
    """The groups without which the model computes what it should; all at once, and one by one if that fails."""
    for together in ([g for g in groups if g.exact], [g for g in groups if not g.exact]):
        if not together or _objection(module, examples, together, multiple) is None:
            continue
        for group in together:
            why = _objection(module, examples, [group], multiple)
            if why is not None:
                refused[group.root] = why
    return [group for group in groups if group.root not in refused]


def _objection(
    module: torch.nn.Module, examples: tuple[torch.Tensor, ...], groups: Sequence[Group], multiple: int
) -> str | None:
    """What is wrong with the model without some channels of each group."""
    import torch

    removal = {group.root: _some(group, multiple) for group in groups}
    with torch.no_grad():
        wanted = outputs_of(_unread(module, groups, removal)(*examples))
    try:
        pruned = remove(module, examples, removal)
        with torch.no_grad():
            found = outputs_of(pruned(*examples))
    except Exception as error:  # a forward with sizes written into it raises anything
        return f"forward does not run with fewer channels: {reason(error)}"
    if [one.shape for one in found] != [one.shape for one in wanted]:
        return "its channels are the model's output"
    for one, other in zip(found, wanted, strict=True):
        largest = max(float(other.abs().max()), 1e-6) if other.is_floating_point() else math.inf
        if all(group.exact for group in groups) and not (one - other).abs().max() <= _SAME * largest:
            return "forward mixes or rearranges its channels, so that they cannot be told apart behind it"
    return None


def _some(group: Group, multiple: int) -> range:
    """Channels from the middle: at the front, a wrong idea of where channels go is more likely to look right."""
    step = math.lcm(group.unit, multiple)
    count = step if step < group.width else group.unit
    start = min(group.width // 2 // group.unit * group.unit, group.width - count)
    return range(start, start + count) if count < group.width else range(0)


def _unread(module: torch.nn.Module, groups: Sequence[Group], removal: Removal) -> torch.nn.Module:
    """A copy in which no layer reads the removed channels."""
    import torch

    whole = copy.deepcopy(module)
    with torch.no_grad():
        for group in groups:
            gone = set(removal[group.root])
            for reader in group.readers:
                inputs = [i for i, channel in zip(reader.inputs, reader.channels, strict=True) if channel in gone]
                layer = layer_of(whole, reader.layer)
                columns(layer, layer.weight)[inputs] = 0
    return whole


def columns(layer: Any, weight: torch.Tensor) -> torch.Tensor:
    """A view of a weight of ``layer``, or of its gradient, with the input channels in front."""
    return weight if getattr(layer, "transposed", False) else weight.transpose(0, 1)


def outputs_of(given: Any) -> list[torch.Tensor]:
    """The tensors that a forward gave, in the order of the signature."""
    import torch
    from torch.utils import _pytree

    return [leaf for leaf in _pytree.tree_leaves(given) if isinstance(leaf, torch.Tensor)]


# --- attention heads --------------------------------------------------------------------------------------------------


def _heads(module: torch.nn.Module) -> dict[str, int]:
    """The number of heads by linear layer, where a module says how many it has."""
    import torch

    found = {}
    for name, part in module.named_modules():
        count = next((getattr(part, key) for key in _HEAD_COUNTS if isinstance(getattr(part, key, None), int)), None)
        if count is None or count < 1:
            continue
        for child, layer in part.named_children():
            if isinstance(layer, torch.nn.Linear) and _HEAD_LAYERS.fullmatch(child) and layer.out_features % count == 0:
                found[f"{name}.{child}" if name else child] = count
    return found


def _recount_heads(module: torch.nn.Module, sizes: Mapping[str, int]) -> None:
    """Correct what attention modules hold about their heads; ``sizes`` of heads by layer do not change."""
    for name, size in sizes.items():
        attention = layer_of(module, name.rpartition(".")[0])
        width = layer_of(module, name).out_features
        count = next(key for key in _HEAD_COUNTS if isinstance(getattr(attention, key, None), int))
        setattr(attention, count, width // size)
        for key in _HEAD_WIDTHS:
            if isinstance(getattr(attention, key, None), int):
                setattr(attention, key, width)
