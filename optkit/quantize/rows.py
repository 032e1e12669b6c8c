"""A layer as a product of matrices: rows of what it reads, and its weight as the table that they are multiplied by.

Inputs are in the order in which kernels sum them (``saturation``): a convolution's channels are innermost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from optkit.quantize.placement.graph import attribute, weight_axis

if TYPE_CHECKING:
    import onnx_ir as ir

Array = np.ndarray[Any, Any]


def rows_read(
    node: ir.Node, shape: tuple[int, ...], arrays: Sequence[Array], most: int, rng: np.random.Generator
) -> Array | None:
    """Some rows of what a layer reads, float32[groups, rows, inputs of a group]; None where they are not known.

    Args:
        node: a layer with a weight of this shape.
        shape: of its weight.
        arrays: the tensor that it reads, one array per batch.
        most: how many rows at most, as many from each batch.
        rng: chooses which.
    """
    per_batch = -(-most // len(arrays))
    if node.op_type in ("MatMul", "Gemm"):
        tables = (array.reshape(-1, array.shape[-1]) for array in arrays)
        return np.concatenate([table[_some(len(table), per_batch, rng)] for table in tables])[None]
    padding = node.attributes.get("auto_pad")
    if node.op_type != "Conv" or len(shape) != 4 or (padding is not None and padding.as_string() != "NOTSET"):
        return None
    patches = np.concatenate([_patches(node, shape, array, per_batch, rng) for array in arrays])
    grouped = patches.reshape(len(patches), attribute(node, "group", 1), -1, *shape[2:])
    return np.moveaxis(grouped, (0, 2), (1, 4)).reshape(grouped.shape[1], len(patches), -1)


def _some(count: int, most: int, rng: np.random.Generator) -> Array:
    return np.arange(count) if count <= most else rng.choice(count, most, replace=False)


def _patches(node: ir.Node, shape: tuple[int, ...], array: Array, most: int, rng: np.random.Generator) -> Array:
    """Some of the patches that a convolution reads, float32[patches, channels, height, width]."""
    top, left, bottom, right = _ints(node, "pads", (0, 0, 0, 0))
    (down, across), (tall, wide) = _ints(node, "strides", (1, 1)), _ints(node, "dilations", (1, 1))
    padded = np.pad(array, ((0, 0), (0, 0), (top, bottom), (left, right)))
    window = ((shape[2] - 1) * tall + 1, (shape[3] - 1) * wide + 1)
    views = np.lib.stride_tricks.sliding_window_view(padded, window, axis=(2, 3))
    views = views[:, :, ::down, ::across, ::tall, ::wide]
    places = _some(views.shape[0] * views.shape[2] * views.shape[3], most, rng)
    sample, row, column = np.unravel_index(places, (views.shape[0], *views.shape[2:4]))
    patches: Array = views[sample, :, row, column]
    return patches


def _ints(node: ir.Node, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    found = node.attributes.get(name)
    return default if found is None else tuple(found.as_ints())


def as_table(node: ir.Node, weight: Array) -> Array:
    """A weight as [groups, outputs of a group, inputs of a group]: a layer computes rows @ table' in each group."""
    by_output = np.moveaxis(weight, weight_axis(node), 0)
    groups = attribute(node, "group", 1) if node.op_type == "Conv" else 1
    return np.moveaxis(by_output, 1, -1).reshape(groups, len(by_output) // groups, -1)


def from_table(node: ir.Node, table: Array, shape: tuple[int, ...]) -> Array:
    """The weight of this shape that ``as_table`` makes the table of."""
    axis = weight_axis(node)
    outputs, inputs, *kernel = shape[axis], shape[1 - axis], *shape[2:]
    by_output = np.moveaxis(table.reshape(outputs, *kernel, inputs), -1, 1)
    return np.ascontiguousarray(np.moveaxis(by_output, 0, axis))
