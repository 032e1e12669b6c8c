"""Quantizes an FP32 graph to INT8 with calibration samples, as the target wants it."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from optkit.context import Context
from optkit.errors import DataError, PostconditionError, PreconditionError
from optkit.models import OnnxModel
from optkit.passes.base import OnnxPass
from optkit.quantize.bias_correction import correct_biases
from optkit.quantize.calibration import Calibration, Split, choose, scales
from optkit.quantize.linter import lint
from optkit.quantize.measure import Judge, outputs_of
from optkit.quantize.observers import observe
from optkit.quantize.placement import Placement, name_nodes, place
from optkit.quantize.qdq import Quantization, quantize_weights, write
from optkit.quantize.rounding import round_weights
from optkit.quantize.scales import WeightMethod
from optkit.quantize.smooth_quant import smooth
from optkit.quantize.trial import Trial, keep_better
from optkit.targets.base import Int8Policy

if TYPE_CHECKING:
    from optkit.data import Batch, Data

log = logging.getLogger("optkit.quantize")

_QUANTIZED_OPS = frozenset(
    {"QuantizeLinear", "DequantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger"}
)

_PROMISES = frozenset({"W8", "W9"})
"""Linter rules that mean that a node which was to be INT8 runs in float."""

_PROBE_BYTES = 1 << 28
"""What the observed tensors of a batch may take together."""


class QuantizeInt8(OnnxPass):
    """Weights become INT8, and the activations that the target's policy names get Q/DQ pairs."""

    use: Literal["quantize_int8"] = "quantize_int8"
    calibrate: Calibration = Calibration()
    """How the ranges of activations are found."""
    weights: WeightMethod = "max"
    """Ranges of weights, per output channel: ``max``, or ``mse`` for the least squared error."""
    smooth: bool = True
    """Move outliers of the channels that matrix products read into their weights; undone if held-out samples say so."""
    round: Literal["nearest", "gptq"] = "nearest"
    """How weights are rounded: each to its nearest, or in turn so that later ones make up for earlier ones' errors."""
    correct_bias: bool = True
    """Take each channel's mean error out of the biases, layer after layer; undone if held-out samples say so."""
    exclude: tuple[str, ...] = ()
    """Names of nodes, or patterns such as ``encoder.0/*``, that stay in float."""

    def requires(self, model: OnnxModel, context: Context) -> None:
        """Calibration data, a target that has INT8, and a float model of opset 13 or later."""
        _policy(context)
        _calibration_data(context)
        quantized = next((node for node in model.ir.graph.all_nodes() if node.op_type in _QUANTIZED_OPS), None)
        if quantized is not None:
            raise PreconditionError(
                f"the model is already quantized: node {quantized.name!r} is a {quantized.op_type}; "
                "start from the float model, or drop quantize_int8 from the recipe"
            )
        opset = model.ir.opset_imports.get("", 0)
        if opset < 13:
            raise PreconditionError(f"the model has opset {opset}, scales per channel need 13: export it again")

    def run(self, model: OnnxModel, context: Context) -> OnnxModel:
        """Place, calibrate in one pass over the samples, choose the scales, and write the Q/DQ pairs."""
        policy, data = _policy(context), _calibration_data(context)
        named = model.clone()
        name_nodes(named)
        placement = place(named, policy, self.exclude)
        if not placement.weights:
            reasons = "; ".join(f"{node}: {why}" for node, why in list(placement.kept_float.items())[:5])
            raise PreconditionError(f"nothing to quantize ({reasons or 'the model has no convolution or product'})")
        samples = Split(holds_out=self.calibrate.method == "auto" or self._improves)
        size = _batch_size(named, placement, self.calibrate.batch_size)
        stream = samples.observe(_batches(named, data, size, self.calibrate.samples))
        ahead = samples.read_ahead(stream)
        named, trials = self._smoothed(named, placement, policy, samples, size, context)
        placement = place(named, policy, self.exclude) if trials else placement
        batches = context.progress(itertools.chain(ahead, stream), "calibrating")
        statistics = observe(named, placement.observed, batches, context.threads)
        # Too few batches to hold one out: what was observed has to do
        held_out = samples.held_out or list(_batches(named, data, size, size))
        quantization, ranking = choose(
            named, placement, statistics, policy, self.calibrate, self.weights, held_out, context.threads
        )
        _log_placement(placement)
        quantized, quantization, more = self._improved(named, quantization, policy, samples, held_out, context)
        ranges = {
            "data": data.fingerprint("calibration"),
            "samples": samples.observed,
            "tensors": _ranges(quantization),
        }
        return quantized.with_record("ranges", ranges).with_record(
            "quantization",
            {
                "policy": asdict(policy),
                "method": next(iter(ranking), self.calibrate.method),
                "sqnr_by_method": ranking,
                "int8": list(placement.int8),
                "float": dict(placement.kept_float),
                "algorithms": [asdict(trial) for trial in trials + more],
            },
        )

    def _smoothed(
        self, model: OnnxModel, placement: Placement, policy: Int8Policy, samples: Split, size: int, context: Context
    ) -> tuple[OnnxModel, tuple[Trial, ...]]:
        if not self.smooth or not samples.held_out:
            return model, ()
        again = _batches(model, _calibration_data(context), size, self.calibrate.samples)
        smoothed = smooth(model, placement, policy, Split(holds_out=True).observe(again), context.threads)
        if smoothed is model:
            return model, ()
        judge = Judge(model, samples.held_out, policy, context.threads)

        def error(candidate: OnnxModel) -> float:
            places = place(candidate, policy, self.exclude)
            statistics = observe(candidate, places.observed, samples.first, context.threads)
            activations = scales(places, statistics, policy, "max")
            weights = quantize_weights(candidate, places, policy, activations, self.weights)
            return judge.error(write(candidate, Quantization(places, activations, weights)))

        chosen, _, trial = keep_better("smooth", (model, error(model)), (smoothed, error(smoothed)))
        return chosen, (trial,)

    @property
    def _improves(self) -> bool:
        return self.smooth or self.correct_bias or self.round != "nearest"

    def _improved(
        self,
        model: OnnxModel,
        quantization: Quantization,
        policy: Int8Policy,
        samples: Split,
        held_out: Sequence[Batch],
        context: Context,
    ) -> tuple[OnnxModel, Quantization, tuple[Trial, ...]]:
        best = quantization, write(model, quantization)
        steps: dict[str, Callable[[Quantization], Quantization]] = {}
        if self.round == "gptq":
            steps["round"] = lambda q: round_weights(model, q, samples.first, context.seed, context.threads)
        if self.correct_bias:
            steps["correct_bias"] = lambda q: correct_biases(model, q, policy, samples.first, context.threads)
        if not steps:
            return best[1], quantization, ()
        judge = Judge(model, held_out, policy, context.threads)
        error, trials = judge.error(best[1]), []
        for name, step in steps.items():
            improved = step(best[0])
            written = write(model, improved)
            best, error, trial = keep_better(name, (best, error), ((improved, written), judge.error(written)))
            trials.append(trial)
        return best[1], best[0], tuple(trials)

    def ensures(self, before: OnnxModel, after: OnnxModel, context: Context) -> None:
        """The target can take every Q/DQ pair, nothing that was promised runs in float, and outputs are finite."""
        promised = set(after.records["quantization"]["int8"])
        broken = [
            finding
            for finding in lint(after, _policy(context))
            if finding.is_error or (finding.rule in _PROMISES and finding.node in promised)
        ]
        if broken:
            raise PostconditionError("the linter objects to what was written: " + "; ".join(map(str, broken[:5])))
        batches = list(_batches(after, _calibration_data(context), size=1, limit=4))
        for name, array in outputs_of(after, batches, context.threads)[0].items():
            if not np.isfinite(array).all():
                raise PostconditionError(f"output {name!r} of the quantized model is not finite: is the float one's?")


def _policy(context: Context) -> Int8Policy:
    policy = context.target.dialect.int8
    if policy is None:
        raise PreconditionError(
            f"the target {context.target.name!r} has no INT8: choose another target, or drop quantize_int8"
        )
    return policy


def _calibration_data(context: Context) -> Data:
    if context.data is None:
        raise PreconditionError("quantize_int8 needs data: add `data:` to the recipe")
    calibration, validation = (context.data.fingerprint(split) for split in ("calibration", "validation"))
    if calibration == validation:
        raise DataError(
            "calibration and validation are the same samples, which would flatter the result: "
            "give each a split of its own in the data spec"
        )
    return context.data


def _batches(model: OnnxModel, data: Data, size: int, limit: int) -> Iterator[Batch]:
    """Calibration batches of a size that the model takes."""
    fixed = None if model.signature.batch else _fixed_batch(model)
    batches = data.batches("calibration", fixed or size, max(limit, fixed or 1))
    # A model with a fixed batch cannot take the rest that does not fill one
    return (batch for batch in batches if fixed is None or len(batch) == fixed)


def _fixed_batch(model: OnnxModel) -> int | None:
    shape = model.signature.inputs[0].shape if model.signature.inputs else ()
    return shape[0] if shape and isinstance(shape[0], int) else None


def _batch_size(model: OnnxModel, placement: Placement, most: int) -> int:
    """How many samples at a time keep the observed tensors within the budget; shapes that nobody knows do not count."""
    sizes = model.signature.sizes(**{model.signature.batch: 1}) if model.signature.batch else {}
    total = 0
    for node in model.ir.graph:
        for value in node.outputs:
            if value.name in placement.observed and value.shape is not None:
                total += 4 * math.prod(
                    dim if isinstance(dim, int) else sizes.get(str(dim.value), 1) for dim in value.shape
                )
    return max(1, min(most, _PROBE_BYTES // max(total, 1)))


def _ranges(quantization: Quantization) -> dict[str, Any]:
    return {
        name: {"scale": float(scale.scale), "zero_point": scale.zero_point, "dtype": scale.dtype}
        for name, scale in sorted(quantization.activations.items())
    }


def _log_placement(placement: Placement) -> None:
    log.info("%d nodes in INT8, %d weighted nodes in float", len(placement.int8), len(placement.kept_float))
    for node, reason in placement.kept_float.items():
        log.debug("%s stays in float: %s", node, reason)
