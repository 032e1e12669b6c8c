"""Collapses chains of Transpose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from optkit.context import Context
from optkit.passes.graph_edit import RuleEdit


class CollapseTransposes(RuleEdit):
    """``Transpose(Transpose(x))`` becomes one Transpose, and none where the two undo each other."""

    use: Literal["collapse_transposes"] = "collapse_transposes"

    def rules(self, context: Context) -> Sequence[tuple[str, Any]]:
        """onnxscript's two rules."""
        from onnxscript.rewriter.rules import common as rules

        return [("Transpose", rules.no_op_transpose_rule), ("Transpose", rules.transpose_transpose_rule)]
