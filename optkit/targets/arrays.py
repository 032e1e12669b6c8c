"""Arrays of other libraries: what speaks ``__cuda_array_interface__`` or DLPack is taken as well as NumPy.

What an engine gives is NumPy, which speaks DLPack itself: ``torch.from_dlpack(output)`` shares its memory.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from optkit.errors import UsageError
from optkit.failures import reason
from optkit.targets import cuda

_ON_GPU = (2, 13)  # kDLCUDA, kDLCUDAManaged; pinned host memory (3) counts as the host's


def lies_on_gpu(value: Any) -> bool:
    """Whether an array lies in the memory of an NVIDIA GPU."""
    if isinstance(value, np.ndarray):
        return False
    value = _detached(value)
    if hasattr(value, "__cuda_array_interface__"):
        return True
    return hasattr(value, "__dlpack_device__") and int(value.__dlpack_device__()[0]) in _ON_GPU


def described(value: Any) -> Mapping[str, Any]:
    """The ``__cuda_array_interface__`` of an array on a GPU.

    Raises:
        UsageError: it speaks DLPack only.
    """
    value = _detached(value)
    if not hasattr(value, "__cuda_array_interface__"):
        raise UsageError(
            f"a {type(value).__name__} on the GPU without __cuda_array_interface__ cannot be read: "
            "hand over a copy in host memory"
        )
    interface: Mapping[str, Any] = value.__cuda_array_interface__
    return interface


def on_host(feeds: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """NumPy arrays of feeds: what lies in host memory is shared, what lies on a GPU is copied from there.

    Raises:
        UsageError: one of them is no array, or cannot be read.
    """
    return {name: as_numpy(value, name) for name, value in feeds.items()}


def as_numpy(value: Any, name: str) -> np.ndarray[Any, Any]:
    """An array of anything; ``name`` is what messages call it.

    Raises:
        UsageError: it is no array, or cannot be read.
    """
    if isinstance(value, np.ndarray):
        return value
    value = _detached(value)
    if lies_on_gpu(value):
        try:
            return cuda.to_host(described(value))
        except UsageError as error:
            raise UsageError(f"input {name!r}: {error}") from error
    try:
        if _is_tensor(value):
            from optkit.targets.pytorch import to_numpy  # NumPy's DLPack has no bfloat16

            return to_numpy(value)
        array = np.from_dlpack(value) if hasattr(value, "__dlpack__") else np.asarray(value)
    except Exception as error:  # whatever the other library raises
        raise UsageError(f"input {name!r}: a {type(value).__name__} cannot be read: {reason(error)}") from error
    if array.dtype == object:
        raise UsageError(
            f"input {name!r}: a {type(value).__name__} is no array: hand over NumPy, DLPack or __cuda_array_interface__"
        )
    return array


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _detached(value: Any) -> Any:
    """A tensor of a training run refuses every interface until it is detached."""
    return value.detach() if _is_tensor(value) else value
