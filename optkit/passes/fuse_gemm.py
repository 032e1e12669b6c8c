"""Fuses a matrix product and its bias."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, ClassVar, Literal

from optkit.context import Context
from optkit.passes.graph_edit import GraphEdit, constant, rank, replace, sweep

if TYPE_CHECKING:
    import onnx_ir as ir

log = logging.getLogger("optkit.passes")


class FuseGemm(GraphEdit):
    """``Add(MatMul(a, b), c)`` with matrices ``a`` and ``b`` and a constant bias ``c`` becomes ``Gemm(a, b, c)``."""

    use: Literal["fuse_gemm"] = "fuse_gemm"
    touches: ClassVar[frozenset[str]] = frozenset({"MatMul"})

    def edit(self, model: ir.Model, context: Context) -> bool:
        """Fuse every Add that has such a MatMul before it."""
        import onnx_ir as ir

        changed = False
        for add in model.graph:
            if add.op_type != "Add" or add.domain != "":
                continue
            for product, bias in (add.inputs, add.inputs[::-1]):
                assert product is not None and bias is not None  # ONNX: Add has two inputs
                matmul = product.producer()
                if matmul is None or matmul.op_type != "MatMul" or matmul.domain != "":
                    continue
                reason = _why_not(matmul, product, bias)
                if reason is not None:
                    log.debug("fuse_gemm: %s: %s", add.name, reason)
                    continue
                gemm = ir.Node("", "Gemm", [*matmul.inputs, bias], name=matmul.name)
                replace(model, add.outputs[0], gemm)
                changed = True
                break
        if changed:
            sweep(model)
        return changed


def _why_not(matmul: ir.Node, product: ir.Value, bias: ir.Value) -> str | None:
    if rank(matmul.inputs[0]) != 2 or rank(matmul.inputs[1]) != 2:
        return "Gemm takes matrices only"
    if len(product.uses()) != 1 or product.is_graph_output():
        return "the product without its bias is needed elsewhere"
    values = constant(bias)
    if values is None:
        return "the bias is not constant"
    columns = matmul.inputs[1].shape[1] if matmul.inputs[1] and matmul.inputs[1].shape else None
    if values.shape not in ((), (1,), (columns,), (1, 1), (1, columns)):
        return f"a bias of shape {values.shape} would widen the product"
    return None
