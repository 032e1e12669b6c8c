"""Computes once what is computed twice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from optkit.context import Context
from optkit.passes.graph_edit import GraphEdit

if TYPE_CHECKING:
    import onnx_ir as ir


class MergeNodes(GraphEdit):
    """Nodes of the same op, inputs and attributes become one; random ops stay."""

    use: Literal["merge_nodes"] = "merge_nodes"

    def edit(self, model: ir.Model, context: Context) -> bool:
        """Common subexpression elimination, by onnx_ir."""
        from onnx_ir.passes import common

        return bool(common.CommonSubexpressionEliminationPass()(model).modified)
