"""Expresses a graph in what a target's own builder reads, just before the build."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from optkit.context import Context
from optkit.errors import PostconditionError
from optkit.models import OnnxModel
from optkit.passes.decompose_gelu import DecomposeGelu
from optkit.passes.decompose_layer_norm import DecomposeLayerNorm
from optkit.passes.decompose_mish import DecomposeMish
from optkit.passes.fold_biases import FoldBiases
from optkit.passes.graph_edit import GraphEdit, drift, infer_types, is_same
from optkit.passes.hold_quantizers import BEHIND, HoldQuantizers
from optkit.passes.lower_opset import LowerOpset
from optkit.passes.spell_out_clips import SpellOutClips
from optkit.passes.spell_out_kernels import SpellOutKernels
from optkit.passes.spell_out_names import SpellOutNames
from optkit.passes.spell_out_shapes import SpellOutShapes
from optkit.passes.spell_out_zero_points import SpellOutZeroPoints
from optkit.passes.widen_to_float32 import WidenToFloat32, legal_tolerance_db
from optkit.targets.base import WEAK_TYPES, Dialect

_DECOMPOSE: tuple[GraphEdit, ...] = (DecomposeLayerNorm(), DecomposeGelu(), DecomposeMish())
_SPELL_OUT: tuple[GraphEdit, ...] = (SpellOutKernels(), SpellOutZeroPoints(), SpellOutShapes(), SpellOutClips())


def legalize(model: OnnxModel, dialect: Dialect, context: Context) -> OnnxModel:
    """The model as the builder reads it; the model itself where it reads everything.

    Raises:
        PassError: a node cannot be expressed; the message names it.
        PostconditionError: the numbers changed.
    """
    legal = express(model, dialect, context)
    legal.check()
    return legal.model


@dataclass(frozen=True)
class Legal:
    """A model as a builder reads it, and the check that it still gives the same numbers."""

    model: OnnxModel
    check: Callable[[], None]
    """Runs both models on the CPU, which for a large batch takes far longer than the steps: it may run beside a build.
    Raises PostconditionError if the numbers changed."""


def express(model: OnnxModel, dialect: Dialect, context: Context) -> Legal:
    """``legalize`` without its check, which is made once, over all steps.

    Raises:
        PassError: a node cannot be expressed; the message names it.
    """
    steps: list[GraphEdit] = [step for step in _DECOMPOSE if step.touches & dialect.lacks]
    if dialect.int8 is not None and dialect.int8.bias == "float":
        steps.append(FoldBiases())
    named = SpellOutNames().run(model, context)
    after, done = _edited(named, [*steps, *_SPELL_OUT] if dialect.explicit else steps, context)
    if not dialect.typed:
        widened = WidenToFloat32().run(after, context)
        done += [WidenToFloat32().use] * bool({"FP16", "BF16"} & set(widened.records[WEAK_TYPES]["precisions"]))
        after, changed = _edited(widened, [SpellOutClips(), HoldQuantizers()], context)  # some Clips were FP16 before
        after = _held_alike(after)
        done += changed
    if dialect.builder_opset is not None:
        after, lowered = _edited(after, [LowerOpset(to=dialect.builder_opset)], context)
        done += lowered
    # A clone, because saving a model moves its weights about while it lasts
    return Legal(after, partial(_check, model, after.clone(), done, context) if done else lambda: None)


def _held_alike(model: OnnxModel) -> OnnxModel:
    """What ``HoldQuantizers`` put behind a node that is to compute in float32 does so, too."""
    weak, names = model.records[WEAK_TYPES], {node.name for node in model.ir.graph}
    held = [name for exact in weak["float32"] if (name := exact + BEHIND) in names]
    return model.with_record(WEAK_TYPES, {**weak, "float32": [*weak["float32"], *held]}) if held else model


def _check(model: OnnxModel, after: OnnxModel, done: list[str], context: Context) -> None:
    found = drift(model, after, context)
    if not is_same(found, legal_tolerance_db(model.ir)):
        raise PostconditionError(f"{', '.join(done)} changed the numbers: {found}; report it")


def _edited(model: OnnxModel, steps: list[GraphEdit], context: Context) -> tuple[OnnxModel, list[str]]:
    """All steps on one clone, and the names of those that changed it; the model itself if none did."""
    applicable = [step for step in steps if step.applies(model.ir)]
    if not applicable:
        return model, []
    after = model.clone()
    infer_types(after.ir)
    changed = [step.use for step in applicable if step.edit(after.ir, context)]
    return (after, changed) if changed else (model, [])
