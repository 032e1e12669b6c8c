"""PyTorch eager: the baseline that every engine is compared with."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from optkit.errors import CheckpointError
from optkit.models import Feeds, Signature, TorchModel
from optkit.targets.base import Environment, check_feeds
from optkit.targets.cpu import this_cpu

if TYPE_CHECKING:
    import torch


class TorchRunner:
    """A PyTorch module in eval mode on the CPU: inputs in the signature's order, outputs named by it."""

    def __init__(self, model: TorchModel, environment: Environment, threads: int) -> None:
        self.signature = model.signature
        self.environment = environment
        self._module: Any = model.module
        self._threads = threads

    def run(self, feeds: Feeds) -> dict[str, np.ndarray[Any, Any]]:
        """Outputs by name for one batch of feeds.

        Raises:
            UsageError: a feed is missing, unknown, or not of the signature's dtype and shape.
            CheckpointError: the module gives other outputs than the signature says.
        """
        check_feeds(self.signature, feeds)
        with _inference(self._threads):
            return self._call(feeds)

    def time(self, feeds: Feeds, rounds: int) -> np.ndarray[Any, Any]:
        """Seconds of each of ``rounds`` calls, NumPy arrays in and out."""
        check_feeds(self.signature, feeds)
        samples = np.empty(rounds)
        with _inference(self._threads):
            for i in range(rounds):
                start = time.perf_counter_ns()
                self._call(feeds)
                samples[i] = (time.perf_counter_ns() - start) * 1e-9
        return samples

    def _call(self, feeds: Feeds) -> dict[str, np.ndarray[Any, Any]]:
        given = self._module(*(to_torch(feeds[spec.name]) for spec in self.signature.inputs))
        return {name: to_numpy(tensor) for name, tensor in named_outputs(given, self.signature).items()}

    def close(self) -> None:
        """Release the module."""
        self._module = None

    def __enter__(self) -> TorchRunner:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def open_torch(model: TorchModel, threads: int = 1) -> TorchRunner:
    """Run a PyTorch model eagerly on the CPU with ``threads`` intra-op threads."""
    import torch

    return TorchRunner(model, Environment(this_cpu().name, f"torch {torch.__version__}", {"threads": threads}), threads)


def named_outputs(given: Any, signature: Signature) -> dict[str, torch.Tensor]:
    """What a module gave, by the names of its signature.

    Raises:
        CheckpointError: it gave another number of tensors.
    """
    import torch
    from torch.utils import _pytree

    # The exporter flattens outputs in the same way, so the order is that of the ONNX outputs
    leaves = [leaf for leaf in _pytree.tree_leaves(given) if isinstance(leaf, torch.Tensor)]
    names = [spec.name for spec in signature.outputs]
    if len(leaves) != len(names):
        raise CheckpointError(f"the module gives {len(leaves)} tensors, but its signature names {', '.join(names)}")
    return dict(zip(names, leaves, strict=True))


@contextmanager
def _inference(threads: int) -> Iterator[None]:
    """Inference mode on ``threads`` threads; the caller's number of threads comes back afterwards."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(before)


def to_torch(array: np.ndarray[Any, Any]) -> torch.Tensor:
    """A tensor that shares the array's memory where PyTorch can."""
    import torch

    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()  # PyTorch has neither read-only tensors nor negative strides
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_numpy(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """An array of a CPU tensor's memory."""
    import torch

    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return tensor.detach().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.detach().numpy()
