"""Casts a graph to BF16."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from optkit.context import Context
from optkit.errors import PreconditionError
from optkit.models import OnnxModel
from optkit.passes.float_cast import FloatCast, Ports
from optkit.passes.graph_edit import opset

HEAVY = ("Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU")
FULL_OPSET = 22
"""The first opset in which convolutions, pooling and recurrent layers take BF16."""


class CastBf16(FloatCast):
    """Float32 becomes BF16 inside the graph; inputs and outputs stay float32.

    BF16 has the range of float32 and 8 bits of precision: nothing overflows, sums lose digits, so ``keep_ops`` stay.
    """

    to: ClassVar[Literal["float16", "bfloat16"]] = "bfloat16"

    use: Literal["cast_bf16"] = "cast_bf16"
    min_sqnr: float = Field(default=20.0, ge=0)
    """The least signal to noise ratio against float32 that is accepted on each output, in dB."""

    def requires(self, model: OnnxModel, context: Context) -> None:
        """Refuse a target without BF16 kernels, and an opset in which the model's layers do not take BF16."""
        super().requires(model, context)
        if "bfloat16" not in context.target.dialect.floats:
            raise PreconditionError(
                f"the target {context.target.name!r} has no BF16 kernels: use cast_fp16 (a smaller model) or float32 "
                "there, or a TensorRT target"
            )
        version = opset(model.ir)
        for node in model.ir.graph:
            ports = Ports.of(node, version, self.to)
            if node.op_type in HEAVY and ports.floats and not ports.inputs:
                raise PreconditionError(
                    f"{node.op_type} takes no BF16 at opset {version}: export with `opset: {FULL_OPSET}` or later"
                )
