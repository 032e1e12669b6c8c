"""Collapses chains of Reshape, Squeeze, Unsqueeze and Flatten."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from optkit.context import Context
from optkit.passes.graph_edit import RuleEdit


class CollapseReshapes(RuleEdit):
    """``Reshape(Reshape(x))`` becomes one Reshape, and so do Flatten and chains of Unsqueeze."""

    use: Literal["collapse_reshapes"] = "collapse_reshapes"

    def rules(self, context: Context) -> Sequence[tuple[str, Any]]:
        """onnxscript's rules."""
        from onnxscript.rewriter.rules import common as rules

        return [
            ("Reshape", rules.squeeze_reshape_1d_rule),
            ("Unsqueeze", rules.unsqueeze_unsqueeze_rule),
            ("Reshape", rules.reshape_reshape_rule),
            ("Flatten", rules.flatten_to_reshape_rule),
            ("Reshape", rules.one_reshape_matmul_reshape_rule),
            ("Reshape", rules.two_reshapes_matmul_reshape_rule),
        ]
