"""Removes channels and attention heads from a PyTorch model, and everything that depends on them."""

from __future__ import annotations

import copy
import importlib.util
import logging
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from optkit.context import Context
from optkit.errors import PostconditionError, PreconditionError, UnavailableError
from optkit.models import TorchModel
from optkit.passes.base import TorchPass
from optkit.passes.distill import Distill
from optkit.passes.export_onnx import ExportOnnx
from optkit.passes.legalize import legalize
from optkit.passes.optimize_graph import OptimizeGraph
from optkit.pruning.batch_norm import recalibrate
from optkit.pruning.groups import Group, outputs_of, prunable_groups, remove
from optkit.pruning.importance import Importance, importance
from optkit.pruning.layers import is_weighted, layer_of, refuse_program
from optkit.pruning.ranking import Block, Scope, removal_order, shortest
from optkit.pruning.samples import calibration_batches, examples
from optkit.pruning.size import size_of
from optkit.training import load_hooks, train
from optkit.tunable import Tunable

if TYPE_CHECKING:
    import torch

    from optkit.targets.base import Runner

log = logging.getLogger("optkit.passes")

_TIMED = 0.1
"""Seconds for which each of two engines is timed in a round."""

_ROUNDS = 5
"""How often they take turns."""


class PruneChannels(TorchPass):
    """The channels that matter least go, with every weight that writes or reads them; so do attention heads.

    The goal is one of ``macs``, ``parameters`` and ``speedup``. What must keep its width is left alone, and why is in
    the record: the output, layers that forward calls twice, grouped convolutions, code with sizes written into it.
    """

    use: Literal["prune_channels"] = "prune_channels"
    macs: Annotated[float | None, Tunable(low=0.1, high=0.8)] = Field(default=None, gt=0, lt=1)
    """The fraction of the multiplications to remove."""
    parameters: float | None = Field(default=None, gt=0, lt=1)
    """The fraction of the parameters to remove."""
    speedup: float | None = Field(default=None, gt=1)
    """How many times as fast as before the float model must run, measured on the target while channels go."""
    importance: Annotated[Importance, Tunable()] = "activation"
    """What tells how much a channel matters: ``activation``, the energy that it brings to the layers that read it;
    ``taylor``, the change of the outputs without it; ``magnitude``, its weights alone, which needs no data."""
    scope: Annotated[Scope, Tunable()] = "layer"
    """``layer`` takes the same share of every layer; ``global`` ranks the channels of all layers together, with
    ``taylor`` by what they matter against what they cost."""
    multiple: Annotated[int | None, Tunable(choices=(8, 16, 32))] = Field(default=None, ge=1)
    """What widths shall be multiples of; what the target's kernels like if not given."""
    max_ratio: Annotated[float, Tunable(choices=(0.5, 0.75, 0.9))] = Field(default=0.9, gt=0, lt=1)
    """The largest fraction of a layer's channels that may go."""
    skip: tuple[str, ...] = ()
    """Names of layers or of modules around them, or patterns such as ``body.0.*``, that keep their width."""
    steps: Annotated[int, Tunable(choices=(1, 2, 4))] = Field(default=1, ge=1)
    """In how many steps the goal is reached; each ranks what is left anew."""
    samples: int = Field(default=256, ge=1)
    """How many calibration samples importance and the statistics of batch normalization are taken from."""
    recover: Distill | None = None
    """What is trained after each step, as ``{train: {epochs: 2}}``: the fields of ``distill``."""

    @model_validator(mode="after")
    def _one_goal(self) -> PruneChannels:
        if sum(goal is not None for goal in (self.macs, self.parameters, self.speedup)) != 1:
            raise ValueError("prune_channels needs one goal: set one of macs, parameters and speedup")
        return self

    def relative_to(self, folder: Path) -> PruneChannels:
        """The same pass with the path of the hooks of ``recover`` resolved."""
        return self.model_copy(update={"recover": self.recover.relative_to(folder)}) if self.recover else self

    def requires(self, model: TorchModel, context: Context) -> None:
        """Torch-Pruning, data where importance looks at it, layers in Python, and a target to measure on."""
        if importlib.util.find_spec("torch_pruning") is None:
            raise UnavailableError("prune_channels needs Torch-Pruning: pip install 'optkit[prune]'")
        if self.importance != "magnitude" and context.data is None:
            raise PreconditionError(
                f"importance {self.importance!r} needs data: add `data:` to the recipe, or set `importance: magnitude`"
            )
        refuse_program(model.module)
        if self.recover is not None:
            self.recover.requires(model, context)
        if "sparsity" in model.records:
            raise PreconditionError("prune_weights ran before: prune channels first, then weights")
        if self.speedup is not None:
            for able in (context.target.can_build(), context.target.can_run()):
                if not able.ok:
                    raise UnavailableError(
                        f"`speedup` is measured on the target {context.target.name!r}: {able.reason}. {able.mend}; "
                        "or set `macs` instead"
                    )

    def run(self, model: TorchModel, context: Context) -> TorchModel:
        """The model without what matters least, step by step; what cannot be pruned is in its record."""
        with ExitStack() as opened:
            goal = self._goal(model, context, opened)
            at = _Point(model, goal.start, {})
            for step in context.progress(range(1, self.steps + 1), "pruning channels", self.steps):
                wanted = goal.at(step / self.steps)
                if at.reached < wanted:
                    at = self._step(model, at, goal, wanted, context)
                    at = replace(at, model=self._recovered(at.model, step, context))
        pruned = replace(at.model, module=at.model.module.requires_grad_(False))
        return replace(pruned, records={**pruned.records, "pruning": self._record(model, pruned, goal, at)})

    def _goal(self, model: TorchModel, context: Context, opened: ExitStack) -> Goal:
        if self.speedup is not None:
            stopwatch = opened.enter_context(Stopwatch(model, context))
            return Goal("times the speed", self.speedup, 1.0, stopwatch.speedup)
        inputs = examples(model.signature)
        before = size_of(model.module, inputs)
        macs, parameters = max(before.macs, 1), max(before.parameters, 1)
        if self.macs is not None:
            return Goal("of the MACs", self.macs, 0.0, lambda m: 1 - size_of(m.module, inputs).macs / macs)
        assert self.parameters is not None  # there is exactly one goal
        return Goal(
            "of the parameters", self.parameters, 0.0, lambda m: 1 - size_of(m.module, inputs).parameters / parameters
        )

    def _step(self, original: TorchModel, at: _Point, goal: Goal, wanted: float, context: Context) -> _Point:
        """The model pruned until the goal has the wanted value."""
        model = replace(at.model, module=_trainable(at.model.module))
        inputs = examples(model.signature)
        multiple = self.multiple or context.target.dialect.width_multiple
        groups, kept = prunable_groups(model.module, inputs, self.skip, multiple)
        for name, why in kept.items():
            log.debug("%s keeps its width: %s", name, why)
        batches = calibration_batches(model.signature, context, self.samples)
        order = removal_order(
            groups,
            importance(self.importance, model.module, groups, batches, context.seed),
            self._costs(model.module, groups, inputs),
            multiple=multiple,
            scope=self.scope,
            floors={g.root: math.ceil((1 - self.max_ratio) * _widths(original.module)[g.root]) for g in groups},
        )
        if not order:
            raise PreconditionError(
                f"{_nothing_to_prune(groups, kept, multiple)}; so far it is {goal.told(at.reached)}"
            )

        tried: dict[int, tuple[TorchModel, float]] = {}

        def enough(blocks: Sequence[Block]) -> bool:
            without = replace(model, module=remove(model.module, inputs, _channels(blocks)))
            tried[len(blocks)] = without, goal.measure(without)
            return tried[len(blocks)][1] >= wanted

        chosen = shortest(order, enough)
        if chosen is None:
            raise PreconditionError(
                f"the goal of {goal.told(goal.wanted)} cannot be reached: with all gone that may go it is "
                f"{goal.told(tried[len(order)][1])}; lower the goal, `multiple` (now {multiple}), or raise `max_ratio` "
                f"(now {self.max_ratio:g}){_kept(kept)}"
            )
        pruned, reached = tried[len(chosen)]
        recalibrate(pruned.module, batches)
        log.info("pruned %d channels of %d layers", sum(len(b.channels) for b in chosen), len({b.root for b in chosen}))
        return _Point(pruned, reached, kept)

    def _recovered(self, model: TorchModel, step: int, context: Context) -> TorchModel:
        if self.recover is None:
            return model
        how, hooks = self.recover, load_hooks(self.recover.hooks, context)
        name = f"{self.use} step {step}"
        return train(model, how.train, context, objective=how.loss, teacher=context.original, hooks=hooks, name=name)

    def _costs(
        self, module: torch.nn.Module, groups: Sequence[Group], inputs: tuple[torch.Tensor, ...]
    ) -> dict[str, float]:
        """What one channel of each group costs, in multiplications or parameters of the layers that write and read it;
        the same for all where scores say nothing across groups."""
        if self.importance != "taylor":
            return dict.fromkeys((group.root for group in groups), 1.0)
        macs = size_of(module, inputs).by_layer

        def cost(name: str) -> int:
            return macs.get(name, 0) if self.parameters is None else int(layer_of(module, name).weight.numel())

        costs = {}
        for group in groups:
            writing = sum(cost(name) * times for name, times in group.layers.items())
            reading = sum(cost(reader.layer) * len(reader.inputs) / reader.width for reader in group.readers)
            costs[group.root] = max(1.0, (writing + reading) / group.width)
        return costs

    def _record(self, model: TorchModel, pruned: TorchModel, goal: Goal, at: _Point) -> dict[str, Any]:
        inputs = examples(model.signature, batch=1)
        before, after = size_of(model.module, inputs), size_of(pruned.module, inputs)
        widths = _widths(model.module)
        return {
            "goal": goal.told(goal.wanted),
            "reached": goal.told(at.reached),
            "importance": self.importance,
            "macs": [before.macs, after.macs],
            "parameters": [before.parameters, after.parameters],
            "widths": {
                name: [widths[name], width] for name, width in _widths(pruned.module).items() if width != widths[name]
            },
            "kept": dict(at.kept),
        }

    def ensures(self, before: TorchModel, after: TorchModel, context: Context) -> None:
        """The outputs have the shapes that they had, and are finite."""
        import torch

        inputs = examples(before.signature)
        with torch.no_grad():
            wanted, found = (outputs_of(model.module(*inputs)) for model in (before, after))
        for spec, one, other in zip(before.signature.outputs, wanted, found, strict=True):
            if one.shape != other.shape:
                raise PostconditionError(
                    f"output {spec.name!r} has shape {list(other.shape)} after pruning, not {list(one.shape)}"
                )
            if not other.isfinite().all():
                raise PostconditionError(f"output {spec.name!r} is not finite after pruning")


@dataclass(frozen=True)
class Goal:
    """What pruning must reach: ``measure`` grows from ``start`` to ``wanted`` as channels go."""

    unit: str
    wanted: float
    start: float
    measure: Callable[[TorchModel], float]

    def at(self, share: float) -> float:
        """What must be reached after a share of the steps."""
        return self.start + share * (self.wanted - self.start)

    def told(self, value: float) -> str:
        """A value for a reader."""
        return f"{100 * value:.1f} % {self.unit}" if self.start == 0 else f"{value:.2f} {self.unit}"


@dataclass(frozen=True)
class _Point:
    """How far pruning has come: the model, the goal's value, and why which layers kept their width."""

    model: TorchModel
    reached: float
    kept: Mapping[str, str]


class Stopwatch:
    """Times the float engine of a pruned model against that of the whole one, in turns, on the target."""

    def __init__(self, model: TorchModel, context: Context) -> None:
        self._context = context
        self._feeds = model.signature.random_feeds(context.rng("prune_channels"))
        self._opened = ExitStack()
        self._whole = self._open(model)

    def _open(self, model: TorchModel) -> Runner:
        context = self._context
        folder = Path(self._opened.enter_context(tempfile.TemporaryDirectory(dir=context.scratch)))
        graph = OptimizeGraph().run(ExportOnnx().run(model, context), context)
        engine = context.target.build(legalize(graph, context.target.dialect, context), folder, context)
        return context.target.open(engine, context.threads)

    def speedup(self, model: TorchModel) -> float:
        """How many times as fast as the whole model: the median over rounds of the ratio of medians."""
        with self._open(model) as pruned:
            calls = max(1, round(_TIMED / float(np.median(self._whole.time(self._feeds, 5)))))
            pruned.time(self._feeds, calls)
            ratios = [
                np.median(self._whole.time(self._feeds, calls)) / np.median(pruned.time(self._feeds, calls))
                for _ in range(_ROUNDS)
            ]
        return float(np.median(ratios))

    def __enter__(self) -> Stopwatch:
        return self

    def __exit__(self, *exc: object) -> None:
        self._whole.close()
        self._opened.close()


def _trainable(module: torch.nn.Module) -> torch.nn.Module:
    """A copy with gradients: the dependency graph is that of autograd."""
    copied = copy.deepcopy(module)
    for parameter in copied.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return copied


def _widths(module: torch.nn.Module) -> dict[str, int]:
    """Output channels by weighted layer."""
    return {
        name: getattr(part, "out_channels", None) or part.out_features
        for name, part in module.named_modules()
        if is_weighted(part)
    }


def _channels(blocks: Sequence[Block]) -> dict[str, list[int]]:
    channels: dict[str, list[int]] = {}
    for block in blocks:
        channels.setdefault(block.root, []).extend(block.channels)
    return channels


def _nothing_to_prune(groups: Sequence[Group], kept: Mapping[str, str], multiple: int) -> str:
    if not groups:
        return f"there is nothing to prune{_kept(kept) or ': the model has no convolution or linear layer'}"
    narrow = ", ".join(f"{group.root} has {group.width} channels" for group in groups[:5])
    return (
        f"there is nothing left to prune: {narrow}, and widths are multiples of {multiple}; lower `multiple` or raise "
        f"`max_ratio`{_kept(kept)}"
    )


def _kept(kept: Mapping[str, str]) -> str:
    """Why layers keep their width, for a message."""
    reasons = [f"{name}: {why}" for name, why in kept.items()]
    more = f" and {len(reasons) - 5} more" if len(reasons) > 5 else ""
    return f" ({'; '.join(reasons[:5])}{more})" if reasons else ""
