"""TensorRT: what is concatenated shares one scale."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optkit.quantize.placement.draft import Draft

if TYPE_CHECKING:
    import onnx_ir as ir


def concat_one_scale(node: ir.Node, draft: Draft) -> bool:
    """``Concat``: what is quantized of its inputs and output shares one scale, so that it is a copy."""
    if node.op_type != "Concat":
        return False
    names = [value.name for value in (*node.inputs, *node.outputs) if value is not None and value.name]
    draft.one_scale.append(frozenset(names))
    return True
