"""Runs passes one after the other: checks, times, logs and wraps errors with the pass's name."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from optkit.context import Context
from optkit.errors import OptkitError, PassError, PostconditionError, PreconditionError
from optkit.models import Model, OnnxModel, TorchModel
from optkit.passes.base import Pass, kind_of

log = logging.getLogger("optkit.pipeline")


@dataclass(frozen=True)
class Stage:
    """A model on its way through the pipeline: what it is after the pass ``name``, which took ``seconds``."""

    name: str
    model: Model
    seconds: float


def misfit(passes: Sequence[Pass[Any, Any]]) -> str | None:
    """Why this order of passes cannot run, or None if each takes what the one before it gives."""
    for before, after in pairwise(passes):
        if before.gives != after.takes:
            return f"{after.use} takes {_KIND[after.takes]}, but {before.use} before it gives {_KIND[before.gives]}"
    return None


_KIND = {"torch": "a PyTorch model", "onnx": "an ONNX model", "engine": "an engine"}


def run_passes(passes: Sequence[Pass[Any, Any]], model: Model, context: Context) -> tuple[Stage, ...]:
    """Run every pass on what the one before it gave.

    Returns:
        One stage for the model that came in (``checkpoint``) and one for each pass that ran. An ONNX model that comes
        in enters at the first pass that takes ONNX.

    Raises:
        PassError: a pass failed; the message names it and the passes before it.
    """
    stages = [Stage("checkpoint", model, 0.0)]
    entry = next((i for i, step in enumerate(passes) if step.takes == kind_of(model)), None)
    if entry is None:
        raise PreconditionError(
            f"no pass of the recipe takes {_KIND[kind_of(model)]}: {', '.join(p.use for p in passes)}"
        )
    left_out = [step.use for step in passes[:entry] if step.takes == step.gives]
    if left_out:
        raise PreconditionError(
            f"{left_out[0]} takes {_KIND['torch']}, but the checkpoint is {_KIND[kind_of(model)]}: hand over the "
            f"PyTorch checkpoint, or drop {', '.join(left_out)} from the recipe"
        )
    context = with_original(context, model)
    for step in passes[entry:]:
        step.check_machine()  # before hours of other passes
    for step in context.progress(passes[entry:], "passes"):
        start = time.perf_counter()
        after = _run(step, stages, context)
        seconds = time.perf_counter() - start
        log.info("%s: %.2f s%s", step.use, seconds, " (nothing to do)" if after is stages[-1].model else "")
        stages.append(Stage(step.use, after, seconds))
    return tuple(stages)


def with_original(context: Context, model: Model) -> Context:
    """The context with the model that comes in, unless it knows one from further up the pipeline."""
    if context.original is not None or context.original_onnx is not None:
        return context
    if isinstance(model, TorchModel):
        return replace(context, original=model)
    return replace(context, original_onnx=model) if isinstance(model, OnnxModel) else context


def _run(step: Pass[Any, Any], stages: Sequence[Stage], context: Context) -> Model:
    before = stages[-1].model
    done = ", ".join(stage.name for stage in stages[1:]) or "nothing"
    try:
        step.requires(before, context)
        after: Model = step.run(before, context)
        if isinstance(before, OnnxModel) and isinstance(after, OnnxModel) and after.signature != before.signature:
            raise PostconditionError("changed the signature of the model")
        if after is not before:
            step.ensures(before, after, context)
    except OptkitError as error:
        # One line of origin, without changing what kind of error it is
        if isinstance(error, PassError):
            raise type(error)(f"{step.use}: {error} (passes done before it: {done})") from error
        raise
    except MemoryError as error:
        raise PassError(
            f"{step.use}: out of memory (passes done before it: {done}); use a machine with more"
        ) from error
    except OSError:
        raise  # a full disk is no bug of the pass: compile() explains it
    except Exception as error:
        raise PassError(
            f"{step.use}: {type(error).__name__}: {error} (passes done before it: {done}); "
            "this is a bug in the pass: --debug shows where"
        ) from error
    return after
