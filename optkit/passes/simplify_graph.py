"""Removes arithmetic, casts, slices and expansions that do nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from optkit.context import Context
from optkit.passes.graph_edit import RuleEdit, rank, scalar

if TYPE_CHECKING:
    import onnx_ir as ir


class SimplifyGraph(RuleEdit):
    """onnxscript's rules: ``x * 1`` and ``Cast`` to the same type vanish, ``Min(Max(x, a), b)`` becomes ``Clip``,
    ``Pad`` goes into ``Conv``, slices of slices become one, a zero bias is left out.
    """

    use: Literal["simplify_graph"] = "simplify_graph"

    def rules(self, context: Context) -> Sequence[tuple[str, Any]]:
        """The rules of general use; fusions have passes of their own."""
        from onnxscript.rewriter.rules import common as rules

        return [
            *(("Mul", rule) for rule in _neutral("Mul", 1.0).commute()),
            *(("Add", rule) for rule in _neutral("Add", 0.0).commute()),
            ("Sub", _neutral("Sub", 0.0)),
            ("Div", _neutral("Div", 1.0)),
            ("Dropout", rules.dropout_zero_rule),
            ("Dropout", rules.dropout_inference_rule),
            ("Cast", rules.no_op_cast_rule),
            ("Cast", rules.cast_cast_rule),
            ("Cast", rules.cast_constant_of_shape_rule),
            ("Cast", rules.cast_constant_of_shape_without_value_rule),
            ("Expand", rules.no_op_expand_rule),
            ("Slice", rules.collapse_slice_rule),
            ("Slice", rules.collapse_slice2_rule),
            ("Slice", rules.slice_split_rule),
            ("Min", rules.min_min_rule),
            ("Max", rules.max_max_rule),
            ("Max", rules.min_max_rule),
            ("Min", rules.max_min_rule),
            ("ScatterND", rules.no_op_dynamic_scatter_nd_rule),
            ("ScatterND", rules.no_op_static_scatter_nd_rule),
            ("Conv", rules.normalize_pad_format_conv_rule),
            ("Conv", rules.fuse_pad_into_conv_rule),
            ("Conv", rules.remove_optional_bias_from_conv_rule),
            ("ConvTranspose", rules.remove_optional_bias_from_conv_transpose_rule),
            ("Gemm", rules.remove_optional_bias_from_gemm_rule),
        ]


def _neutral(op_type: str, number: float) -> Any:
    """``op_type(x, number)`` becomes ``x``. onnxscript's own rule takes the 1e-12 of a normalization for zero."""
    from onnxscript.rewriter import RewriteRule

    def pattern(op: Any, x: Any, c: Any) -> Any:
        return getattr(op, op_type)(x, c)

    def check(context: Any, x: ir.Value, c: ir.Value) -> bool:
        known = rank(x)
        return scalar(c) == number and (rank(c) == 0 or (known is not None and (rank(c) or 0) <= known))

    def rewrite(op: Any, x: Any, c: Any) -> Any:
        return op.Identity(x)

    return RewriteRule(pattern, rewrite, check)
