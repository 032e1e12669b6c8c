"""ONNX Runtime: what averages INT8 or bends it, and has a kernel for it, writes INT8."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optkit.quantize.placement.draft import Draft

if TYPE_CHECKING:
    import onnx_ir as ir

_OPS = frozenset({"AveragePool", "Concat", "GlobalAveragePool", "LeakyRelu"})


def pool_in_out(node: ir.Node, draft: Draft) -> bool:
    """Pools that average, ``Concat`` and ``LeakyRelu`` of INT8 write INT8, each with a scale of its own."""
    if node.op_type not in _OPS or not all(draft.is_int8(value) for value in node.inputs):
        return False
    draft.quantize_output(node.outputs[0])
    return True
