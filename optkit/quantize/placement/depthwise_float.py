"""TensorRT: a depthwise convolution whose result stays in float is computed in float."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optkit.quantize.placement.draft import Draft
from optkit.quantize.placement.graph import attribute, behind_activation

if TYPE_CHECKING:
    import onnx_ir as ir


def depthwise_float(node: ir.Node, draft: Draft) -> bool:
    """A grouped convolution stays in float unless convolutions, and nothing else, read it behind its activation.

    Only then is its result quantized, and TensorRT 8.5.3 has no such kernel from INT8 to float: it computed all 16
    depthwise convolutions of EfficientNet-B0, which squeeze and excitation follow, in FP16, and dequantized their
    weights at every call.
    """
    if node.op_type != "Conv" or attribute(node, "group", 1) == 1:
        return False
    written = behind_activation(node.outputs[0])
    if {use.node.op_type for use in written.uses()} == {"Conv"} and not written.is_graph_output():
        return False
    draft.keep_float(node, "a grouped convolution whose result is not quantized has no INT8 kernel")
    return True
