"""TensorRT: kernels that are too small for INT8 stay in float."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optkit.quantize.placement.draft import WEIGHTED, Draft
from optkit.quantize.placement.graph import attribute, constant, weight_axis

if TYPE_CHECKING:
    import onnx_ir as ir

_LEAST = 16
"""Channels that an INT8 tensor core tile wants (what NVIDIA's own quantizer skips below)."""


def small_kernels_float(node: ir.Node, draft: Draft) -> bool:
    """A product with fewer than 16 rows or columns, or a convolution with fewer than 16 channels, stays in float.

    So does a convolution of a single pixel, as in squeeze and excitation, which is a product with a vector: to quantize
    that takes a kernel of its own. The stem is spared: an image has 3 channels, and its convolution has a kernel of
    its own. So are depthwise convolutions of 3x3 or more whose channels come in eights.
    """
    weight = constant(node.inputs[1]) if node.op_type in WEIGHTED and len(node.inputs) > 1 else None
    if weight is None:
        return False
    problem = small_product(node, weight)
    if problem is not None:
        draft.keep_float(node, problem)
    return problem is not None


def small_product(node: ir.Node, weight: ir.TensorProtocol) -> str | None:
    """Why a weighted node with a weight of this shape is too small for INT8, or None."""
    return _conv_problem(node, weight) if node.op_type.startswith("Conv") else _product_problem(weight)


def _conv_problem(node: ir.Node, weight: ir.TensorProtocol) -> str | None:
    if _reads_a_pixel(node):
        return "a convolution of a single pixel is too small for INT8 to pay"
    groups = attribute(node, "group", 1)
    axis = weight_axis(node)
    shape = weight.numpy().shape
    outputs, inputs = shape[axis], shape[1 - axis]
    if groups > 1:
        outputs, inputs = outputs * (groups if axis else 1), inputs * (1 if axis else groups)
        kernel = list(shape[2:])
        fits = outputs % 8 == 0 and min(kernel, default=1) >= 3
        return None if fits else f"a grouped convolution to {outputs} channels with kernel {kernel} has no fast INT8"
    if inputs < _LEAST and _reads_graph_input(node):
        return None
    if min(inputs, outputs) < _LEAST:
        return f"a convolution from {inputs} to {outputs} channels is too small for INT8 to pay"
    return None


def _product_problem(weight: ir.TensorProtocol) -> str | None:
    rows, columns = (1, 1, *weight.numpy().shape)[-2:]
    if min(rows, columns) < _LEAST:
        return f"a product with a {rows}x{columns} matrix is too small for INT8 to pay"
    return None


def _reads_graph_input(node: ir.Node) -> bool:
    source = node.inputs[0]
    while source is not None and (producer := source.producer()) is not None:
        if producer.op_type not in ("Cast", "QuantizeLinear", "DequantizeLinear"):
            return False
        source = producer.inputs[0]
    return source is not None and source.is_graph_input()


def _reads_a_pixel(node: ir.Node) -> bool:
    shape = None if node.inputs[0] is None else node.inputs[0].shape
    return shape is not None and len(shape) > 2 and all(dim == 1 for dim in tuple(shape)[2:])
