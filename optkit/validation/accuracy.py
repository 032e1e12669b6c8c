"""Accuracy: the task's metric and the outputs' error, baselines and candidate on the same samples."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from optkit.context import Context
from optkit.data import Batch, Data, Metric
from optkit.errors import CheckpointError, DataError
from optkit.metrics import Cosine
from optkit.models import Feeds, Signature
from optkit.numerics import Array, Difference, Sums, difference, sums
from optkit.validation.contest import Contest
from optkit.validation.statistics import Interval, identical, paired_metric, paired_scores

log = logging.getLogger("optkit.validation")


@dataclass(frozen=True)
class Accuracy:
    """What one pass over the validation samples showed.

    Attributes:
        metric: the metric's name.
        labelled: whether the metric looks at labels; without, it only says how alike the outputs are.
        samples: how many samples every scored entrant ran.
        scores: the metric by entrant, 0 to 1.
        drops: what the candidate loses against each baseline, 0 to 1.
        no_drop: what the interval would be if the candidate gave what the reference gives.
        outputs: the candidate's error against the reference.
        broken: what is not finite in the candidate's outputs, as a sentence; then there are no scores.
    """

    metric: str
    labelled: bool
    samples: int
    scores: Mapping[str, float] = field(default_factory=dict)
    drops: Mapping[str, Interval] = field(default_factory=dict)
    no_drop: Interval | None = None
    outputs: Difference | None = None
    broken: str | None = None


def measure_accuracy(
    contest: Contest, data: Data, context: Context, batch_size: int, samples: int | None, confidence: float
) -> Accuracy:
    """Run every scored entrant over the validation samples; rows per sample are kept, outputs are not.

    Raises:
        CheckpointError: the reference's own outputs are not finite.
        DataError: there are fewer samples than the model takes at a time.
    """
    metric, reference, candidate = data.metric, contest.reference, contest.candidate
    scored = [entrant for entrant in contest.entrants if entrant.scored]
    rows: dict[str, list[Array]] = {entrant.name: [] for entrant in scored}
    errors: dict[str, Sums] = {}
    seen = 0
    total = _count(data, samples)
    size = batch_size_for(contest.signature, batch_size)
    batches = whole_batches(data, contest.signature, size, samples)
    for batch in context.progress(batches, "accuracy", -(-total // size) if total else None):
        outputs = {entrant.name: entrant.runner.run(batch.feeds) for entrant in scored}
        wanted, given = outputs[reference.name], outputs[candidate.name]
        check_reference(reference.name, wanted, seen, len(batch))
        where = _not_finite(wanted, given, seen, len(batch))
        if where:
            broken = f"{candidate.name} gives {where}, where {reference.name} gives a number"
            return Accuracy(metric.name, metric.needs_labels, seen + len(batch), broken=broken)
        for name, more in sums(wanted, given).items():
            errors[name] = errors.get(name, Sums()) + more
        for name, kept in rows.items():
            kept.append(metric.records(outputs[name], batch, wanted))
        seen += len(batch)
    joined = {name: np.concatenate(kept) for name, kept in rows.items()}
    return Accuracy(
        metric=metric.name,
        labelled=metric.needs_labels,
        samples=seen,
        scores={name: metric.score(kept) for name, kept in joined.items()},
        drops={
            baseline.name: _drop(metric, joined[baseline.name], joined[candidate.name], confidence, context)
            for baseline in contest.baselines
            if baseline.scored
        },
        no_drop=_drop(metric, joined[reference.name], joined[reference.name], confidence, context),
        outputs=difference(errors),
    )


def batch_size_for(signature: Signature, wanted: int) -> int:
    """How many samples a model takes at a time: what was wanted within its range, or its one static size."""
    if signature.batch is not None:
        limits = signature.range(signature.batch)
        return min(max(wanted, limits.min), limits.max)
    fronts = {spec.shape[0] if spec.shape else 1 for spec in signature.inputs}
    front = fronts.pop() if len(fronts) == 1 else 1
    return front if isinstance(front, int) else 1


def whole_batches(data: Data, signature: Signature, size: int, limit: int | None) -> Iterator[Batch]:
    """Validation batches, without a last one that is smaller than the model takes.

    Raises:
        DataError: there is not one.
    """
    smallest = signature.range(signature.batch).min if signature.batch is not None else size
    some = False
    for batch in data.batches("validation", size, limit):
        if len(batch) >= smallest:
            some = True
            yield batch
        elif some:
            log.warning("the last %d validation samples were left out: the model takes %d at a time", len(batch), size)
    if not some:
        raise DataError(
            f"there are not the {smallest} validation samples that the model takes at a time: check the validation "
            "split of the data and validation.samples, or give the model a dynamic batch dimension"
        )


def check_reference(name: str, outputs: Feeds, seen: int, size: int) -> None:
    """Refuse a baseline that gives NaN: nothing can be compared with it."""
    for output, values in outputs.items():
        bad = np.isnan(_as_float(values))
        if bad.any():
            sample = _first_sample(bad, seen, size)
            raise CheckpointError(
                f"{name}, the baseline, gives NaN in output {output!r} for validation {sample}: look for NaN or huge "
                "values in the checkpoint's weights and in the data's preprocessing"
            )


def _not_finite(wanted: Feeds, given: Feeds, seen: int, size: int) -> str | None:
    """Where a candidate's output is NaN or infinite and the reference's is not the same."""
    for output, reference in wanted.items():
        actual = given.get(output)
        if actual is None or actual.shape != reference.shape:
            continue  # the comparison of outputs has its own message for that
        values = _as_float(actual)
        bad = ~np.isfinite(values) & (values != _as_float(reference))
        if bad.any():
            kind = "NaN" if np.isnan(values[bad]).any() else "infinity"
            return f"{kind} in output {output!r} for validation {_first_sample(bad, seen, size)}"
    return None


def _as_float(values: Array) -> Array:
    """As float64, which has a NaN test and holds every dtype that an output may have."""
    return np.asarray(values, np.float64)


def _first_sample(bad: Array, seen: int, size: int) -> str:
    if bad.ndim and len(bad) == size:
        return f"sample {seen + int(np.argmax(bad.reshape(size, -1).any(axis=1)))}"
    return f"samples {seen} to {seen + size - 1}"


def _drop(metric: Metric, baseline: Array, candidate: Array, confidence: float, context: Context) -> Interval:
    rng = context.rng("validate accuracy")
    if not metric.per_sample:
        return paired_metric(metric.score, baseline, candidate, confidence, rng)
    if isinstance(metric, Cosine) and np.array_equal(baseline, candidate):
        return identical(len(baseline))
    return paired_scores(baseline, candidate, confidence, rng)


def _count(data: Data, samples: int | None) -> int | None:
    """How many samples are coming, as far as the data can say before it is read."""
    count = data.fingerprint("validation").get("count")
    known = [number for number in (count, samples) if isinstance(number, int)]
    return min(known) if known else None
