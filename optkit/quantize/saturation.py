"""Weights that the fast INT8 kernels of x86 without VNNI sum exactly.

``vpmaddubsw`` multiplies UINT8 activations by INT8 weights and adds two neighbouring products in 16 bits, where they
saturate: 255 * (w1 + w2) stays below 32768 only if w1 + w2 is at most 128. Peers therefore store 7 bits; but it is
enough that no channel has two *neighbours* whose sum is larger, which costs 0.3 bits instead of one.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from optkit.quantize.placement.graph import attribute, weight_axis

if TYPE_CHECKING:
    import onnx_ir as ir

Array = np.ndarray[Any, Any]

MOST = 128
"""What two neighbours, as they are stored, may add up to."""


def pair_reach(node: ir.Node, weight: Array) -> Array:
    """The largest sum of same-signed neighbours in each output channel: the range that leaves no sum above 128.

    Neighbours are pairs along the reduction as the kernel walks it: the rows of a matrix; a convolution's inputs with
    channels innermost. Depthwise convolutions have a kernel of their own that sums in 32 bits.
    """
    if _is_depthwise(node, weight.shape):
        each: Array = np.abs(weight).reshape(len(weight), -1).max(axis=1)
        return each
    return reach_of_rows(_rows(node, weight))


def neighbours(node: ir.Node, shape: tuple[int, ...]) -> Array:
    """Where the neighbours of a weight of this shape lie: int64[pairs, 2], positions in the flat array."""
    if _is_depthwise(node, shape):
        return np.empty((0, 2), np.int64)
    rows = _rows(node, np.arange(math.prod(shape)).reshape(shape))
    return rows[:, : rows.shape[1] // 2 * 2].reshape(-1, 2)


def _is_depthwise(node: ir.Node, shape: tuple[int, ...]) -> bool:
    return node.op_type == "Conv" and attribute(node, "group", 1) > 1 and shape[1] == 1


def _rows(node: ir.Node, weight: Array) -> Array:
    """Each output channel's weights in the order in which the kernel sums."""
    rows = np.moveaxis(weight, weight_axis(node), 0)
    if node.op_type == "Conv":
        rows = np.moveaxis(rows, 1, -1)
    return rows.reshape(len(rows), -1)


def reach_of_rows(rows: Array) -> Array:
    """The largest sum of same-signed neighbours in each row."""
    if rows.shape[1] % 2:
        rows = np.pad(rows, ((0, 0), (0, 1)))
    pairs = rows.reshape(len(rows), -1, 2)
    sums = np.maximum(np.maximum(pairs, 0).sum(axis=2), np.maximum(-pairs, 0).sum(axis=2))
    largest: Array = sums.max(axis=1)
    return largest
