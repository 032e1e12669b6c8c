"""Expresses a graph in what a target's own builder reads, just before the build."""

from __future__ import annotations

from optkit.context import Context
from optkit.errors import PostconditionError
from optkit.models import OnnxModel
from optkit.passes.decompose_gelu import DecomposeGelu
from optkit.passes.decompose_layer_norm import DecomposeLayerNorm
from optkit.passes.graph_edit import GraphEdit, drift, infer_types, is_same
from optkit.passes.lower_opset import LowerOpset
from optkit.passes.spell_out_kernels import SpellOutKernels
from optkit.passes.spell_out_shapes import SpellOutShapes
from optkit.passes.spell_out_zero_points import SpellOutZeroPoints
from optkit.passes.widen_to_float32 import WidenToFloat32, legal_tolerance_db
from optkit.targets.base import WEAK_TYPES, Dialect

_DECOMPOSE: tuple[GraphEdit, ...] = (DecomposeLayerNorm(), DecomposeGelu())
_SPELL_OUT: tuple[GraphEdit, ...] = (SpellOutKernels(), SpellOutZeroPoints(), SpellOutShapes())


def legalize(model: OnnxModel, dialect: Dialect, context: Context) -> OnnxModel:
    """The model as the builder reads it; the model itself where it reads everything.

    The numbers are checked once, after the last step: for a large batch on the CPU that takes longer than the steps.

    Raises:
        PassError: a node cannot be expressed; the message names it.
        PostconditionError: the numbers changed.
    """
    steps: list[GraphEdit] = [step for step in _DECOMPOSE if step.touches & dialect.lacks]
    after, done = _edited(model, [*steps, *_SPELL_OUT] if dialect.explicit else steps, context)
    if not dialect.typed:
        widened = WidenToFloat32().run(after, context)
        done += [WidenToFloat32().use] * bool({"FP16", "BF16"} & set(widened.records[WEAK_TYPES]["precisions"]))
        after = widened
    if dialect.builder_opset is not None:
        after, lowered = _edited(after, [LowerOpset(to=dialect.builder_opset)], context)
        done += lowered
    if done:
        found = drift(model, after, context)
        if not is_same(found, legal_tolerance_db(model.ir)):
            raise PostconditionError(f"{', '.join(done)} changed the numbers: {found}; report it")
    return after


def _edited(model: OnnxModel, steps: list[GraphEdit], context: Context) -> tuple[OnnxModel, list[str]]:
    """All steps on one clone, and the names of those that changed it; the model itself if none did."""
    applicable = [step for step in steps if step.applies(model.ir)]
    if not applicable:
        return model, []
    after = model.clone()
    infer_types(after.ir)
    changed = [step.use for step in applicable if step.edit(after.ir, context)]
    return (after, changed) if changed else (model, [])
