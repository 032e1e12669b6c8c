"""In which order channels go, so that any goal is a place in that order."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from optkit.pruning.groups import Group

Scope: TypeAlias = Literal["global", "layer"]


@dataclass(frozen=True)
class Block:
    """Channels of one group that go together, so that the width stays a multiple."""

    root: str
    channels: tuple[int, ...]


def removal_order(
    groups: Sequence[Group],
    scores: Mapping[str, np.ndarray[Any, Any]],
    costs: Mapping[str, float],
    *,
    multiple: int,
    scope: Scope,
    floors: Mapping[str, int],
) -> list[Block]:
    """The blocks that may go, the one that matters least first.

    Args:
        groups: what may be pruned.
        scores: by root, how much each channel matters.
        costs: by root, what a channel costs; ``global`` weighs what a block matters against what it costs.
        multiple: what widths shall be multiples of.
        scope: ``global`` ranks the blocks of all groups together, ``layer`` takes the same share of every group.
        floors: by root, the least width.
    """
    ranked: list[tuple[float, int, int, Block]] = []
    for number, group in enumerate(groups):
        blocks = _blocks(group, scores[group.root], multiple, floors[group.root])
        key = -math.inf
        for place, block in enumerate(blocks):
            if scope == "layer":
                key = (place + 1) / len(blocks)
            else:
                # Never before its own group's earlier blocks, whatever rounding makes of their means
                key = max(key, float(scores[group.root][list(block.channels)].mean()) / costs[group.root])
            ranked.append((key, number, place, block))
    return [block for *_, block in sorted(ranked, key=lambda entry: entry[:3])]


def _blocks(group: Group, scores: np.ndarray[Any, Any], multiple: int, floor: int) -> list[Block]:
    step = math.lcm(group.unit, multiple)
    units = scores.reshape(-1, group.unit).sum(1)
    order = np.argsort(units, kind="stable")
    channels = (order[:, None] * group.unit + np.arange(group.unit)).reshape(-1)
    blocks: list[Block] = []
    start = 0
    while True:
        count = (group.width - start) % step or step
        if group.width - start - count < max(floor, step):
            return blocks
        blocks.append(Block(group.root, tuple(sorted(int(c) for c in channels[start : start + count]))))
        start += count


def shortest(order: Sequence[Block], enough: Callable[[Sequence[Block]], bool]) -> Sequence[Block] | None:
    """The shortest beginning of ``order`` that is enough, by bisection; None if not even all of it is."""
    if not enough(order):
        return None
    low, high = 0, len(order)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(order[:middle]) else (middle, high)
    return order[:high]
