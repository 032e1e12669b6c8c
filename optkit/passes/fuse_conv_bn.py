"""Folds BatchNormalization into the layer before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from optkit.context import Context
from optkit.passes.graph_edit import RuleEdit


class FuseConvBn(RuleEdit):
    """``BatchNormalization`` after ``Conv``, ``ConvTranspose`` or ``Gemm`` goes into its weight and bias.

    With ``k = gamma / sqrt(var + eps)`` per channel: ``w' = k w`` and ``b' = k (b - mean) + beta``.
    """

    use: Literal["fuse_conv_bn"] = "fuse_conv_bn"

    def rules(self, context: Context) -> Sequence[tuple[str, Any]]:
        """onnxscript's rules."""
        from onnxscript.rewriter.rules import common as rules

        return [
            ("BatchNormalization", rules.fuse_batchnorm_into_conv_rule),
            ("BatchNormalization", rules.fuse_batchnorm_into_conv_transpose_rule),
            ("BatchNormalization", rules.fuse_batchnorm_into_gemm_rule),
        ]
