"""Fixtures for every test: ONNX models from text, a context without data, one thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from optkit.context import Context
from optkit.models import OnnxModel, Signature, TensorSpec
from optkit.targets.onnxruntime import OnnxRuntimeTarget

ROOT = Path(__file__).resolve().parent.parent


def signature_of(model: ir.Model) -> Signature:
    """The signature that an ONNX model's graph declares."""

    def spec(value: ir.Value) -> TensorSpec:
        assert value.name is not None and value.shape is not None and value.dtype is not None
        dims = tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape)
        return TensorSpec(value.name, str(value.dtype.numpy()), dims)

    return Signature(tuple(map(spec, model.graph.inputs)), tuple(map(spec, model.graph.outputs)))


@pytest.fixture
def onnx_model() -> Callable[..., OnnxModel]:
    """Make a model from ONNX text: ``g (float[4] x) => (float[4] y) { y = Relu(x) }``; ``weights`` are no inputs."""

    def make(
        text: str, opset: int = 20, ir_version: int = 10, weights: Mapping[str, np.ndarray[Any, Any]] | None = None
    ) -> OnnxModel:
        header = "" if text.lstrip().startswith("<") else f'<ir_version: {ir_version}, opset_import: ["" : {opset}]> '
        model = ir.from_proto(onnx.parser.parse_model(header + text))
        for value in [value for value in model.graph.inputs if value.name in (weights or {})]:
            model.graph.inputs.remove(value)
            value.const_value = ir.tensor(weights[value.name], name=value.name)
            model.graph.register_initializer(value)
        return OnnxModel(model, signature_of(model))

    return make


@pytest.fixture
def context(tmp_path: Path) -> Context:
    """A context for ONNX Runtime, without data, on one thread."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return Context(target=OnnxRuntimeTarget(), scratch=scratch)


def assert_same_graph(actual: OnnxModel, expected: OnnxModel) -> None:
    """Compare graphs up to the names of inner values and nodes."""
    assert _canonical(actual.ir) == _canonical(expected.ir)


@pytest.fixture
def same_graph() -> Callable[[OnnxModel, OnnxModel], None]:
    """``assert_same_graph``, for tests in folders below this one."""
    return assert_same_graph


def _canonical(model: ir.Model) -> list[object]:
    names: dict[str, str] = {}

    def name(value: ir.Value | None) -> str:
        if value is None:
            return ""
        if value.is_graph_input() or value.is_graph_output():
            return str(value.name)
        if value.const_value is not None and value.producer() is None:
            return str(value.const_value.numpy().tolist())
        return names.setdefault(str(value.name), f"v{len(names)}")

    return [
        (
            node.domain,
            node.op_type,
            [name(value) for value in node.inputs],
            [name(value) for value in node.outputs],
            sorted((key, str(attr.value)) for key, attr in node.attributes.items()),
        )
        for node in model.graph
    ]
