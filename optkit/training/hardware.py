"""Where a training computes: the CPU, or the GPUs with mixed precision and the channels last."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from optkit.data import Batch
from optkit.errors import DataError, UnavailableError, did_you_mean
from optkit.models import Signature
from optkit.targets.pytorch import to_numpy, to_torch
from optkit.training.settings import Training

if TYPE_CHECKING:
    import torch

_TURN_SECONDS = 2e-4


@dataclass(frozen=True)
class Hardware:
    """What a training computes on.

    Attributes:
        device: the CPU or the first GPU.
        half: the type of mixed precision; None without.
        channels_last: whether images lie in memory with the channels last.
    """

    device: torch.device
    half: torch.dtype | None = None
    channels_last: bool = False

    @property
    def is_cpu(self) -> bool:
        """Whether it is the CPU, where nothing has to be waited for."""
        return self.device.type == "cpu"

    def placed(self, module: torch.nn.Module) -> torch.nn.Module:
        """The module, moved there."""
        import torch

        module = module.to(self.device)
        # Volumes have five axes, which PyTorch's channels_last refuses
        if self.channels_last and all(weight.ndim < 5 for weight in module.parameters()):
            return _laid_out(module, torch.channels_last)
        return module

    def back(self, module: torch.nn.Module) -> torch.nn.Module:
        """The module on the CPU, as it lies in memory there."""
        import torch

        module = module.cpu()
        return _laid_out(module, torch.contiguous_format) if self.channels_last else module

    def shared(self, module: torch.nn.Module) -> torch.nn.Module:
        """The module, sharing each batch out among all GPUs if there are several."""
        import torch

        return torch.nn.DataParallel(module) if not self.is_cpu and torch.cuda.device_count() > 1 else module

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision for the forward pass."""
        import torch

        return torch.autocast(self.device.type, dtype=self.half, enabled=self.half is not None)

    @contextmanager
    def tuned(self, signature: Signature) -> Iterator[None]:
        """Keep a GPU busy: the fastest kernels where no size but the batch's changes, and a loop that need not wait.

        Python lets a thread that makes batches go on for 5 ms while the one that launches kernels waits for its turn.
        """
        import torch

        before, turn = torch.backends.cudnn.benchmark, sys.getswitchinterval()
        fixed = all(isinstance(size, int) for spec in signature.inputs for size in spec.shape[1:])
        torch.backends.cudnn.benchmark = before or (fixed and not self.is_cpu)
        if not self.is_cpu:
            sys.setswitchinterval(min(turn, _TURN_SECONDS))
        try:
            yield
        finally:
            torch.backends.cudnn.benchmark = before
            sys.setswitchinterval(turn)

    def scaler(self) -> Any:
        """What keeps the gradients of float16 from vanishing; it does nothing for other types."""
        import torch

        return torch.amp.GradScaler(self.device.type, enabled=self.half is torch.float16)

    def readers(self, settings: Training) -> int:
        """How many threads make batches: on the CPU one, whose cores have the training to do."""
        return 1 if self.is_cpu else min(settings.readers, os.cpu_count() or 1)

    def inputs(self, batch: Batch, signature: Signature) -> tuple[torch.Tensor, ...]:
        """The batch's feeds in the order of the signature.

        Raises:
            DataError: one is missing.
        """
        for spec in signature.inputs:
            if spec.name not in batch.feeds:
                hint = did_you_mean(spec.name, batch.feeds)
                raise DataError(f"a training batch has no input {spec.name!r}, {hint}: see `inputs` of the data spec")
        return tuple(self._there(to_torch(batch.feeds[spec.name])) for spec in signature.inputs)

    def pinned(self, batch: Batch) -> Batch:
        """The same batch; for a GPU in memory that it can fetch by itself, which a thread beside the loop makes."""
        if self.is_cpu:
            return batch
        feeds = {name: to_numpy(to_torch(array).pin_memory()) for name, array in batch.feeds.items()}
        return replace(batch, feeds=feeds)

    def labels(self, batch: Batch) -> torch.Tensor | None:
        """The batch's labels: int64 or float32."""
        if batch.labels is None:
            return None
        kind = np.float32 if batch.labels.dtype.kind == "f" else np.int64
        return self._there(to_torch(batch.labels.astype(kind)))

    def _there(self, tensor: torch.Tensor) -> torch.Tensor:
        import torch

        if not self.is_cpu:
            tensor = tensor.pin_memory().to(self.device, non_blocking=True)  # what is pinned already is not copied
        # There, as a GPU turns a batch round in no time, and a processor would keep it waiting
        return tensor.contiguous(memory_format=torch.channels_last) if self._turned(tensor) else tensor

    def _turned(self, tensor: torch.Tensor) -> bool:
        return self.channels_last and tensor.ndim == 4


def _laid_out(module: Any, order: torch.memory_format) -> torch.nn.Module:
    moved: torch.nn.Module = module.to(memory_format=order)  # PyTorch's own annotations leave this form of `to` out
    return moved


def hardware_for(settings: Training) -> Hardware:
    """What the settings ask for, of what is there.

    Raises:
        UnavailableError: they ask for a GPU and there is none.
    """
    import torch

    there = torch.cuda.is_available()
    if settings.device == "cuda" and not there:
        raise UnavailableError("device: cuda, and PyTorch finds no GPU here: set `device: auto`, or mend its CUDA")
    if settings.device == "cpu" or not there:
        return Hardware(torch.device("cpu"))
    half = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return Hardware(torch.device("cuda"), half if settings.amp else None, settings.channels_last)
