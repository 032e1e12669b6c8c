import inspect
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

from optkit.context import Context
from optkit.data import Batch
from optkit.errors import PostconditionError, PreconditionError
from optkit.models import DimRange, OnnxModel, Signature, TensorSpec, TorchModel
from optkit.passes.export_onnx import ExportOnnx
from optkit.passes.optimize_graph import OptimizeGraph
from optkit.targets.onnxruntime import open_onnx
from optkit.targets.pytorch import open_torch

ROWS = Signature((TensorSpec("x", "float32", ("batch", 6)),), (TensorSpec("y", "float32", ("batch", 6)),))


class Affine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


class Branch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return x + 1
        return x - 1


class NoOnnxForm(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x)


class FixedBatch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.shape[0] == 2 else x


class Raises(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("a message of the model's own")


class OnlyTracing(nn.Module):
    """torch.export exports it to an operator without ONNX form; tracing takes what NumPy gave for a constant."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.from_numpy(np.sort(x.detach().numpy()))


class Halves(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = x.split(3, dim=1)
        return torch.cat([right, left], 1)


class TwoStates(nn.Module):
    def forward(self, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"first": x + 2 * h, "second": x - c}


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, activation="gelu", batch_first=True)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.layer(self.embed(tokens), src_key_padding_mask=mask == 0)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def export(context: Context) -> Callable[..., OnnxModel]:
    def run(module: nn.Module, signature: Signature = ROWS, **options: Any) -> OnnxModel:
        step, model = ExportOnnx(**options), TorchModel(module.eval(), signature)
        step.requires(model, context)
        after = step.run(model, context)
        step.ensures(model, after, context)
        return after

    return run


def line_of(cls: type, text: str) -> str:
    lines, start = inspect.getsourcelines(cls)
    return f"{Path(__file__)}:{start + next(i for i, line in enumerate(lines) if text in line)}"


def test_names_dimensions_and_weights_arrive(export: Any, capfd: Any, caplog: Any) -> None:
    module = Affine()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with caplog.at_level(logging.INFO, "optkit"):
        model = export(module)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert model.signature == ROWS
    assert [(value.name, tuple(map(str, value.shape))) for value in model.ir.graph.inputs] == [("x", ("batch", "6"))]
    assert [(value.name, tuple(map(str, value.shape))) for value in model.ir.graph.outputs] == [("y", ("batch", "6"))]
    assert model.ir.graph.opset_imports[""] == 20
    onnx.checker.check_model(ir.to_proto(model.ir), full_check=True)
    assert not module.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_split_tensor_exports_without_a_word(export: Any, capfd: Any, caplog: Any) -> None:
    model = export(Halves())
    assert "SplitToSequence" in [node.op_type for node in model.ir.graph]
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


@pytest.mark.parametrize("name", ["linear", "linear.weight", "val_0"])
def test_an_output_may_be_named_like_an_inner_value(export: Any, name: str) -> None:
    class Inner(Affine):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).softmax(-1) @ self.linear.weight

    model = export(Inner(), replace(ROWS, outputs=(TensorSpec(name, "float32", ("batch", 6)),)))
    names = [value.name for node in model.ir.graph for value in node.outputs] + list(model.ir.graph.initializers)
    assert names.count(name) == 1
    onnx.checker.check_model(ir.to_proto(model.ir), full_check=True)


def test_inputs_of_one_shape_are_not_wired_together(export: Any) -> None:
    shape = ("batch", 4)
    names = ("x", "h", "c"), ("first", "second")
    signature = Signature(*(tuple(TensorSpec(name, "float32", shape) for name in group) for group in names))
    model = export(TwoStates(), signature, opset=18)
    assert model.ir.graph.opset_imports[""] == 18
    feeds = {name: np.full((3, 4), value, np.float32) for name, value in zip("xhc", (1, 10, 100), strict=True)}
    with open_onnx(model) as runner:
        found = runner.run(feeds)
    assert (found["first"][0, 0], found["second"][0, 0]) == (21, -99)


def test_an_encoder_with_two_dynamic_dimensions_exports_and_optimizes(export: Any, context: Context) -> None:
    tokens = tuple(TensorSpec(name, "int64", ("batch", "seq")) for name in ("tokens", "mask"))
    signature = Signature(tokens, (TensorSpec("hidden", "float32", ("batch", "seq", 16)),), {"seq": DimRange(1, 8, 16)})
    module = Encoder()
    model = export(module, signature)
    step = OptimizeGraph()
    after = step.run(model, context)
    step.ensures(model, after, context)
    ops = [node.op_type for node in after.ir.graph]
    assert ops.count("LayerNormalization") == 2
    assert ops.count("Gelu") == 1
    assert len(ops) < model.ir.graph.num_nodes() / 2
    feeds = signature.random_feeds(np.random.default_rng(1), batch=5, seq=11)
    with open_torch(TorchModel(module, signature)) as pytorch, open_onnx(after) as runner:
        np.testing.assert_allclose(runner.run(feeds)["hidden"], pytorch.run(feeds)["hidden"], atol=1e-5)


def test_torchscript_is_traced_at_once(export: Any, caplog: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # PyTorch deprecates TorchScript; checkpoints of it remain
        traced = torch.jit.trace(Affine().eval(), torch.ones(2, 6))
    model = export(traced)
    assert [node.op_type for node in model.ir.graph] == ["Gemm"]
    assert not caplog.records


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Branch, "the control flow of the model depends on the values of a tensor ({}): use torch.where or torch.cond"),
        (NoOnnxForm, "the operator prims.bessel_j0 has no ONNX form ({}): replace it in the model's forward"),
        (FixedBatch, "the model fixes axis 0 of 'x' to 2: declare that dimension as 2"),
        (Raises, "the model cannot be exported ({}): ValueError: a message of the model's own"),
    ],
)
def test_what_cannot_be_exported_is_named_with_its_line(
    export: Any, capfd: Any, module: type[nn.Module], message: str
) -> None:
    lines = {Branch: "if x.sum()", NoOnnxForm: "bessel", FixedBatch: "shape[0]", Raises: "raise"}
    with pytest.raises(PreconditionError) as caught:
        export(module())
    assert str(caught.value).startswith(message.format(line_of(module, lines[module])))
    assert capfd.readouterr() == ("", "")


def test_tracing_is_announced_and_its_constants_are_caught(context: Context, caplog: Any) -> None:
    step, model = ExportOnnx(), TorchModel(OnlyTracing(), ROWS)
    after = step.run(model, context)
    assert "torch.export could not export the model, TorchScript tracing did" in caplog.text
    assert line_of(OnlyTracing, "np.sort") in caplog.text
    with pytest.raises(PostconditionError, match=r"with batch=1"):
        step.ensures(model, after, context)


def test_a_difference_from_pytorch_is_an_error(onnx_model: Any, context: Context) -> None:
    model = TorchModel(Affine().eval(), ROWS)
    wrong = onnx_model("g (float[batch,6] x) => (float[batch,6] y) { y = Relu(x) }")
    with pytest.raises(PostconditionError, match=r"differs from PyTorch on random inputs with batch=1, .* output 'y'"):
        ExportOnnx().ensures(model, wrong, context)


class Data:
    def batches(self, split: str, size: int, limit: int | None = None) -> Iterator[Batch]:
        assert split == "calibration"
        yield Batch({"x": np.full((size, 6), -1.0, np.float32)}, None)


class Root(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sqrt(x)


def test_nan_on_real_data_is_named(context: Context, caplog: Any) -> None:
    step, model = ExportOnnx(), TorchModel(Root(), ROWS)
    after = step.run(model, context)
    step.ensures(model, after, context)
    assert "PyTorch itself gives" in caplog.text  # random inputs may make no sense: a warning
    with pytest.raises(PreconditionError, match="PyTorch itself gives 24 NaN in the output 'y' on real data"):
        step.ensures(model, after, replace(context, data=Data()))  # type: ignore[arg-type]  # batches is all it needs


def test_weights_that_are_not_finite_are_named(export: Any) -> None:
    module = Affine()
    with torch.no_grad():
        module.linear.bias[2] = torch.nan
    with pytest.raises(PreconditionError, match=r"the weight 'linear.bias' holds NaN or infinity"):
        export(module)


def test_an_opset_that_the_target_does_not_read_is_refused(export: Any, context: Context, monkeypatch: Any) -> None:
    from optkit.targets.base import Dialect
    from optkit.targets.onnxruntime import OnnxRuntimeTarget

    monkeypatch.setattr(OnnxRuntimeTarget, "dialect", property(lambda self: Dialect(int8=None, opsets=(13, 17))))
    with pytest.raises(PreconditionError, match="reads opsets 13 to 17, not 20: set `opset`"):
        export(Affine())
