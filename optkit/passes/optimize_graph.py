"""Fuses and simplifies an ONNX graph: small passes, one after the other, on one clone."""

from __future__ import annotations

import itertools
import logging
from typing import Literal

from pydantic import field_validator

from optkit.context import Context
from optkit.errors import PostconditionError, did_you_mean
from optkit.models import OnnxModel
from optkit.passes.base import OnnxPass
from optkit.passes.collapse_reshapes import CollapseReshapes
from optkit.passes.collapse_transposes import CollapseTransposes
from optkit.passes.drop_identity import DropIdentity
from optkit.passes.fold_constants import FoldConstants
from optkit.passes.fuse_activation import FuseActivation
from optkit.passes.fuse_conv_bn import FuseConvBn
from optkit.passes.fuse_gelu import FuseGelu
from optkit.passes.fuse_gemm import FuseGemm
from optkit.passes.fuse_layer_norm import FuseLayerNorm
from optkit.passes.graph_edit import GraphEdit, drift, infer_missing_types, is_same, tolerance_db
from optkit.passes.materialize_shapes import MaterializeShapes
from optkit.passes.merge_initializers import MergeInitializers
from optkit.passes.merge_nodes import MergeNodes
from optkit.passes.simplify_graph import SimplifyGraph

log = logging.getLogger("optkit.passes")

STEPS: tuple[GraphEdit, ...] = (
    FoldConstants(),
    DropIdentity(),
    MergeNodes(),
    SimplifyGraph(),
    CollapseTransposes(),
    MaterializeShapes(),
    CollapseReshapes(),
    FuseGemm(),
    FuseConvBn(),
    FuseActivation(),
    FuseGelu(),
    FuseLayerNorm(),
    MergeInitializers(),
)
"""The order matters: constants and duplicates hide patterns, and a Gemm takes a BatchNormalization in."""

ROUNDS = 4
"""One step's result can be another's start; more rounds than this have never been needed."""


class OptimizeGraph(OnnxPass):
    """Fold constants, drop what does nothing, merge duplicates and fuse; the numbers stay the same.

    Every step is a pass of its own and can stand in a recipe by its name. Q/DQ pairs stay as they are.
    """

    use: Literal["optimize_graph"] = "optimize_graph"
    skip: tuple[str, ...] = ()
    """Steps to leave out, by name."""

    @field_validator("skip")
    @classmethod
    def _known(cls, skip: tuple[str, ...]) -> tuple[str, ...]:
        known = [step.use for step in STEPS]
        for name in skip:
            if name not in known:
                raise ValueError(f"{name!r} is not a step of optimize_graph: {did_you_mean(name, known)}")
        return skip

    def run(self, model: OnnxModel, context: Context) -> OnnxModel:
        """Run the steps in turn until none of them finds anything."""
        after, changed, idle = model.clone(), False, 0
        infer_missing_types(after.ir)
        steps = self._schedule()
        for step in itertools.islice(itertools.cycle(steps), ROUNDS * len(steps)):
            if step.applies(after.ir) and step.edit(after.ir, context):
                log.debug("optimize_graph: %d nodes after %s", after.ir.graph.num_nodes(), step.use)
                changed, idle = True, 1
            else:
                idle += 1
            if idle == len(steps):
                break
        return after if changed else model

    def _schedule(self) -> list[GraphEdit]:
        return [step for step in STEPS if step.use not in self.skip]

    def ensures(self, before: OnnxModel, after: OnnxModel, context: Context) -> None:
        """The numbers are the same; if not, the step that changed them is named."""
        tolerance = tolerance_db(before.ir)
        found = drift(before, after, context)
        if is_same(found, tolerance):
            return
        raise PostconditionError(
            f"changed the numbers ({found}) in its step {self._culprit(before, tolerance, context)}: "
            "leave that step out with `skip`, and report it"
        )

    def _culprit(self, before: OnnxModel, tolerance: float, context: Context) -> str:
        """The first step after which the numbers are no longer the same."""
        after = before.clone()
        for step in self._schedule():
            if step.edit(after.ir, context) and not is_same(drift(before, after, context), tolerance):
                return repr(step.use)
        return "order (no single step does)"
