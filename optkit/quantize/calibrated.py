"""A float model and what calibration found out about it, before any Q/DQ pair is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from optkit.models import OnnxModel
from optkit.quantize.placement import place
from optkit.quantize.qdq import Quantization
from optkit.quantize.ranges import Ranges
from optkit.quantize.trial import Trial
from optkit.targets.base import Int8Policy

if TYPE_CHECKING:
    from optkit.data import Batch


@dataclass(frozen=True)
class Calibrated:
    """What one pass over the calibration samples gives; it can be written with more or fewer nodes in INT8.

    Attributes:
        model: the float model, its nodes named, smoothed where that helped.
        policy: what the target wants.
        quantization: the placement, and the scale of everything in it.
        ranges: the scales of activations as they are saved, and what they were found from.
        first: the first samples that were observed, for algorithms that need tensors and not ranges.
        held_out: samples that were not observed, to choose by.
        trials: what was tried so far.
    """

    model: OnnxModel
    policy: Int8Policy
    quantization: Quantization
    ranges: Ranges
    first: Sequence[Batch]
    held_out: Sequence[Batch]
    trials: tuple[Trial, ...]

    def alone(self, node: str) -> Calibrated:
        """The same with one node of the placement in INT8 and no other, even where the target would not have it so."""
        placement = self.quantization.placement
        rules = tuple(rule for rule in self.policy.rules if rule != "depthwise_float")
        others = (use.node for use in placement.weights if use.node != node)
        return replace(self, policy=replace(self.policy, rules=rules)).without((*placement.kept_float, *others))

    def without(self, exclude: Sequence[str]) -> Calibrated:
        """The same with nodes left in float. To exclude a node only takes away, so nothing is found anew.

        Args:
            exclude: names or patterns of all nodes that stay in float.
        """
        placement = place(self.model, self.policy, exclude)
        weights = {use: self.quantization.weights[use] for use in placement.weights}
        return replace(self, quantization=replace(self.quantization, placement=placement, weights=weights))
