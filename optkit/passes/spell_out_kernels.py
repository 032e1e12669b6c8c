"""Writes the kernel's shape on every convolution."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from optkit.context import Context
from optkit.passes.graph_edit import GraphEdit

if TYPE_CHECKING:
    import onnx_ir as ir


class SpellOutKernels(GraphEdit):
    """``Conv`` and ``ConvTranspose`` get ``kernel_shape`` where it is left to the weight's shape.

    ONNX lets it be inferred; TensorRT 8 cannot do so for a weight behind a DequantizeLinear.
    """

    use: Literal["spell_out_kernels"] = "spell_out_kernels"
    touches: ClassVar[frozenset[str]] = frozenset({"Conv", "ConvTranspose"})

    def edit(self, model: ir.Model, context: Context) -> bool:
        """Write the attribute where it is missing and the weight's shape is known."""
        import onnx_ir as ir

        changed = False
        for node in model.graph:
            if node.op_type not in self.touches or "kernel_shape" in node.attributes:
                continue
            kernel = _kernel(node.inputs[1])
            if kernel is not None:
                node.attributes["kernel_shape"] = ir.AttrInt64s("kernel_shape", kernel)
                changed = True
        return changed


def _kernel(weight: ir.Value | None) -> tuple[int, ...] | None:
    """The spatial dimensions of a weight, looked up through what keeps its shape."""
    while weight is not None and weight.shape is None:
        producer = weight.producer()
        weight = producer.inputs[0] if producer is not None else None
    if weight is None or weight.shape is None:
        return None
    dims = tuple(weight.shape)[2:]
    sizes = tuple(dim for dim in dims if isinstance(dim, int))
    return sizes if len(sizes) == len(dims) else None
