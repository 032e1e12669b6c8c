"""Metrics: what one batch of outputs says about each sample, and the number from 0 to 1 that all samples make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol, TypeAlias, Union

import numpy as np
from pydantic import BeforeValidator, Field, PrivateAttr

from optkit.documents import Strict
from optkit.errors import DataError, did_you_mean
from optkit.functions import find_function
from optkit.models import Feeds
from optkit.transforms import as_step

Array: TypeAlias = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Batch:
    """Samples that run together: ``feeds`` with the samples in the first dimension of every array, and their labels."""

    feeds: Feeds
    labels: Array | None

    def __len__(self) -> int:
        return len(next(iter(self.feeds.values())))


class Metric(Protocol):
    """What the user cares about, measured per sample where that is possible.

    ``records`` turns one batch of outputs into one row per sample, small enough to keep; ``score`` turns rows into the
    metric, from 0 to 1 and higher is better. A paired bootstrap resamples the rows of baseline and candidate together.
    """

    @property
    def name(self) -> str:
        """What reports call it."""

    @property
    def needs_labels(self) -> bool:
        """Whether it looks at the labels; without, it only says how alike the outputs are."""

    @property
    def per_sample(self) -> bool:
        """Whether the score is the mean of the rows, which lets differences be tested sample by sample."""

    def records(self, outputs: Feeds, batch: Batch, baseline: Feeds) -> Array:
        """Rows [n, ...] for one batch; ``baseline`` is the outputs of the baseline on the same batch."""

    def score(self, rows: Array) -> float:
        """The metric over all rows."""


class OutputMetric(Strict):
    """A metric of one output: the named one, or the first."""

    per_sample: ClassVar[bool] = True

    use: str
    output: str | None = None

    @property
    def needs_labels(self) -> bool:
        """Whether it looks at the labels."""
        return True

    @property
    def name(self) -> str:
        """What reports call it."""
        return self.use

    def bound(self, folder: Path) -> OutputMetric:
        """The metric with its files found; paths are relative to ``folder``."""
        return self

    def records(self, outputs: Feeds, batch: Batch, baseline: Feeds) -> Array:
        """Rows [n, ...] for one batch."""
        raise NotImplementedError

    def score(self, rows: Array) -> float:
        """The mean of the rows."""
        return float(np.mean(rows))

    def _pick(self, outputs: Feeds, n: int) -> Array:
        name = self.output or next(iter(outputs))
        if name not in outputs:
            raise DataError(f"metric {self.use}: the model has no output {name!r}, {did_you_mean(name, outputs)}")
        array = np.asarray(outputs[name])
        if array.ndim == 0 or len(array) != n:
            raise DataError(
                f"metric {self.use}: output {name!r} has shape {list(array.shape)} for {n} samples: it must have the "
                "samples in its first dimension"
            )
        # bfloat16 is no NumPy float
        return array.astype(np.float32) if array.dtype.kind == "V" or array.dtype.name == "bfloat16" else array

    def _logits(self, outputs: Feeds, n: int, rank: int = 2) -> Array:
        logits = self._pick(outputs, n)
        if logits.ndim != rank:
            wanted = "[samples, classes]" if rank == 2 else "[samples, tokens, classes]"
            raise DataError(f"metric {self.use}: an output {wanted} is wanted, not shape {list(logits.shape)}")
        return logits

    def _classes(self, batch: Batch, logits: Array) -> Array:
        """The labels [n], checked to be classes of ``logits``."""
        labels = self._labels(batch)
        if labels.ndim != 1 or labels.dtype.kind not in "iub":
            raise DataError(
                f"metric {self.use}: labels must be whole numbers, one for each sample, not {labels.dtype} of shape "
                f"{list(labels.shape)}"
            )
        wrong = labels[(labels < 0) | (labels >= logits.shape[-1])]
        if len(wrong):
            raise DataError(
                f"metric {self.use}: label {wrong[0]} is not a class of an output with {logits.shape[-1]} classes"
            )
        return labels

    def _labels(self, batch: Batch) -> Array:
        if batch.labels is None:
            raise DataError(f"metric {self.use} needs labels: add label to the data spec")
        return np.asarray(batch.labels)


def _broken(array: Array) -> Array:
    """Which samples [n] have NaN in their output; a metric must never count them as right."""
    return np.asarray(np.isnan(array).reshape(len(array), -1).any(axis=1))


def _argmax(logits: Array) -> Array:
    """The top class [n], and -1 where there is NaN."""
    return np.where(_broken(logits), -1, logits.argmax(axis=-1))


class Top1(OutputMetric):
    """Accuracy: how often the label is the top class."""

    use: Literal["top1"] = "top1"

    def records(self, outputs: Feeds, batch: Batch, baseline: Feeds) -> Array:
        """1 where right, [n]."""
        logits = self._logits(outputs, len(batch))
        return np.asarray(_argmax(logits) == self._classes(batch, logits), np.float64)


class TopK(OutputMetric):
    """How often the label is among the ``k`` top classes."""

    use: Literal["topk"] = "topk"
    k: int = Field(default=5, ge=1)

    @property
    def name(self) -> str:
        """``top5``."""
        return f"top{self.k}"

    def records(self, outputs: Feeds, batch: Batch, baseline: Feeds) -> Array:
        """1 where right, [n]; of equal logits the first classes count, as for ``top1``."""
        logits = self._logits(outputs, len(batch))
        labels = self._classes(batch, logits)
        own = np.take_along_axis(logits, labels[:, None].astype(np.int64), axis=1)
        before = (logits == own) & (np.arange(logits.shape[1]) < labels[:, None])
        rank = ((logits > own) | before).sum(axis=1)
        return np.asarray((rank < self.k) & ~_broken(logits), np.float64)


class F1(OutputMetric):
    """``2 tp / (2 tp + fp + fn)``: of the class ``positive``, or the mean over all classes that occur."""

    per_sample: ClassVar[bool] = False

    use: Literal["f1"] = "f1"
    average: Literal["macro", "binary"] = "macro"
    positive: int = 1
    """The class that ``binary`` looks at."""

    @property
    def name(self) -> str:
        """``f1 macro``."""
        return f"f1 {self.average}"

    def records(self, outputs: Feeds, batch: Batch, baseline: Feeds) -> Array:
        """Predicted class and label, [n, 2]."""
        logits = self._logits(outputs, len(batch))
        return np.stack([_argmax(logits), self._classes(batch, logits)], axis=1)

    def score(self, rows: Array) -> float:
        """F1 over all rows; a class without a right or wrong prediction scores 0."""
        classes = [self.positive] if self.average == "binary" else sorted({int(c) for c in rows.ravel() if c >= 0})
        return float(np.mean([_f1(rows, wanted) for wanted in classes]))


def _f1(rows: Array, wanted: int) -> float:
    predicted, true = rows[:, 0] == wanted, rows[:, 1] == wanted
    total = predicted.sum() + true.sum()
    return float(2 * (predicted & true).sum() / total) if total else 0.0


class Spearman(OutputMetric):
    """Rank correlation of a one-number output with the labels; below 0 counts as 0."""

    per_sample: ClassVar[bool] = False

    use: Literal["spearman"] = "spearman"

    def records(self, outputs: Feeds, batch: Batch, baseline: Feeds) -> Array:
        """Output and label, [n, 2]."""
        n = len(batch)
        values, labels = self._pick(outputs, n), self._labels(batch)
        if values.size != n or labels.size != n:
            raise DataError(
                f"metric spearman: one number for each sample is wanted, not outputs {list(values.shape)} and labels "
                f"{list(labels.shape)}"
            )
        return np.stack([values.reshape(n), labels.reshape(n)], axis=1).astype(np.float64)

    def score(self, rows: Array) -> float:
        """Pearson's correlation of the ranks; 0 if one side is constant or NaN."""
        if np.isnan(rows).any():
            return 0.0
        left, right = (_ranks(column) for column in rows.T)
        left, right = left - left.mean(), right - right.mean()
        length = float(np.sqrt((left @ left) * (right @ right)))
        return min(1.0, max(0.0, float(left @ right) / length)) if length else 0.0


def _ranks(values: Array) -> Array:
    """Ranks from 0; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean: Array = last - (counts + 1) / 2
    return mean[inverse]


class TokenAccuracy(OutputMetric):
    """How many tokens have their label as the top class; tokens labelled ``ignore`` do not count."""

    per_sample: ClassVar[bool] = False

    use: Literal["token_accuracy"] = "token_accuracy"
    ignore: int = -100

    def records(self, outputs: Feeds, batch: Batch, baseline: Feeds) -> Array:
        """Right and counted tokens, [n, 2]."""
        logits, labels = self._logits(outputs, len(batch), rank=3), self._labels(batch)
        if labels.shape != logits.shape[:2] or labels.dtype.kind not in "iu":
            raise DataError(
                f"metric token_accuracy: labels are {labels.dtype} of shape {list(labels.shape)}, outputs have "
                f"{list(logits.shape[:2])}: give one whole number for each token, padded with {self.ignore}"
            )
        counted = labels != self.ignore
        right = (logits.argmax(axis=-1) == labels) & ~np.isnan(logits).any(axis=-1) & counted
        return np.stack([right.sum(axis=1), counted.sum(axis=1)], axis=1)

    def score(self, rows: Array) -> float:
        """Right tokens among those counted."""
        right, counted = rows.sum(axis=0)
        return float(right / counted) if counted else 0.0


class Cosine(OutputMetric):
    """Cosine between the outputs and the baseline's, per sample; of several outputs the least alike counts.

    Below 0 counts as 0, and so does NaN; two zero vectors are equal.
    """

    use: Literal["cosine"] = "cosine"

    @property
    def needs_labels(self) -> bool:
        """It looks at the baseline."""
        return False

    def records(self, outputs: Feeds, batch: Batch, baseline: Feeds) -> Array:
        """Cosines [n]."""
        n = len(batch)
        if self.output is not None:
            return _cosine(self._pick(outputs, n), self._pick(baseline, n))
        picks = [self.model_copy(update={"output": name}) for name in baseline]
        return np.asarray(np.min([_cosine(pick._pick(outputs, n), pick._pick(baseline, n)) for pick in picks], axis=0))


def _cosine(left: Array, right: Array) -> Array:
    if left.shape != right.shape:
        raise DataError(f"metric cosine: outputs of shape {list(left.shape)} and {list(right.shape)} do not compare")
    a, b = (array.reshape(len(array), -1).astype(np.float64) for array in (left, right))
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = np.where(lengths > 0, (a * b).sum(axis=1) / lengths, (a == b).all(axis=1))
    return np.asarray(np.clip(np.nan_to_num(cosine, nan=0.0), 0.0, 1.0))


class Agreement(OutputMetric):
    """How often the top class is the baseline's."""

    use: Literal["agreement"] = "agreement"

    @property
    def needs_labels(self) -> bool:
        """It looks at the baseline."""
        return False

    def records(self, outputs: Feeds, batch: Batch, baseline: Feeds) -> Array:
        """1 where equal, [n]; NaN agrees with nothing."""
        top = _argmax(self._logits(outputs, len(batch)))
        return np.asarray((top == _argmax(self._logits(baseline, len(batch)))) & (top >= 0), np.float64)


class PythonMetric(OutputMetric):
    """The user's own: ``function(outputs, labels, baseline)`` gives a score from 0 to 1 for each sample, [n].

    ``outputs`` and ``baseline`` are arrays by output name; ``labels`` is an array, or None if the spec has no label.
    """

    use: Literal["python"] = "python"
    function: str
    """``path.py:function`` or ``module:function``; a path is relative to the data spec."""
    labels: bool = True
    """Whether the function needs labels."""
    _function: Callable[..., Any] | None = PrivateAttr(default=None)

    @property
    def name(self) -> str:
        """The function's name."""
        return self.function.rpartition(":")[2]

    @property
    def needs_labels(self) -> bool:
        """As the spec says."""
        return self.labels

    def bound(self, folder: Path) -> OutputMetric:
        """Import the function now, so that a typo is not found after an hour."""
        bound = self.model_copy()
        bound._function = find_function(self.function, folder)
        return bound

    def records(self, outputs: Feeds, batch: Batch, baseline: Feeds) -> Array:
        """What the function says, checked."""
        function = self._function or find_function(self.function, Path())
        try:
            scores = np.asarray(function(dict(outputs), batch.labels, dict(baseline)), np.float64)
        except Exception as error:
            raise DataError(f"metric {self.function} failed: {type(error).__name__}: {error}") from error
        if scores.shape != (len(batch),) or not ((scores >= 0) & (scores <= 1)).all():
            raise DataError(
                f"metric {self.function} must give {len(batch)} numbers from 0 to 1, one for each sample; it gave "
                f"shape {list(scores.shape)}" + (f" and {scores.min()} to {scores.max()}" if scores.size else "")
            )
        return scores


AnyMetric = Annotated[
    Union[Top1, TopK, F1, Spearman, TokenAccuracy, Cosine, Agreement, PythonMetric],  # noqa: UP007
    Field(discriminator="use"),
    BeforeValidator(as_step),
]
