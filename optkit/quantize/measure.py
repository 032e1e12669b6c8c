"""How far a quantized model's outputs are from the float model's, on a few batches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from optkit.models import Feeds, OnnxModel
from optkit.targets.base import Int8Policy
from optkit.targets.onnxruntime import fuses_exactly, open_onnx

if TYPE_CHECKING:
    from optkit.data import Batch


_LEAST_MEAN = 16
"""Of how many values a mean error is taken: that of fewer is mostly noise, and to take it out hides the noise."""


def outputs_of(model: OnnxModel, batches: Sequence[Batch], threads: int, optimize: bool = True) -> list[Feeds]:
    """The model's outputs for each batch; ``optimize`` as in ``open_onnx``."""
    with open_onnx(model, threads, optimize) as runner:
        return [runner.run(batch.feeds) for batch in batches]


def noise_to_signal(reference: Sequence[Feeds], outputs: Sequence[Feeds]) -> float:
    """The squared error over the squared reference, averaged over the float outputs; infinite if one is not finite."""
    names = [name for name, array in reference[0].items() if np.issubdtype(array.dtype, np.floating)]
    ratios = [_ratio([r[name] for r in reference], [o[name] for o in outputs]) for name in names]
    mean = sum(ratios) / len(ratios) if ratios else 0.0
    return mean if math.isfinite(mean) else math.inf


def decibels(ratio: float) -> float:
    """A noise to signal ratio as SQNR in dB, higher is better; 200 stands for everything that is as good as exact."""
    return min(200.0, -10 * math.log10(max(ratio, 1e-20))) if math.isfinite(ratio) else -math.inf


def _ratio(reference: Sequence[np.ndarray[Any, Any]], outputs: Sequence[np.ndarray[Any, Any]]) -> float:
    pairs = [(r.astype(np.float64), o.astype(np.float64)) for r, o in zip(reference, outputs, strict=True)]
    signal = sum(float(np.square(r).sum()) for r, _ in pairs)
    noise = sum(float(np.square(r - o).sum()) for r, o in pairs)
    return noise / signal if signal > 0 else noise


def ranking(errors: Mapping[str, float]) -> dict[str, float]:
    """Errors as SQNR in dB, the best first."""
    return {name: round(decibels(errors[name]), 2) for name in sorted(errors, key=errors.__getitem__)}


class Judge:
    """Says how far quantized models are from the float one on samples that nothing else is chosen by.

    ONNX Runtime's fused kernels are the judge's only for a graph that is meant for them, and only where they are exact;
    for any other target, and on processors whose fused kernels saturate, every Q/DQ pair runs as it is written.
    """

    def __init__(self, model: OnnxModel, batches: Sequence[Batch], policy: Int8Policy, threads: int) -> None:
        self._batches = batches
        self._threads = threads
        self._fused = fuses_exactly(policy)
        self._reference = outputs_of(model, batches, threads)

    def error(self, quantized: OnnxModel) -> float:
        """The noise to signal ratio of a model's outputs."""
        return noise_to_signal(self._reference, self._outputs(quantized))

    def scatter(self, quantized: OnnxModel) -> float:
        """The same without the mean error of each channel: what remains when biases are corrected, nearly."""
        return noise_to_signal(self._reference, _unbiased(self._reference, self._outputs(quantized)))

    def _outputs(self, quantized: OnnxModel) -> list[Feeds]:
        return outputs_of(quantized, self._batches, self._threads, optimize=self._fused)


def _unbiased(reference: Sequence[Feeds], outputs: Sequence[Feeds]) -> Sequence[Feeds]:
    unbiased = [dict(feeds) for feeds in outputs]
    for name, first in reference[0].items():
        channels = 1 if first.ndim >= 4 else first.ndim - 1
        others = tuple(axis for axis in range(first.ndim) if axis != channels)
        count = sum(feeds[name].size for feeds in reference) / max(first.shape[channels], 1) if first.ndim else 0
        if count < _LEAST_MEAN or not np.issubdtype(first.dtype, np.floating):
            continue
        total = sum(
            (o[name].astype(np.float64) - r[name]).sum(others, keepdims=True)
            for r, o in zip(reference, outputs, strict=True)
        )
        for feeds in unbiased:
            feeds[name] = feeds[name] - total / count
    return unbiased
