from __future__ import annotations

import numpy as np
import pytest

from optkit.pruning.groups import Group
from optkit.pruning.ranking import removal_order, shortest


def group(root: str, width: int, unit: int = 1) -> Group:
    return Group(root, width, unit, {root: 1}, (), True, None)


def ordered(groups, scores, multiple=2, scope="global", costs=None, floors=None):
    order = removal_order(
        groups,
        {root: np.array(values, float) for root, values in scores.items()},
        costs or dict.fromkeys(scores, 1.0),
        multiple=multiple,
        scope=scope,
        floors=floors or dict.fromkeys(scores, 1),
    )
    return [(block.root, block.channels) for block in order]


def test_the_least_important_channels_go_first_and_a_multiple_stays():
    assert ordered([group("a", 6)], {"a": [5, 1, 4, 0, 3, 2]}) == [("a", (1, 3)), ("a", (4, 5))]


def test_a_width_that_is_no_multiple_becomes_one_first():
    assert ordered([group("a", 7)], {"a": [5, 1, 4, 0, 3, 2, 6]}, multiple=4) == [("a", (1, 3, 5))]


def test_global_weighs_what_blocks_matter_against_what_they_cost():
    groups, scores = [group("a", 4), group("b", 4)], {"a": [1, 1, 9, 9], "b": [2, 2, 9, 9]}
    assert ordered(groups, scores) == [("a", (0, 1)), ("b", (0, 1))]
    assert ordered(groups, scores, costs={"a": 1.0, "b": 10.0}) == [("b", (0, 1)), ("a", (0, 1))]


def test_layer_takes_the_same_share_of_every_group():
    groups, scores = [group("a", 8), group("b", 4)], {"a": [0] * 8, "b": [9] * 4}
    assert [root for root, _ in ordered(groups, scores, multiple=1, scope="layer")] == list("aabaabaaab")
    assert [root for root, _ in ordered(groups, scores, multiple=1)] == list("aaaaaaabbb")


def test_heads_go_whole():
    assert ordered([group("a", 12, unit=4)], {"a": [9] * 4 + [0, 0, 0, 9] + [3] * 4}) == [
        ("a", (4, 5, 6, 7)),
        ("a", (8, 9, 10, 11)),
    ]


def test_a_floor_is_kept():
    assert ordered([group("a", 8)], {"a": range(8)}, floors={"a": 5}) == [("a", (0, 1))]
    assert ordered([group("a", 2)], {"a": range(2)}) == []


@pytest.mark.parametrize("needed", range(1, 8))
def test_the_shortest_beginning_that_is_enough_is_found(needed: int):
    order, asked = list(range(7)), []

    def enough(part):
        asked.append(len(part))
        return len(part) >= needed

    assert shortest(order, enough) == order[:needed]
    assert len(asked) <= 4


def test_nothing_is_enough():
    assert shortest([1, 2], lambda part: False) is None
