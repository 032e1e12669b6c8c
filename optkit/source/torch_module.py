"""A module becomes a ``TorchModel``: checked, in eval mode, with a known signature."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from optkit.errors import CheckpointError
from optkit.failures import few, reason
from optkit.models import DimRange, Signature, TensorSpec, TorchModel
from optkit.source.dimensions import Declared, inputs_of, settle
from optkit.source.forward import VARIADIC, adapted, by_keyword, in_order, listed
from optkit.source.probing import probe
from optkit.source.reading import Read

if TYPE_CHECKING:
    import torch

    from optkit.recipe import Recipe


def copied(module: torch.nn.Module) -> torch.nn.Module:
    """A copy that is ours to change."""
    try:
        return copy.deepcopy(module)
    except Exception as error:
        raise CheckpointError(
            f"{type(module).__name__} cannot be copied: {reason(error)}; hand over a state_dict with a factory instead"
        ) from error


def torch_model(read: Read, recipe: Recipe, data_inputs: tuple[TensorSpec, ...], where: str) -> TorchModel:
    """Check a module that is ours to change, and find its signature; ``where`` begins every message."""
    module = read.module
    _refuse_empty(module, where)
    if read.declared is None:
        module = module.eval().cpu()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    _refuse_non_finite(module, where)
    parameters = read.parameters
    if parameters is None:
        parameters = tuple(inspect.signature(module.forward).parameters.values())
    inputs, dims = _torch_inputs(read, recipe, data_inputs, parameters, where)
    inputs = in_order(inputs, parameters, f"{where}: {type(module).__name__}.forward")
    keywords = by_keyword(inputs, parameters)
    outputs, plain = probe(module, keywords, Signature(inputs, (), dims), where)
    if keywords or not plain:
        module = adapted(module, tuple(spec.name for spec in inputs), keywords)
    return TorchModel(module, Signature(inputs, outputs, dims))


def _refuse_empty(module: torch.nn.Module, where: str) -> None:
    tensors = itertools.chain(module.named_parameters(), module.named_buffers())
    empty = [name for name, tensor in tensors if tensor.is_meta or "Uninitialized" in type(tensor).__name__]
    if empty:
        raise CheckpointError(
            f"{where}: {len(empty)} tensor(s) have no values yet: {few(empty)}; load the weights first (lazy modules "
            "and the meta device have none)"
        )


def _refuse_non_finite(module: torch.nn.Module, where: str) -> None:
    """NaN is never right; infinity is in a buffer, where attention masks have it."""

    def is_bad(tensor: torch.Tensor, infinite: bool) -> bool:
        if not tensor.is_floating_point():
            return False
        values = tensor if tensor.element_size() > 1 else tensor.float()
        return bool(values.isnan().any()) or (infinite and bool(values.isinf().any()))

    bad = [name for name, tensor in module.named_parameters() if is_bad(tensor, infinite=True)]
    bad += [name for name, tensor in module.named_buffers() if is_bad(tensor, infinite=False)]
    if bad:
        raise CheckpointError(
            f"{where}: NaN or infinity in {len(bad)} tensor(s): {few(bad)}; "
            "take a checkpoint from before the training diverged"
        )


def _torch_inputs(
    read: Read,
    recipe: Recipe,
    data_inputs: tuple[TensorSpec, ...],
    parameters: Sequence[inspect.Parameter],
    where: str,
) -> tuple[tuple[TensorSpec, ...], dict[str, DimRange]]:
    if read.declared is not None:
        return settle(read.declared, recipe, data_inputs, where)
    wanted = inputs_of(recipe) or data_inputs or (read.guessed.inputs if read.guessed else ())
    if not wanted:
        takes = next((p.name for p in parameters if p.kind not in VARIADIC), "image")
        raise CheckpointError(
            f"{where}: neither checkpoint, recipe nor data say what the inputs are "
            f"({type(read.module).__name__}.forward takes {listed(parameters)}); "
            f"write --input {takes}=float32[batch,3,224,224] with the dtype and the dimensions of yours"
        )
    symbols = frozenset(dim for spec in wanted for dim in spec.shape if isinstance(dim, str))
    guessed = read.guessed.dims if read.guessed else {}
    inputs, dims = settle(Declared(wanted, {}, symbols), recipe, data_inputs, where)
    dynamic = {dim for spec in inputs for dim in spec.shape}
    return inputs, {**{dim: bounds for dim, bounds in guessed.items() if dim in dynamic}, **dims}
