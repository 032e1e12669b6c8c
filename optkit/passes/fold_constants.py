"""Computes at compile time what does not depend on the inputs."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Literal

from optkit.context import Context
from optkit.passes.graph_edit import GraphEdit, sweep

if TYPE_CHECKING:
    import onnx_ir as ir

# It warns of each node that it cannot evaluate, which only means that the node stays
logging.getLogger("onnxscript.optimizer._constant_folding").setLevel(logging.ERROR)

SMALL = 512 * 512
"""Elements: a folded tensor of this size never hurts."""


class FoldConstants(GraphEdit):
    """A node whose inputs are all constant becomes an initializer; functions are inlined; shapes are inferred.

    QuantizeLinear and DequantizeLinear stay (they are the quantization), and so does what would grow the model: no
    folded tensor is larger than the largest weight.
    """

    use: Literal["fold_constants"] = "fold_constants"

    def edit(self, model: ir.Model, context: Context) -> bool:
        """Inline, fold, lift, sweep."""
        from onnx_ir.passes import common
        from onnxscript import optimizer

        inlined = bool(model.functions) and bool(common.InlinePass()(model).modified)
        weights = [value.const_value.size for value in model.graph.initializers.values() if value.const_value]
        limit = max([SMALL, *weights])
        folded = optimizer.fold_constants_ir(
            model, onnx_shape_inference=True, input_size_limit=limit, output_size_limit=limit
        )
        lifted = common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        common.LiftSubgraphInitializersToMainGraphPass()(model)
        unused = common.RemoveUnusedNodesPass()(model)
        sweep(model)
        return any((inlined, folded.modified, lifted.modified, unused.modified))
