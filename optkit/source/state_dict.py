"""A state_dict meets the network that the user's factory builds."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optkit.errors import CheckpointError
from optkit.failures import blame, few, reason
from optkit.functions import find_function
from optkit.source.reading import Read, damaged

if TYPE_CHECKING:
    import torch

    from optkit.recipe import ModelSource

log = logging.getLogger(__name__)


def read_safetensors(path: Path, source: ModelSource) -> Read:
    """Read a file of safetensors, for the network that the factory builds."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(path)
    except SafetensorError as error:
        raise damaged(path, reason(error)) from error
    return Read(built(path, state, None, source), "safetensors")


def built(path: Path, state: dict[str, Any], metadata: Any, source: ModelSource) -> torch.nn.Module:
    """The network that the factory builds, with these weights.

    Args:
        path: where the weights come from, for messages.
        state: the weights.
        metadata: the versions that ``torch.save`` keeps with a state_dict, by which torch converts old layouts.
        source: the factory and its arguments.
    """
    if source.factory is None:
        raise CheckpointError(
            f"{path}: holds a state_dict, {len(state)} tensors ({few(list(state))}) but not the network; say which "
            "function builds it: --model module:function or --model path.py:function"
        )
    module = _call_factory(source.factory, source.arguments)
    _load_state(module, _without_prefix(state, module), metadata, f"{path} in {source.factory}")
    return module


def _call_factory(text: str, arguments: Mapping[str, Any]) -> torch.nn.Module:
    import torch

    factory = find_function(text, Path.cwd(), role="factory", error=CheckpointError)
    where = f"factory {text!r} ({factory.place})"
    try:
        module = factory(**arguments)
    except (Exception, SystemExit) as error:
        raise CheckpointError(f"{where} raised {reason(error)}{blame(error)}") from error
    if not isinstance(module, torch.nn.Module):
        raise CheckpointError(f"{where} returned {type(module).__name__}; it must return a torch.nn.Module")
    return module


def _without_prefix(state: dict[str, Any], module: torch.nn.Module) -> dict[str, Any]:
    """The state_dict without what DataParallel, torch.compile and Lightning put in front of every key."""
    own = module.state_dict()
    for prefix in ("module.", "_orig_mod.", "model."):
        if all(key.startswith(prefix) for key in state) and not any(key.startswith(prefix) for key in own):
            log.info("dropped the prefix %r from the keys of the state_dict", prefix)
            state = {key[len(prefix) :]: value for key, value in state.items()}
    return state


def _load_state(module: torch.nn.Module, state: dict[str, Any], metadata: Any, where: str) -> None:
    ordered = OrderedDict(state)
    if metadata is not None:
        setattr(ordered, "_metadata", metadata)  # noqa: B010 - torch reads it there
    own = module.state_dict()
    try:
        result = module.load_state_dict(ordered, strict=False)
    except RuntimeError as error:
        shapes = [
            f"{key} is {_shape(state[key])}, not {_shape(value)}"
            for key, value in own.items()
            if key in state and _shape(state[key]) != _shape(value)
        ]
        missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        problem = _misfit(missing, unexpected, shapes) or reason(error)
        raise CheckpointError(f"{where}: the state_dict does not fit: {problem}") from error
    # Tied weights are saved once, and BatchNorm's count of batches has no part in inference
    loaded = {own[key].data_ptr() for key in own.keys() - set(result.missing_keys)}
    missing = [
        key
        for key in result.missing_keys
        if not key.endswith("num_batches_tracked") and (key not in own or own[key].data_ptr() not in loaded)
    ]
    if problem := _misfit(missing, result.unexpected_keys, []):
        raise CheckpointError(f"{where}: the state_dict does not fit: {problem}")


def _shape(value: Any) -> str:
    shape = None if "Uninitialized" in type(value).__name__ else getattr(value, "shape", None)
    return "?" if shape is None else str(list(shape))


def _misfit(missing: Sequence[str], unexpected: Sequence[str], shapes: Sequence[str]) -> str:
    groups = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
    text = "; ".join(f"{len(keys)} {what}: {few(keys)}" for what, keys in groups if keys)
    return f"{text}; check the factory and its arguments" if text else ""
