"""Fuses activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from optkit.context import Context
from optkit.passes.graph_edit import RuleEdit


class FuseActivation(RuleEdit):
    """``Relu`` and ``Clip`` in a row become one ``Clip``; ``x * Clip(x + 3, 0, 6) / 6`` becomes ``HardSwish(x)``."""

    use: Literal["fuse_activation"] = "fuse_activation"

    def rules(self, context: Context) -> Sequence[tuple[str, Any]]:
        """onnxscript's rules."""
        from onnxscript.rewriter.rules import common as rules

        hard_swish = list(rules.fuse_hardswish_rules())
        return [
            ("Relu", rules.successive_relu_rule),
            ("Clip", rules.successive_clip_relu_rule),
            ("Relu", rules.successive_relu_clip_rule),
            ("Clip", rules.successive_clip_rule),
            *((op, rule) for op in ("Clip", "HardSigmoid") for rule in hard_swish),
        ]
