"""Trains what quantize_int8 wrote, through its rounding: accuracy that INT8 lost comes back, and the graph stays."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from optkit.context import Context
from optkit.errors import PreconditionError
from optkit.functions import absolute
from optkit.models import OnnxModel, TorchModel
from optkit.passes.base import OnnxPass
from optkit.passes.quantize_int8 import QuantizeInt8
from optkit.quantize.linter import INTEGER_OPS
from optkit.training import Objective, Training, load_hooks, train
from optkit.tunable import Tunable

if TYPE_CHECKING:
    import torch

    from optkit.training.graph_module import GraphModule

log = logging.getLogger("optkit.training")


class FineTuning(Training):
    """How a quantized model is trained: gently, and in full precision."""

    epochs: int = Field(default=3, ge=1)
    learning_rate: Annotated[float, Field(gt=0), Tunable(low=1e-3, high=1.0, log=True)] = 2e-2
    """At its highest, after the warm-up. In INT8 steps: with ``adamw`` a weight moves by up to so many at a time."""
    weight_decay: Annotated[float, Field(ge=0), Tunable(low=1e-6, high=1e-2, log=True)] = 0.0
    """Not of biases, norms and scales."""
    amp: bool = False
    """Mixed precision on a GPU. bfloat16 is as coarse as INT8, so products in it hide what INT8 does."""


class FinetuneInt8(OnnxPass):
    """INT8 weights and INT32 biases learn as floats that are rounded on the way forward, and are stored rounded.

    Placement and scales are those of ``quantize_int8``, since it is its graph that is trained. The teacher is the float
    model that came into the pipeline. If no epoch beats what came in, on held-out training samples, that is what is
    given back.
    """

    use: Literal["finetune_int8"] = "finetune_int8"
    ranges: Annotated[Literal["frozen", "learned"], Tunable()] = "frozen"
    """``learned``: the scales of activations and weights are trained too (LSQ); zero points stay."""
    loss: Objective = Field(default=Objective())
    """What the quantized model learns."""
    train: FineTuning = Field(default=FineTuning())
    """How it learns."""
    hooks: str | None = None
    """``path.py:Class`` or ``module:Class``, derived from ``optkit.Hooks``; a path is relative to the recipe."""

    def relative_to(self, folder: Path) -> FinetuneInt8:
        """The same pass with the path of its hooks resolved."""
        return self.model_copy(update={"hooks": absolute(self.hooks, folder) if self.hooks else None})

    def requires(self, model: OnnxModel, context: Context) -> None:
        """A model that quantize_int8 wrote with static ranges, for this target, and training data."""
        if context.data is None:
            raise PreconditionError("finetune_int8 needs training data: add a `data:` section to the recipe")
        if context.target.dialect.int8 is None:
            raise PreconditionError(
                f"the target {context.target.name!r} has no INT8: choose another target, or drop finetune_int8"
            )
        if "quantization" not in model.records:
            raise PreconditionError(
                "the model is not one that quantize_int8 wrote: put quantize_int8 before finetune_int8"
            )
        dynamic = next((node for node in model.ir.graph.all_nodes() if node.op_type in INTEGER_OPS), None)
        if dynamic is not None:
            raise PreconditionError(
                f"node {dynamic.name!r} ({dynamic.op_type}) finds its ranges at each call, so there are none to train "
                "with: set `activations: static` in quantize_int8, or drop finetune_int8"
            )

    def run(self, model: OnnxModel, context: Context) -> OnnxModel:
        """The model with trained weights, or the one that came in if that is as good.

        Raises:
            PreconditionError: a node cannot be trained; the message names it.
        """
        from optkit.training.graph_module import GraphModule

        policy = model.records["quantization"]["policy"]
        module = GraphModule(model, learned=self.ranges == "learned", sums_in_16_bits=policy["sums_in_16_bits"])
        student = TorchModel(module, model.signature, _sparsity(model, module))
        trained = train(
            student,
            self.train,
            context,
            objective=self.loss,
            teacher=self._teacher(context),
            hooks=load_hooks(self.hooks, context),
            name=self.use,
            start_counts=True,
        )
        record = trained.records[self.use]
        if record["best_epoch"] == 0:
            log.warning(
                "finetune_int8: no epoch was better than what came in (%s %.2f): the model stays as it was",
                record["metric"],
                100 * record["score_before"],
            )
            return model
        arrays = _graph_module(trained.module).arrays()
        return _written(model, arrays).with_record(self.use, {"ranges": self.ranges, **record})

    def ensures(self, before: OnnxModel, after: OnnxModel, context: Context) -> None:
        """What ``quantize_int8`` promises still holds."""
        QuantizeInt8().ensures(before, after, context)

    def _teacher(self, context: Context) -> TorchModel | None:
        from optkit.training.graph_module import GraphModule

        if context.original is not None or context.original_onnx is None or not self.loss.outputs:
            return context.original
        return TorchModel(GraphModule(context.original_onnx), context.original_onnx.signature)


def _sparsity(model: OnnxModel, module: GraphModule) -> dict[str, Any]:
    """The record by which the zeros of a pruned model stay zero; it names parameters, and these have new names."""
    if "sparsity" not in model.records:
        return {}
    weights = {name: weight for name, weight in module.named_parameters() if weight.ndim > 1}
    density = {name: float((weight != 0).float().mean()) for name, weight in weights.items()}
    return {"sparsity": {**model.records["sparsity"], "parameters": density}}


def _graph_module(trained: torch.nn.Module) -> GraphModule:
    """The student, also within what hooks put around it."""
    from optkit.training.graph_module import GraphModule

    found = next((part for part in trained.modules() if isinstance(part, GraphModule)), None)
    if found is None:
        raise PreconditionError(
            "the hooks' student does not hold the module that it was made of, so nothing can be written back into the "
            "graph: wrap the module, or drop the student hook"
        )
    return found


def _written(model: OnnxModel, arrays: dict[str, Any]) -> OnnxModel:
    import onnx_ir as ir

    after = model.clone()
    for name, array in arrays.items():
        after.ir.graph.initializers[name].const_value = ir.tensor(array, name=name)
    return after
