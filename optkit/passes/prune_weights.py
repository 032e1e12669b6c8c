"""Sets weights of a PyTorch model to zero, singly or two of any four."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from optkit.context import Context
from optkit.errors import PostconditionError, PreconditionError
from optkit.models import TorchModel
from optkit.passes.base import TorchPass
from optkit.pruning.batch_norm import recalibrate
from optkit.pruning.layers import calls_of, is_weighted, layer_of, named_by, owns_weight, refuse_program, tied_layers
from optkit.pruning.ranking import Scope
from optkit.pruning.samples import calibration_batches, examples
from optkit.pruning.second_order import costs, inverse_factor, most_worth, prune_rows
from optkit.pruning.sparsity import is_two_of_four
from optkit.pruning.unrolled import can_unroll, hessian, rows_of, weight_of
from optkit.tunable import Tunable

if TYPE_CHECKING:
    import torch

    Batches = Sequence[tuple[torch.Tensor, ...]]

log = logging.getLogger("optkit.passes")

_TWO_OF_FOUR_PAYS = 256
"""Channels in and out below which NVIDIA's sparse kernels seldom beat the dense ones."""


class PruneWeights(TorchPass):
    """The weights that matter least become zero and stay so through distillation and INT8.

    ``2:4`` leaves at most two of any four neighbours along the input channels, which is the pattern of NVIDIA's sparse
    tensor cores. Nothing else runs faster for it: the report says where zeros take as long as any other number.
    """

    use: Literal["prune_weights"] = "prune_weights"
    pattern: Literal["2:4", "unstructured"] = "2:4"
    """Which weights may be zero."""
    sparsity: Annotated[float, Tunable(low=0.3, high=0.9)] = Field(default=0.5, gt=0, lt=1)
    """The fraction of the weights that becomes zero; 0.5 for ``2:4``."""
    method: Annotated[Literal["second_order", "magnitude"], Tunable()] = "second_order"
    """``second_order`` lets the weights that stay make up for those that go, layer by layer on calibration samples,
    with no training; ``magnitude`` drops the smallest and needs no data."""
    scope: Annotated[Scope, Tunable()] = "global"
    """Whether the weights of all layers are ranked together, or every layer gets the same sparsity, as it always does
    with ``2:4``."""
    skip: tuple[str, ...] = ()
    """Names of layers or of modules around them, or patterns such as ``body.0.*``, that stay dense."""
    samples: int = Field(default=256, ge=1)
    """How many calibration samples ``second_order`` looks at, and batch normalization takes its statistics from."""

    @model_validator(mode="after")
    def _fits_the_pattern(self) -> PruneWeights:
        if self.pattern == "2:4" and self.sparsity != 0.5:
            raise ValueError("2:4 is a sparsity of 0.5: drop `sparsity`, or set `pattern: unstructured`")
        return self

    def requires(self, model: TorchModel, context: Context) -> None:
        """Data for the second order, and layers in Python."""
        refuse_program(model.module)
        if self.method == "second_order" and context.data is None:
            raise PreconditionError(
                "method second_order needs data: add `data:` to the recipe, or set `method: magnitude`"
            )

    def run(self, model: TorchModel, context: Context) -> TorchModel:
        """The model with zeros, and the names of the parameters that have them."""
        module = copy.deepcopy(model.module)
        calls = calls_of(module, examples(model.signature))
        layers, dense = self._layers(module, calls)
        if not layers:
            raise PreconditionError(f"there is no weight to prune: {_listed(dense) or 'the model has no such layer'}")
        if "sparsity" in model.records and all(self._is_done(layer_of(module, name)) for name in layers):
            return model
        batches = calibration_batches(model.signature, context, self.samples)
        seen = batches if self.method == "second_order" else []
        densities = self._densities(module, layers, calls, seen)
        for name in context.progress(layers, "pruning weights", len(layers)):
            layer = layer_of(module, name)
            rows = rows_of(layer.weight.detach())
            if seen:
                pruned = prune_rows(rows, inverse_factor(hessian(module, name, seen, calls[name])), densities[name])
            else:
                pruned = rows * most_worth(rows.abs(), densities[name])
            layer.weight.data.copy_(weight_of(layer, pruned))
        recalibrate(module, batches)
        self._say_what_it_brings(module, layers, context)
        record = {
            "pattern": self.pattern,
            "method": self.method,
            "parameters": {f"{name}.weight": _density(layer_of(module, name)) for name in layers},
            "dense": dense,
        }
        return replace(model, module=module, records={**model.records, "sparsity": record})

    def _layers(self, module: torch.nn.Module, calls: Mapping[str, int]) -> tuple[list[str], dict[str, str]]:
        """The layers to prune in the order of their first calls, and why the others stay dense."""
        weighted = [name for name, part in module.named_modules() if is_weighted(part)]
        skipped = named_by(self.skip, weighted)
        tied = tied_layers(module)
        dense = {name: "forward does not call it" for name in weighted if name not in calls}
        for name in [name for name in calls if name in weighted]:
            layer = layer_of(module, name)
            if name in skipped:
                dense[name] = "`skip` names it"
            elif name in tied:
                dense[name] = f"it has its weight in common with {tied[name]}"
            elif not owns_weight(layer):
                dense[name] = "its weight is computed from others"
            elif not can_unroll(layer):
                dense[name] = "it is a grouped, transposed or three-dimensional convolution"
            elif self.pattern == "2:4" and layer.weight.shape[1] % 4:
                dense[name] = f"its {layer.weight.shape[1]} input channels make no groups of four"
        return [name for name in calls if name in weighted and name not in dense], dense

    def _is_done(self, layer: Any) -> bool:
        weight = layer.weight.detach().numpy()
        return is_two_of_four(weight) if self.pattern == "2:4" else (weight == 0).mean() >= self.sparsity

    def _densities(
        self, module: torch.nn.Module, layers: Sequence[str], calls: Mapping[str, int], batches: Batches
    ) -> dict[str, float | None]:
        """The share of weights that each layer keeps; None for 2:4."""
        import torch

        if self.pattern == "2:4":
            return dict.fromkeys(layers)
        if self.scope == "layer":
            return dict.fromkeys(layers, 1 - self.sparsity)
        worth = {}
        for name in layers:
            layer = layer_of(module, name)
            rows = rows_of(layer.weight.detach())
            if not batches:
                worth[name] = rows.abs().double()
                continue
            seen = hessian(module, name, batches, calls[name])
            energy = ((rows.double() @ seen) * rows).sum()
            worth[name] = costs(rows, inverse_factor(seen)) / energy.clamp_min(1e-30)
        keep = most_worth(torch.cat([one.flatten() for one in worth.values()])[None], 1 - self.sparsity)[0]
        parts = torch.split(keep, [one.numel() for one in worth.values()])
        return {name: float(part.double().mean()) for name, part in zip(worth, parts, strict=True)}

    def _say_what_it_brings(self, module: torch.nn.Module, layers: Sequence[str], context: Context) -> None:
        target, sparse = context.target.name, context.target.dialect.sparse
        if sparse is None:
            log.warning(
                "prune_weights: %s has dense kernels only: zeros make files smaller, and nothing faster", target
            )
        elif self.pattern == "unstructured":
            log.warning("prune_weights: sparse kernels of %s take 2:4 only: nothing gets faster", target)
        elif not sparse:
            log.warning("prune_weights: %s uses its sparse kernels only where `sparsity: true` asks for them", target)
        else:
            wide = [name for name in layers if min(layer_of(module, name).weight.shape[:2]) > _TWO_OF_FOUR_PAYS]
            log.warning(
                "prune_weights: %d of %d sparse layers have more than %d channels in and out; below that, and on GPUs "
                "before Ampere, sparse kernels seldom win. Whether TensorRT takes one, it decides by timing",
                len(wide),
                len(layers),
                _TWO_OF_FOUR_PAYS,
            )

    def ensures(self, before: TorchModel, after: TorchModel, context: Context) -> None:
        """Every parameter that is said to be sparse is so."""
        weights = dict(after.module.named_parameters())
        for name in after.records["sparsity"]["parameters"]:
            weight = weights[name].detach().numpy()
            if self.pattern == "2:4" and not is_two_of_four(weight):
                raise PostconditionError(f"{name} is not 2:4 along its input channels after pruning")


def _density(layer: Any) -> float:
    return round(float((layer.weight != 0).double().mean()), 6)


def _listed(reasons: Mapping[str, str]) -> str:
    shown = [f"{name}: {why}" for name, why in reasons.items()]
    return "; ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")
