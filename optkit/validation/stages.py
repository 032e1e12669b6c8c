"""The error stage by stage: what each model on the way differs from the checkpoint, on the same few samples."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from optkit.context import Context
from optkit.data import Batch
from optkit.emulation import halves_in_float32
from optkit.errors import OptkitError
from optkit.models import Engine, Feeds, Model, OnnxModel, TorchModel
from optkit.numerics import Difference, Sums, difference, sums
from optkit.pipeline import Stage
from optkit.quantize.linter import INTEGER_OPS
from optkit.targets.base import Runner, Target
from optkit.targets.onnxruntime import fuses_exactly, open_onnx
from optkit.targets.pytorch import open_torch
from optkit.validation.accuracy import check_reference

log = logging.getLogger("optkit.validation")


@dataclass(frozen=True)
class Tolerance:
    """How far a stage may be from the checkpoint before the report names it."""

    sqnr_db: float
    cosine: float

    def holds(self, error: Difference) -> bool:
        """Whether an error is within it."""
        return error.sqnr_db >= self.sqnr_db and error.cosine >= self.cosine


TOLERANCES = {
    "float32": Tolerance(60, 0.9999),
    "float16": Tolerance(30, 0.999),
    "bfloat16": Tolerance(20, 0.99),
    "int8": Tolerance(15, 0.99),
}
"""By the lowest precision in the graph. bfloat16 has three bits less than float16."""


@dataclass(frozen=True)
class StageError:
    """How far one stage is from the checkpoint.

    Attributes:
        name: of the pass.
        precision: the lowest in its graph, a key of ``TOLERANCES``.
        error: against the reference; None if the stage did not run.
        why_not: why it did not run.
        reference: the stage that it is compared with.
        meant: whether it is meant to differ, as a pruned model is.
    """

    name: str
    precision: str
    error: Difference | None
    why_not: str | None = None
    reference: str = "checkpoint"
    meant: bool = False

    @property
    def tolerance(self) -> Tolerance | None:
        """How far it may be from the reference; None if it is meant to differ."""
        return None if self.meant else TOLERANCES[self.precision]

    @property
    def within(self) -> bool | None:
        """Whether the error is within tolerance; None if it is not known, or there is no tolerance."""
        return None if self.error is None or self.tolerance is None else self.tolerance.holds(self.error)


def compare_stages(
    stages: Sequence[Stage], batches: Sequence[Batch], context: Context, engine: Runner | None, why_not: str | None
) -> list[StageError]:
    """Compare every stage with the first; one that a pass left as it was is skipped.

    Passes on PyTorch models, which prune and train, are meant to change what the model computes: what follows them is
    compared with what the last of them gave.

    Args:
        stages: the checkpoint first.
        batches: the samples; all of them fit every stage.
        context: threads and progress.
        engine: the opened engine, if the last stage is one and it runs here.
        why_not: why the engine does not run here.
    """
    with _opened(stages[0].model, context) as runner:
        wanted = [runner.run(batch.feeds) for batch in batches]
    seen = 0
    for outputs, batch in zip(wanted, batches, strict=True):
        check_reference("the checkpoint", outputs, seen, len(batch))
        seen += len(batch)
    changed = [(before, after) for before, after in pairwise(stages) if after.model is not before.model]
    errors = []
    reference, checkpoint = stages[0].name, wanted
    for before, after in context.progress(changed, "stages", len(changed)):
        if isinstance(after.model, TorchModel):
            with _opened(after.model, context) as runner:
                error = _error(runner, batches, checkpoint)
                reference, wanted = after.name, [runner.run(batch.feeds) for batch in batches]
            errors.append(StageError(after.name, "float32", error, meant=True))
            continue
        precision = precision_of(before.model if isinstance(after.model, Engine) else after.model)
        if isinstance(after.model, Engine):
            found = _error(engine, batches, wanted) if engine else None
            errors.append(StageError(after.name, precision, found, None if engine else why_not, reference))
            continue
        try:
            with _opened(after.model, context) as runner:
                errors.append(StageError(after.name, precision, _error(runner, batches, wanted), None, reference))
        except OptkitError as failure:
            # A stage in between need not run here (bfloat16 on ONNX Runtime's CPU): the verdict does not hang on it
            log.warning("stage %s could not be compared: %s", after.name, failure)
            errors.append(StageError(after.name, precision, None, str(failure), reference))
    return errors


def first_past_tolerance(errors: Sequence[StageError]) -> StageError | None:
    """The first stage whose error is past what its precision explains."""
    return next((error for error in errors if error.within is False), None)


def precision_of(model: Model) -> str:
    """The lowest precision that a model computes in."""
    if not isinstance(model, OnnxModel):
        return "float32"
    if any(node.op_type in _INT8_OPS for node in model.ir.graph.all_nodes()):
        return "int8"
    dtypes = set(_dtypes(model))
    return next((low for low in ("bfloat16", "float16") if low in dtypes), "float32")


def _dtypes(model: OnnxModel) -> Iterator[str]:
    """What values are known to be, and what they are cast to where no shape inference ran."""
    import onnx_ir as ir

    nodes = list(model.ir.graph.all_nodes())
    for value in [*model.ir.graph.initializers.values(), *(value for node in nodes for value in node.outputs)]:
        if value.dtype is not None:
            yield value.dtype.name.lower()
    for node in nodes:
        if node.op_type == "Cast":
            yield ir.DataType(node.attributes["to"].as_int()).name.lower()


_INT8_OPS = INTEGER_OPS | {"QuantizeLinear"}


def _opened(model: Model, context: Context) -> Runner:
    if isinstance(model, TorchModel):
        return open_torch(model, context.threads)
    assert isinstance(model, OnnxModel)  # engines are opened by the caller
    return open_as_meant(model, context.target, context.threads)


def open_as_meant(model: OnnxModel, target: Target, threads: int) -> Runner:
    """Open a model for its numbers on ONNX Runtime's CPU, which must not add errors that the target's engine lacks.

    It does not round between FP16 ops, and would hide what a GPU's kernels overflow; its fused INT8 kernels saturate on
    some processors, and blame it on a graph for another target.
    """
    fused = precision_of(model) != "int8" or fuses_exactly(target.dialect.int8)
    return open_onnx(halves_in_float32(model), threads, optimize=fused)


def _error(runner: Runner, batches: Sequence[Batch], wanted: Sequence[Feeds]) -> Difference:
    found: dict[str, Sums] = {}
    for batch, reference in zip(batches, wanted, strict=True):
        for name, more in sums(reference, runner.run(batch.feeds)).items():
            found[name] = found.get(name, Sums()) + more
    return difference(found)
