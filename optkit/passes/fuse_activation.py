"""Fuses activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from optkit.context import Context
from optkit.passes.graph_edit import RuleEdit


class FuseActivation(RuleEdit):
    """``Relu`` and ``Clip`` in a row become one ``Clip``; ``x * Clip(x + 3, 0, 6) / 6`` becomes ``HardSwish(x)``."""

    use: Literal["fuse_activation"] = "fuse_activation"
    touches: ClassVar[frozenset[str]] = frozenset({"Relu", "Clip", "HardSigmoid"})

    def rules(self, context: Context) -> Sequence[Any]:
        """onnxscript's rules."""
        from onnxscript.rewriter.rules import common as rules

        return [
            rules.successive_relu_rule,
            rules.successive_clip_relu_rule,
            rules.successive_relu_clip_rule,
            rules.successive_clip_rule,
            *rules.fuse_hardswish_rules(),
        ]
