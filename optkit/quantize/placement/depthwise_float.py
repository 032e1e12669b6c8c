"""TensorRT: a depthwise convolution whose result stays in float is computed in float."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optkit.quantize.placement.draft import Draft
from optkit.quantize.placement.graph import all_readers, attribute, constant, weight_problem
from optkit.quantize.placement.small_kernels_float import small_product

if TYPE_CHECKING:
    import onnx_ir as ir


def depthwise_float(node: ir.Node, draft: Draft) -> bool:
    """A grouped convolution stays in float unless INT8 convolutions, and nothing else, read what it writes.

    TensorRT 8.5.3 has no such kernel from INT8 to float: it computed all 16 depthwise convolutions of EfficientNet-B0,
    which squeeze and excitation follow, in FP16, and dequantized their weights at every call.
    """
    if not _is_grouped(node) or _is_quantized_again(node, draft):
        return False
    draft.keep_float(node, "a grouped convolution whose result is not quantized has no INT8 kernel")
    return True


def _is_grouped(node: ir.Node) -> bool:
    return node.op_type == "Conv" and attribute(node, "group", 1) > 1


def _is_quantized_again(node: ir.Node, draft: Draft) -> bool:
    return all_readers(node.outputs[0], lambda reader, position: position == 0 and _will_read_int8(reader, draft))


def _will_read_int8(node: ir.Node, draft: Draft) -> bool:
    """What the other rules will decide on a convolution further down."""
    if node.op_type != "Conv" or node.name in draft.kept_float or weight_problem(node) is not None:
        return False
    weight = constant(node.inputs[1])
    fits = weight is not None and small_product(node, weight) is None
    return fits and (not _is_grouped(node) or _is_quantized_again(node, draft))
