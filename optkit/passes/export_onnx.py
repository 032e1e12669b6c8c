"""Exports a PyTorch model to ONNX."""

from __future__ import annotations

from typing import ClassVar, Literal

from optkit.models import OnnxModel, TorchModel
from optkit.passes.base import Kind, Pass


class ExportOnnx(Pass[TorchModel, OnnxModel]):
    """The module becomes an ONNX graph."""

    takes: ClassVar[Kind] = "torch"
    gives: ClassVar[Kind] = "onnx"

    use: Literal["export_onnx"] = "export_onnx"
    opset: int = 20
