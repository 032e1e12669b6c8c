from __future__ import annotations

from typing import Literal

import pytest

from optkit.context import Context
from optkit.errors import DataError, PassError, PostconditionError, PreconditionError
from optkit.models import OnnxModel, Signature
from optkit.passes.base import OnnxPass
from optkit.passes.build_engine import BuildEngine
from optkit.passes.export_onnx import ExportOnnx
from optkit.passes.prune_weights import PruneWeights
from optkit.pipeline import misfit, run_passes

RELU = "g (float[4] x) => (float[4] y) { y = Relu(x) }"


class Keep(OnnxPass):
    use: Literal["keep"] = "keep"

    def run(self, model: OnnxModel, context: Context) -> OnnxModel:
        return model

    def ensures(self, before: OnnxModel, after: OnnxModel, context: Context) -> None:
        raise AssertionError("nothing changed, so there is nothing to check")


class Copy(OnnxPass):
    use: Literal["copy"] = "copy"

    def run(self, model: OnnxModel, context: Context) -> OnnxModel:
        return model.clone()


class Fail(OnnxPass):
    use: Literal["fail"] = "fail"
    how: Literal["bug", "refuse", "data", "signature", "memory"]

    def requires(self, model: OnnxModel, context: Context) -> None:
        if self.how == "refuse":
            raise PreconditionError("not this one: take another")

    def run(self, model: OnnxModel, context: Context) -> OnnxModel:
        if self.how == "bug":
            raise KeyError("x")
        if self.how == "memory":
            raise MemoryError
        if self.how == "data":
            raise DataError("sample 3 is empty")
        return OnnxModel(model.ir, Signature((), ()))


def test_stages_are_what_came_in_and_what_each_pass_gave(onnx_model, context):
    model = onnx_model(RELU)
    stages = run_passes([Keep(), Copy(), Keep()], model, context)
    assert [stage.name for stage in stages] == ["checkpoint", "keep", "copy", "keep"]
    assert stages[1].model is model and stages[2].model is not model and stages[3].model is stages[2].model


def test_an_onnx_model_enters_at_the_first_pass_that_takes_one(onnx_model, context):
    assert [stage.name for stage in run_passes([ExportOnnx(), Keep()], onnx_model(RELU), context)] == [
        "checkpoint",
        "keep",
    ]
    with pytest.raises(PreconditionError, match="no pass of the recipe takes an ONNX model: export_onnx"):
        run_passes([ExportOnnx()], onnx_model(RELU), context)


def test_an_onnx_model_does_not_slip_past_a_pass_that_changes_pytorch_models(onnx_model, context):
    with pytest.raises(PreconditionError, match="prune_weights takes a PyTorch model, but the checkpoint is an ONNX"):
        run_passes([PruneWeights(), ExportOnnx(), Keep()], onnx_model(RELU), context)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("bug", PassError, r"fail: KeyError: 'x' \(passes done before it: copy\); this is a bug"),
        ("refuse", PreconditionError, r"fail: not this one: take another \(passes done before it: copy\)"),
        ("signature", PostconditionError, "fail: changed the signature"),
        ("memory", PassError, "fail: out of memory"),
        ("data", DataError, "^sample 3 is empty$"),
    ],
)
def test_errors_keep_their_kind_and_name_the_pass(onnx_model, context, how, error, message):
    with pytest.raises(error, match=message) as caught:
        run_passes([Copy(), Fail(how=how)], onnx_model(RELU), context)
    assert type(caught.value) is error


def test_misfit_names_the_neighbours():
    assert misfit([ExportOnnx(), Keep(), BuildEngine()]) is None
    assert misfit([Keep(), ExportOnnx()]) == "export_onnx takes a PyTorch model, but keep before it gives an ONNX model"
