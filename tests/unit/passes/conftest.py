"""What every rewrite must keep: the expected graph, the input untouched, nothing to do the second time, the numbers."""

from __future__ import annotations

from collections.abc import Callable

import onnx
import onnx_ir as ir
import pytest

from optkit.context import Context
from optkit.models import OnnxModel
from optkit.passes.base import OnnxPass


@pytest.fixture
def rewrites(
    onnx_model: Callable[..., OnnxModel], context: Context, same_graph: Callable[[OnnxModel, OnnxModel], None]
) -> Callable[..., OnnxModel]:
    """Check a pass on ONNX text; the rewritten model."""

    def check(step: OnnxPass, before: str, expected: str, opset: int = 20) -> OnnxModel:
        model = onnx_model(before, opset)
        text = ir.to_proto(model.ir).SerializeToString()
        step.requires(model, context)
        after = step.run(model, context)
        same_graph(after, onnx_model(expected, opset))
        assert ir.to_proto(model.ir).SerializeToString() == text
        assert step.run(after, context) is after
        onnx.checker.check_model(ir.to_proto(after.ir), full_check=True)
        step.ensures(model, after, context)
        return after

    return check


@pytest.fixture
def leaves(onnx_model: Callable[..., OnnxModel], context: Context) -> Callable[..., None]:
    """Check that a pass returns the very model that it was given."""

    def check(step: OnnxPass, text: str, opset: int = 20, context: Context = context) -> None:
        model = onnx_model(text, opset)
        assert step.run(model, context) is model

    return check
