"""Collapses chains of Reshape, Squeeze, Unsqueeze and Flatten."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from optkit.context import Context
from optkit.passes.graph_edit import RuleEdit


class CollapseReshapes(RuleEdit):
    """``Reshape(Reshape(x))`` becomes one Reshape, and so do Flatten and chains of Unsqueeze."""

    use: Literal["collapse_reshapes"] = "collapse_reshapes"
    touches: ClassVar[frozenset[str]] = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten"})

    def rules(self, context: Context) -> Sequence[Any]:
        """onnxscript's rules."""
        from onnxscript.rewriter.rules import common as rules

        return [
            rules.squeeze_reshape_1d_rule,
            rules.unsqueeze_unsqueeze_rule,
            rules.reshape_reshape_rule,
            rules.flatten_to_reshape_rule,
            rules.one_reshape_matmul_reshape_rule,
            rules.two_reshapes_matmul_reshape_rule,
        ]
