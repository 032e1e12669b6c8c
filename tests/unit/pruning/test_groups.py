from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import TOKENS, Residual, Transformer, model_of, seeded
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from optkit.errors import PreconditionError
from optkit.models import TorchModel
from optkit.pruning.groups import Group, columns, prunable_groups, remove
from optkit.pruning.layers import layer_of
from optkit.pruning.samples import examples

TOLERANCE = 1e-5
"""Sums over fewer channels are added up in another order."""


def groups_of(model: TorchModel, skip: tuple[str, ...] = (), multiple: int = 1) -> tuple[dict[str, Group], dict]:
    model.module.requires_grad_(True)
    found, refused = prunable_groups(model.module, examples(model.signature), skip, multiple)
    return {group.root: group for group in found}, refused


def unread(model: TorchModel, group: Group, channels: list[int]) -> nn.Module:
    """The model in which every weight that reads one of the channels is zero."""
    module = copy.deepcopy(model.module).requires_grad_(False)
    for reader in group.readers:
        layer = layer_of(module, reader.layer)
        gone = [i for i, channel in zip(reader.inputs, reader.channels, strict=True) if channel in channels]
        columns(layer, layer.weight)[gone] = 0
    return module


RESIDUAL = model_of(seeded(Residual))
GROUPS, REFUSED = groups_of(RESIDUAL)


def test_channels_that_are_added_or_concatenated_go_together():
    assert {root: set(group.layers) for root, group in GROUPS.items()} == {
        "hidden": {"hidden"},
        "up": {"up"},
        "left": {"left"},
        "right": {"right"},
        "depthwise": {"depthwise", "stem", "outer"},
        "inner": {"inner"},
    }
    assert {reader.layer for reader in GROUPS["depthwise"].readers} == {"inner", "left", "right"}
    assert REFUSED == {"head": "its channels are the model's output"}


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_without_channels_the_model_computes_what_it_does_when_nobody_reads_them(data: st.DataObject):
    roots = data.draw(st.lists(st.sampled_from(sorted(GROUPS)), min_size=1, unique=True))
    removal, whole = {}, RESIDUAL.module
    for root in roots:
        most = GROUPS[root].width - 1
        removal[root] = data.draw(st.lists(st.integers(0, most), min_size=1, max_size=most, unique=True))
        whole = unread(TorchModel(whole, RESIDUAL.signature), GROUPS[root], removal[root])
    inputs = examples(RESIDUAL.signature)
    pruned = remove(RESIDUAL.module, inputs, removal)
    with torch.no_grad():
        torch.testing.assert_close(pruned(*inputs), whole(*inputs), rtol=TOLERANCE, atol=TOLERANCE)
    assert layer_of(pruned, roots[0]).weight.numel() < layer_of(RESIDUAL.module, roots[0]).weight.numel()


def test_attention_loses_whole_heads_and_knows_how_many_it_has():
    model = model_of(seeded(Transformer), TOKENS)
    groups, refused = groups_of(model, multiple=8)
    heads = next(group for group in groups.values() if "attention.q_proj" in group.layers)
    assert heads.unit == 8 and set(heads.layers) == {f"attention.{part}_proj" for part in "qkv"}
    channels = list(range(8, 16))
    inputs = examples(model.signature)
    pruned = remove(model.module, inputs, {heads.root: channels})
    assert layer_of(pruned, "attention").num_heads == 3
    with torch.no_grad():
        whole = unread(model, heads, channels)
        torch.testing.assert_close(pruned(*inputs), whole(*inputs), rtol=TOLERANCE, atol=TOLERANCE)
    assert refused == {"head": "its channels are the model's output"}


def test_a_normalization_over_channels_takes_its_group_off_the_exact_proof():
    groups, _ = groups_of(model_of(seeded(Transformer), TOKENS))
    assert {tuple(sorted(group.layers)): group.exact for group in groups.values()} == {
        ("attention.k_proj", "attention.q_proj", "attention.v_proj"): True,
        ("attention.out_proj", "down", "embed"): False,
        ("up",): True,
    }


# --- what cannot be pruned --------------------------------------------------------------------------------------------


class Net(nn.Module):
    """``first`` and ``last`` around something that is in the way."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.last = nn.Linear(16, 5)
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.last(self.middle(self.first(image)).mean((2, 3)))

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


class Twice(Net):
    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(F.relu(self.inner(x)))


class Sized(Net):
    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(len(x), 16, -1).view(len(x), 16, 8, 8)


class Shuffled(Net):
    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(len(x), 2, x.shape[1] // 2, 8, 8).transpose(1, 2).flatten(1, 2)


class Tied(Net):
    def __init__(self) -> None:
        super().__init__(inner=nn.Conv2d(16, 16, 1), other=nn.Conv2d(16, 16, 1))
        self.other.weight = self.inner.weight

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(F.relu(self.inner(x)))


class Unused(Net):
    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj, self.head = nn.Linear(6, 48), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(tokens).chunk(3, -1)
        return self.head(torch.relu(self.proj(torch.softmax(q @ k.transpose(1, 2), -1) @ v)).mean(1))


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, 16), nn.Linear(16, 5)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


@pytest.mark.parametrize(
    ("make", "root", "message"),
    [
        (lambda: Twice(inner=nn.Conv2d(16, 16, 1)), None, "inner is shared: forward calls it 2 times"),
        (Tied, None, "shared: it has its weight in common with"),
        (lambda: Net(inner=nn.Conv2d(16, 16, 3, padding=1, groups=4)), "first", r"inner is a grouped .*\(4 groups\)"),
        (lambda: Net(inner=nn.Conv2d(16, 32, 1, groups=16)), "first", r"inner is a grouped convolution \(16 groups\)"),
        (lambda: Net(inner=nn.GroupNorm(4, 16)), "first", "a GroupNorm of 4 groups shares its channels"),
        (Sized, "first", "forward does not run with fewer channels: RuntimeError: shape"),
        (Shuffled, "first", "forward mixes or rearranges its channels"),
        (lambda: Net(inner=weight_norm(nn.Conv2d(16, 16, 1))), "inner", "inner has a weight that is computed from"),
        (lambda: Unused(inner=nn.Conv2d(16, 16, 1)), "inner", "the output does not depend on it"),
    ],
    ids=["shared", "tied", "grouped", "multiplier", "group_norm", "sized", "shuffled", "computed", "unused"],
)
def test_what_cannot_be_pruned_is_refused_by_name(make: Callable[[], nn.Module], root: str | None, message: str):
    module = seeded(make)
    if isinstance(module, Net) and message.startswith("inner is a grouped convolution"):
        module.last = nn.Linear(32, 5)
    found, refused = groups_of(model_of(module), multiple=2)
    reasons = refused[root] if root else " ".join(refused.values())
    assert re.search(message, reasons), refused
    assert root not in found


@pytest.mark.parametrize(
    ("make", "root", "message"),
    [
        (Fused, "qkv", "forward cuts its output into parts whose channels are bound to each other"),
        (Whole, "embed", "a MultiheadAttention shares its channels, and holds its weights in one piece"),
    ],
)
def test_attention_in_one_piece_is_refused(make: Callable[[], nn.Module], root: str, message: str):
    found, refused = groups_of(model_of(seeded(make), TOKENS))
    assert message in refused[root] and root not in found


def test_a_depthwise_layer_goes_with_the_layer_before_it_and_never_alone():
    depthwise = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, groups=3), nn.Conv2d(3, 16, 1), nn.ReLU())
    module = nn.Sequential(depthwise, nn.Conv2d(16, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    found, refused = groups_of(model_of(seeded(lambda: module)))
    assert set(found) == {"0.1"} and "forward does not run with fewer channels" in refused["0.0"]


def test_layers_to_skip_take_along_those_that_share_their_channels():
    found, refused = groups_of(RESIDUAL, skip=("stem", "le*"))
    assert "depthwise" not in found and "left" not in found and "inner" in found
    assert refused["depthwise"] == "it shares its channels with stem, which `skip` names"
    assert refused["left"] == "`skip` names it"


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(PreconditionError, match=r"`skip`: no layer is called 'iner'; did you mean 'inner'\?"):
        groups_of(RESIDUAL, skip=("iner",))


@pytest.mark.parametrize("multiple", [1, 7, 8, 10, 15])
def test_every_group_is_proved_whatever_the_multiple(multiple: int):
    """Widths of 16 with multiples that do not fit twice: the channels shuffled behind it must still be noticed."""
    found, refused = groups_of(model_of(seeded(lambda: Shuffled(inner=nn.Identity()))), multiple=multiple)
    assert not found and "first" in refused


def test_what_the_output_does_not_depend_on_is_left_alone():
    class Detached(Net):
        def middle(self, x: torch.Tensor) -> torch.Tensor:
            return x.detach()

    model = model_of(seeded(lambda: Detached(inner=nn.Conv2d(16, 16, 1))))
    found, refused = groups_of(model)
    assert not found and refused["first"] == "the output does not depend on it"
