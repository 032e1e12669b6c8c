"""Quantizes an FP32 graph to INT8 with calibration samples, as the target wants it."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np

from optkit.context import Context
from optkit.data import Batch
from optkit.errors import DataError, PostconditionError, PreconditionError
from optkit.models import OnnxModel
from optkit.passes.base import OnnxPass
from optkit.passes.graph_edit import infer_missing_types, sample_feeds
from optkit.quantize.bias_correction import correct_biases
from optkit.quantize.calibrated import Calibrated
from optkit.quantize.calibration import Calibration, Split, choose, scales
from optkit.quantize.equalization import equalize
from optkit.quantize.linter import QUANTIZED_OPS, lint
from optkit.quantize.macs import int8_share
from optkit.quantize.measure import Judge, outputs_of
from optkit.quantize.observers import observe
from optkit.quantize.placement import Placement, name_nodes, place
from optkit.quantize.qdq import Quantization, quantize_weights, write
from optkit.quantize.ranges import Ranges, digest, load
from optkit.quantize.rounding import round_weights
from optkit.quantize.samples import batch_size, calibration_batches
from optkit.quantize.scales import RangeMethod, WeightMethod
from optkit.quantize.smooth_quant import smooth
from optkit.quantize.trial import Trial, keep_better
from optkit.targets.base import Int8Policy, quote
from optkit.targets.onnxruntime import fuses_exactly
from optkit.tunable import Tunable

if TYPE_CHECKING:
    from optkit.data import Data

log = logging.getLogger("optkit.quantize")

_PROMISES = frozenset({"W8", "W9", "W10", "W13"})
"""Linter rules that mean that a node which was to be INT8 runs in float, or in pieces that are no faster."""


class QuantizeInt8(OnnxPass):
    """Weights become INT8, and so do the activations that the target's policy names."""

    use: Literal["quantize_int8"] = "quantize_int8"
    activations: Annotated[Literal["auto", "static", "dynamic"], Tunable()] = "auto"
    """``static``: calibration finds the ranges of activations, and Q/DQ pairs hold them. ``dynamic``: products and
    LSTMs find them at each call; convolutions stay in float, and no data is needed. ``auto``: where the target can,
    dynamic for LSTMs and for products that read float, and static for the rest."""
    calibrate: Calibration = Calibration()
    """How the ranges of activations are found."""
    weights: Annotated[WeightMethod, Tunable()] = "max"
    """Ranges of weights, per output channel: ``max``, or ``mse`` for the least squared error."""
    smooth: Annotated[bool, Tunable()] = True
    """Move outliers of the channels that matrix products read into their weights; undone if held-out samples say so."""
    equalize: Annotated[bool, Tunable()] = False
    """Bring the channels of a tensor to like ranges, by the weights around it; undone if held-out samples say so."""
    round: Annotated[Literal["nearest", "gptq"], Tunable()] = "gptq"
    """How weights are rounded: each to its nearest, or in turn so that later ones make up for earlier ones' errors;
    undone if held-out samples say so."""
    correct_bias: Annotated[bool, Tunable()] = True
    """Take each channel's mean error out of the biases, layer after layer; undone if held-out samples say so."""
    exclude: tuple[str, ...] = ()
    """Names of nodes, or patterns such as ``encoder.0/*``, that stay in float."""

    def relative_to(self, folder: Path) -> QuantizeInt8:
        """Ranges to use again are named relative to the recipe."""
        if self.calibrate.ranges is None:
            return self
        found = self.calibrate.model_copy(update={"ranges": str(folder / self.calibrate.ranges)})
        return self.model_copy(update={"calibrate": found})

    def requires(self, model: OnnxModel, context: Context) -> None:
        """A target that has INT8, calibration data if that is static, and a float model of opset 13 or later."""
        self._policy(context)
        self._data(context)
        quantized = next((node for node in model.ir.graph.all_nodes() if node.op_type in QUANTIZED_OPS), None)
        if quantized is not None:
            raise PreconditionError(
                f"the model is already quantized: node {quantized.name!r} is a {quantized.op_type}; "
                "start from the float model, or drop quantize_int8 from the recipe"
            )
        opset = model.ir.opset_imports.get("", 0)
        if opset < 13:
            raise PreconditionError(f"the model has opset {opset}, scales per channel need 13: export it again")

    def run(self, model: OnnxModel, context: Context) -> OnnxModel:
        """Calibrate, and write the Q/DQ pairs."""
        return self.written(self.calibrated(model, context), context)

    def calibrated(self, model: OnnxModel, context: Context) -> Calibrated:
        """Place, smooth, observe in one pass over the samples, and choose the scales.

        Raises:
            PreconditionError: nothing of the model can be quantized for the target.
            DataError: the calibration split is empty or does not fit the model.
        """
        policy = self._policy(context)
        data = self._data(context)
        named = model.clone()
        infer_missing_types(named.ir)
        name_nodes(named)
        placement = place(named, policy, self.exclude)
        if not placement.weights:
            reasons = "; ".join(f"{node}: {why}" for node, why in list(placement.kept_float.items())[:5])
            raise PreconditionError(f"nothing to quantize ({reasons or 'the model has no layer with weights'})")
        samples = Split(holds_out=self.calibrate.method == "auto" or self._improves)
        size = batch_size(named, placement, self.calibrate.batch_size)
        stream = samples.observe(_batches(named, data, size, self.calibrate.samples))
        ahead = samples.read_ahead(stream)
        named, trials = self._rescaled(named, policy, samples, size, context)
        placement = place(named, policy, self.exclude) if trials else placement
        # Too few batches to hold one out: what is observed has to do
        held_out = samples.held_out or list(_batches(named, data, size, size))
        origin = self._origin(model, policy, data)
        if self.calibrate.ranges is not None:
            ranges = load(self.calibrate.ranges, origin)
            quantization = self._with_ranges(named, placement, policy, ranges)
        elif not placement.observed:
            ranges = Ranges(origin, samples.observed, {}, {})
            quantization = self._with_ranges(named, placement, policy, ranges)
        else:
            batches = context.progress(itertools.chain(ahead, stream), "calibrating")
            statistics = observe(named, placement.observed, batches, context.threads)
            quantization, ranking = choose(
                named,
                placement,
                statistics,
                policy,
                self.calibrate,
                self.weights,
                held_out,
                self.correct_bias,
                context.threads,
            )
            ranges = Ranges(origin, samples.observed, ranking, quantization.activations)
        return Calibrated(named, policy, quantization, ranges, samples.first, held_out, trials)

    def _origin(self, model: OnnxModel, policy: Int8Policy, data: Data | None) -> dict[str, Any]:
        """What the ranges depend on."""
        rescaled = {"smooth": self.smooth, "equalize": self.equalize}
        settings = {**self.calibrate.model_dump(exclude={"ranges"}), **rescaled, **asdict(policy)}
        found = None if data is None else data.fingerprint("calibration")
        return {"model": digest(model), "data": found, "settings": settings}

    def _with_ranges(self, model: OnnxModel, placement: Placement, policy: Int8Policy, ranges: Ranges) -> Quantization:
        missing = sorted(placement.tensors - ranges.activations.keys())
        if missing:
            raise PreconditionError(
                f"calibrate.ranges: {self.calibrate.ranges} has no range for {quote(missing)}, quantized now: "
                "leave calibrate.ranges out to calibrate anew"
            )
        weights = quantize_weights(model, placement, policy, ranges.activations, self.weights)
        return Quantization(placement, ranges.activations, weights)

    def written(self, calibrated: Calibrated, context: Context) -> OnnxModel:
        """Run the accuracy algorithms on what calibration found, and write the Q/DQ pairs."""
        placement = calibrated.quantization.placement
        _log_placement(placement)
        quantized, trials = self._improved(calibrated, context)
        ranking = calibrated.ranges.ranking
        return quantized.with_record("ranges", calibrated.ranges.document()).with_record(
            "quantization",
            {
                "policy": asdict(calibrated.policy),
                "method": next(iter(ranking), self.calibrate.method),
                "sqnr_by_method": dict(ranking),
                "int8_macs": int8_share(calibrated.model, placement),
                "int8": list(placement.int8),
                "dynamic": sorted(placement.dynamic),
                "float": dict(placement.kept_float),
                "algorithms": [asdict(trial) for trial in calibrated.trials + trials],
            },
        )

    def _rescaled(
        self, model: OnnxModel, policy: Int8Policy, samples: Split, size: int, context: Context
    ) -> tuple[OnnxModel, tuple[Trial, ...]]:
        """The same function with weights and activations whose ranges suit INT8 better, where held-out samples gain."""
        steps: dict[str, Callable[[OnnxModel, Placement], OnnxModel]] = {}
        if self.smooth:
            again = Split(holds_out=True).observe(_batches(model, context.data, size, self.calibrate.samples))
            steps["smooth"] = lambda m, places: smooth(m, places, policy, again, context.threads)
        if self.equalize:
            steps["equalize"] = lambda m, places: equalize(m, places, samples.first, context.threads)
        if not samples.held_out:
            return model, ()
        judge = functools.cache(functools.partial(Judge, model, samples.held_out, policy, context.threads))

        def error(candidate: OnnxModel) -> float:
            places = place(candidate, policy, self.exclude)
            statistics = observe(candidate, places.observed, samples.first, context.threads)
            measure = judge().scatter if self.correct_bias else judge().error

            def by(method: RangeMethod) -> float:
                activations = scales(places, statistics, policy, method)
                weights = quantize_weights(candidate, places, policy, activations, self.weights)
                return measure(write(candidate, Quantization(places, activations, weights)))

            return min(by("max"), by("mse"))

        trials: list[Trial] = []
        for name, step in steps.items():
            candidate = step(model, place(model, policy, self.exclude))
            if candidate is not model:
                model, _, trial = keep_better(name, (model, error(model)), (candidate, error(candidate)))
                trials.append(trial)
        return model, tuple(trials)

    @property
    def _improves(self) -> bool:
        return self.smooth or self.equalize or self.correct_bias or self.round != "nearest"

    def _improved(self, calibrated: Calibrated, context: Context) -> tuple[OnnxModel, tuple[Trial, ...]]:
        model, policy, first = calibrated.model, calibrated.policy, calibrated.first
        best = calibrated.quantization, write(model, calibrated.quantization)
        steps: dict[str, Callable[[Quantization], Quantization]] = {}
        if self.correct_bias:
            steps["correct_bias"] = lambda q: correct_biases(model, q, policy, first, context.threads)
        if self.round == "gptq":
            # Biases that make up for the nearest weights are wrong for others: they are corrected on the way
            steps["round"] = lambda q: round_weights(
                model, q, policy, first, self.correct_bias, context.seed, context.threads
            )
        if not steps or not calibrated.held_out:
            return best[1], ()
        judge = Judge(model, calibrated.held_out, policy, context.threads)
        error, trials = judge.error(best[1]), []
        for name, step in steps.items():
            improved = step(best[0])
            written = write(model, improved)
            best, error, trial = keep_better(name, (best, error), ((improved, written), judge.error(written)))
            trials.append(trial)
        return best[1], tuple(trials)

    def ensures(self, before: OnnxModel, after: OnnxModel, context: Context) -> None:
        """The target can take every Q/DQ pair, nothing that was promised runs in float, and outputs are finite."""
        promised = set(after.records["quantization"]["int8"])
        policy = self._policy(context)
        broken = [
            finding
            for finding in lint(after, policy)
            if finding.is_error or (finding.rule in _PROMISES and finding.node in promised)
        ]
        if broken:
            raise PostconditionError("the linter objects to what was written: " + "; ".join(map(str, broken[:5])))
        batches = list(_batches(after, context.data, size=1, limit=4))
        batches = batches or [Batch(sample_feeds(after.signature, context), None)]
        for name, array in outputs_of(after, batches, context.threads, optimize=fuses_exactly(policy))[0].items():
            if not np.isfinite(array).all():
                raise PostconditionError(f"output {name!r} of the quantized model is not finite: is the float one's?")

    def _policy(self, context: Context) -> Int8Policy:
        policy = context.target.dialect.int8
        if policy is None:
            raise PreconditionError(
                f"the target {context.target.name!r} has no INT8: choose another target, or drop quantize_int8"
            )
        if self.activations == "dynamic" and not policy.dynamic:
            raise PreconditionError(
                f"the target {context.target.name!r} has no kernels that find ranges at each call: "
                "leave `activations` out of quantize_int8, or choose another target"
            )
        # The first rule that decides has the last word; dynamic ones decline what reads INT8 already
        rules = {"static": policy.rules, "dynamic": policy.dynamic, "auto": policy.dynamic + policy.rules}
        return replace(policy, rules=rules[self.activations])

    def _data(self, context: Context) -> Data | None:
        """Calibration samples; None where there are none, and dynamic quantization can do without."""
        if context.data is None and self.activations == "dynamic":
            return None
        return _calibration_data(context)


def _batches(model: OnnxModel, data: Data | None, size: int, limit: int) -> Iterator[Batch]:
    return iter(()) if data is None else calibration_batches(model, data, size, limit)


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


def _log_placement(placement: Placement) -> None:
    log.info("%d nodes in INT8, %d weighted nodes in float", len(placement.int8), len(placement.kept_float))
    for node, reason in placement.kept_float.items():
        log.debug("%s stays in float: %s", node, reason)
