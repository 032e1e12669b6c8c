"""The training loop: a student learns from labels and a teacher, judged on held-out samples, and may be interrupted."""

from __future__ import annotations

import copy
import logging
import math
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from optkit.context import Context
from optkit.data import Batch, Metric
from optkit.errors import DataError, OptkitError, PassError, PreconditionError
from optkit.failures import blame, reason
from optkit.models import TorchModel
from optkit.pruning.sparsity import apply_masks, masks
from optkit.targets.pytorch import to_numpy
from optkit.training.hardware import Hardware, hardware_for
from optkit.training.hooks import NO_HOOKS, HookCalls, State
from optkit.training.resume import Store, key_of, random_state, seeded, set_random_state
from optkit.training.samples import Course, ahead, part
from optkit.training.settings import Objective, Training

if TYPE_CHECKING:
    import torch

    from optkit.training.learner import Learner

log = logging.getLogger("optkit.training")

_LOOK_EVERY = 16
"""Steps between two looks at the loss on a GPU, where each look waits for it."""

_BATCH = zlib.crc32(b"batch")


def train(
    model: TorchModel,
    settings: Training,
    context: Context,
    *,
    objective: Objective | None = None,
    teacher: TorchModel | None = None,
    hooks: HookCalls = NO_HOOKS,
    name: str = "training",
    start_counts: bool = False,
) -> TorchModel:
    """Train a copy of a model on the training split of the context's data.

    With the same seed, settings and threads it gives the same weights on a CPU, bit for bit, however often it was
    interrupted: if ``context.resume`` names a folder, its state is kept there and found again.

    Args:
        model: the student, which is not changed. Weights that pruning set to zero stay zero.
        settings: optimizer, schedule, samples, device.
        context: the data with its metric, the seed, the progress bar, and where the state is kept.
        objective: what it learns; the default if not given.
        teacher: what it learns from beside labels; it is not changed either.
        hooks: the user's.
        name: what messages, the state and the record are called; it tells apart the trainings of one pipeline.
        start_counts: whether the weights that came in stay unless an epoch is better; else only if all are clearly
            worse.

    Returns:
        The trained model in eval mode on the CPU, with the weights of the best epoch by the data's metric on held-out
        samples, and the record ``name`` of how it went. If even that epoch is clearly worse than the model that came
        in, the weights are those that came in.

    Raises:
        PreconditionError: student, teacher and objective do not go together, or there is nothing to learn from.
        DataError: there are no training samples, too few, or none with the labels that the objective wants.
        UsageError: a hook failed or returned nonsense.
        PassError: the model cannot be trained, or the loss is not finite.
    """
    if context.data is None:
        raise PreconditionError(f"{name} needs training data: add a `data:` section to the recipe")
    objective = objective or Objective()
    hardware = hardware_for(settings)
    samples = hooks.data(context.data.training(hardware.readers(settings)))
    course = part(samples, settings, _static_size(model), context.seed)
    document = {
        "settings": settings.model_dump(mode="json", exclude={"save_every", "readers"}),
        "objective": objective.model_dump(mode="json"),
        "hooks": hooks.identity,
        "data": context.data.fingerprint("training"),
        "seed": context.seed,
    }
    store = Store(context.resume, name, key_of(document, model.module, teacher.module if teacher else None))
    with seeded(context.seed), hardware.tuned(model.signature):
        learner = _learner(model, teacher, objective, hooks, hardware, context, _first_batch(course, objective))
        metric, masked = context.data.metric, _masks(learner, model)
        run = _Run(name, learner, hardware, settings, course, hooks, context, metric, masked, start_counts)
        try:
            trained = run.through(store)
        except KeyboardInterrupt:
            if context.resume is not None and context.resume.exists():
                log.warning("the state of %s is in %s: the same command goes on from there", name, context.resume)
            raise
        finally:
            learner.close()
    record = {**run.record(), "data": document["data"]}
    return replace(model, module=trained, records={**model.records, name: record})


def _learner(
    model: TorchModel,
    teacher: TorchModel | None,
    objective: Objective,
    hooks: HookCalls,
    hardware: Hardware,
    context: Context,
    first: Batch,
) -> Learner:
    """Student and teacher where they compute, checked on the first batch."""
    from optkit.training.learner import Learner

    assert context.data is not None  # train() checked it
    student = hooks.student(copy.deepcopy(model.module))
    master = hooks.teacher(copy.deepcopy(teacher.module)) if teacher is not None else None
    for module in (student, master):
        if module is not None:
            _switch(hardware.placed(module), training=False)
            module.requires_grad_(False)
    for weight in student.parameters():
        weight.requires_grad_(weight.is_floating_point())
    metric = context.data.metric
    learner = Learner(student, master, model.signature, objective, metric, hooks, first.labels is not None, hardware)
    if not learner.weights:
        raise PreconditionError("there is nothing to learn from: no labels and no teacher, or no weights in the loss")
    if master is None and not metric.needs_labels:
        # Such a metric asks how alike the outputs are: those of the model that came in stand in for a teacher's
        learner.reference = hardware.placed(copy.deepcopy((context.original or model).module))
    learner.fit(hardware.inputs(first, model.signature))
    return learner


def _first_batch(course: Course, objective: Objective) -> Batch:
    """What shapes and labels are known by."""
    first = next(course.samples.batches(course.training[: course.size].tolist(), course.size), None)
    if first is None:
        raise DataError("there is not one training batch: look at the training split of the data, or at the hooks")
    if objective.labels and first.labels is None:
        raise DataError(
            f"the loss gives labels the weight {objective.labels:g}, and the data have none: set `label` in the data "
            "spec, or the weight to 0"
        )
    return first


@dataclass
class _Best:
    """The best weights, after ``epoch`` epochs; 0 is as the model came in."""

    score: float
    epoch: int
    student: Mapping[str, torch.Tensor]


@dataclass
class _Run:
    """A training on its way."""

    name: str
    learner: Learner
    hardware: Hardware
    settings: Training
    course: Course
    hooks: HookCalls
    context: Context
    metric: Metric
    masks: Mapping[str, torch.Tensor]
    start_counts: bool
    step: int = 0
    elapsed: float = 0.0
    ended: bool = False
    losses: list[float] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    first: float | None = None
    best: _Best | None = None

    def __post_init__(self) -> None:
        self.student = self.learner.student
        self.parallel = self.hardware.shared(self.learner)
        self.optimizer = _optimizer(self.learner, self.settings, self.hardware)
        self.scaler = self.hardware.scaler()
        self.before = _weights(self.student)
        self.steps = self.settings.epochs * self.course.steps

    # --- from the first step to the last

    def through(self, store: Store) -> torch.nn.Module:
        """Run what is left of the training."""
        state = store.load()
        if state is not None:
            self._restore(state)
            log.info("%s goes on after step %d of %d", self.name, self.step, self.steps)
        elif len(self.course.held_out):
            self.first = self._score()
        if not self.ended:
            self._steps(store)
            self._end()
            store.save(self._saved, done=True)
        _switch(self.student, training=False)
        self.student.requires_grad_(False).zero_grad()
        return self.hardware.back(self.student)

    def _steps(self, store: Store) -> None:
        _switch(self.student, training=True)
        started, saved = time.monotonic() - self.elapsed, time.monotonic()
        for batch in self.context.progress(self._batches(), self._describe, self.steps - self.step):
            self._learn(batch)
            self.elapsed = time.monotonic() - started
            whole = self.step % self.course.steps == 0
            self.ended = self.hooks.on_step(self._state()) or self._progress >= 1
            if whole or self.ended:
                self.ended = self._close_epoch() or self.ended
            if self.ended:
                return
            if time.monotonic() - saved >= self.settings.save_every:
                store.save(self._saved)
                saved = time.monotonic()

    def _batches(self) -> Iterator[Batch]:
        while True:
            epoch, done = divmod(self.step, self.course.steps)
            for batch in self._ahead(self.course.epoch(epoch, done), pin=not self.hooks.changes_batches):
                yield self.hooks.batch(batch, np.random.default_rng([self.context.seed, _BATCH, self.step]))

    def _ahead(self, batches: Iterator[Batch], *, pin: bool = True) -> Iterator[Batch]:
        """The batches, made while others are used; a GPU is fast, so for it one thread reads them and another pins."""
        if self.hardware.is_cpu:
            return ahead(batches)
        return ahead(map(self.hardware.pinned, ahead(batches)) if pin else batches, 2)

    @property
    def _progress(self) -> float:
        """The part of the run that is over, by steps or by time."""
        late = self.elapsed / (60 * self.settings.minutes) if self.settings.minutes else 0.0
        return max(self.step / self.steps, late)

    def _learn(self, batch: Batch) -> None:
        import torch

        rate = self.settings.learning_rate_at(self._progress, 1 / self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.learner.check_labels(batch.labels)
        inputs, labels = self.hardware.inputs(batch, self.learner.signature), self.hardware.labels(batch)
        with _told(len(batch)):
            losses = self.parallel(inputs, labels).mean(0)
            self._look(losses, rate)
            self.optimizer.zero_grad()
            self.scaler.scale(losses[0]).backward()
        if self.settings.clip is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_([weight for _, weight in self.learner.trained()], self.settings.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        apply_masks(self.student, self.masks)
        self.step += 1

    def _look(self, losses: torch.Tensor, rate: float) -> None:
        """Read the loss, and refuse one that is not finite."""
        ends_epoch = (self.step + 1) % self.course.steps == 0
        if not (self.hardware.is_cpu or ends_epoch or self.step % _LOOK_EVERY == 0):
            return
        loss, *terms = losses.tolist()
        if not math.isfinite(loss):
            broken = [name for name, term in zip(self.learner.weights, terms, strict=True) if not math.isfinite(term)]
            raise PassError(
                f"the loss is {loss} at step {self.step + 1} of {self.steps} with a learning rate of {rate:.3g}"
                + (f" (not finite: {', '.join(broken)})" if broken else "")
                + ": lower learning_rate, set `clip: 1.0` or lengthen warmup; at the very first step look for huge "
                "values in the data and for a fault in the hooks"
            )
        self.losses.append(loss)

    def _close_epoch(self) -> bool:
        """Judge, tell the hooks, and say whether to stop."""
        rate = self.optimizer.param_groups[0]["lr"]
        loss = float(np.mean(self.losses)) if self.losses else None  # None: ended on a GPU between two looks
        entry = {"step": self.step, "loss": loss, "learning_rate": rate}
        self.history.append(entry)
        self.losses.clear()
        if len(self.course.held_out):
            entry["score"] = score = self._score()
            if self.best is None or score > self.best.score:
                self.best = _Best(score, len(self.history), _weights(self.student))
        stop = self.hooks.on_epoch(self._state())
        since = len(self.history) - self.best.epoch if self.best else 0
        return stop or (self.settings.patience is not None and since >= self.settings.patience)

    def _end(self) -> None:
        """Take the best weights, and let the hooks have the last word."""
        if self.best is not None and self.first is not None:
            # The checkpoint may have learnt the held-out samples once, which flatters it: only a clear loss counts. A
            # score from 0 to 1 has a standard error of at most 1 / (2 sqrt(n)), and two of them are clear
            ruined = self.first - self.best.score > 1 / math.sqrt(len(self.course.held_out))
            if ruined:
                log.warning(
                    "%s made the model worse (%s %.2f before, %.2f at best): the weights that came in are kept; lower "
                    "learning_rate, or give it more samples or epochs",
                    self.name,
                    self.metric.name,
                    100 * self.first,
                    100 * self.best.score,
                )
            if ruined or (self.start_counts and self.best.score <= self.first):
                self.best = _Best(self.first, 0, self.before)
            self.student.load_state_dict(dict(self.best.student))
        _switch(self.student, training=False)
        self.hooks.on_end(self._state())
        apply_masks(self.student, self.masks)

    # --- judging and telling

    def _score(self) -> float:
        """The metric on the held-out samples."""
        import torch

        rows = []
        _switch(self.student, training=False)
        with torch.no_grad():
            for batch in self._ahead(self.course.judging()):
                answers = self.learner.answers(self.hardware.inputs(batch, self.learner.signature))
                mine, its = ({name: to_numpy(out.cpu()) for name, out in given.items()} for given in answers)
                rows.append(self.metric.records(mine, batch, its or mine))
        _switch(self.student, training=True)
        return self.metric.score(np.concatenate(rows))

    def _state(self) -> State:
        last = self.history[-1] if self.history else {}
        return State(
            student=self.student,
            optimizer=self.optimizer,
            step=self.step,
            steps=self.steps,
            epoch=len(self.history),
            loss=next((loss for loss in (*self.losses[-1:], last.get("loss")) if loss is not None), math.nan),
            score=last.get("score", self.first),
            best=self.best.score if self.best else self.first,
        )

    def _describe(self) -> str:
        state = self._state()
        text = f"{self.name}, epoch {min(state.epoch + 1, self.settings.epochs)} of {self.settings.epochs}"
        text += f", loss {state.loss:.3g}" if self.step else ""
        return text + (f", {self.metric.name} {100 * state.score:.2f}" if state.score is not None else "")

    def record(self) -> dict[str, Any]:
        """How it went, JSON-serializable."""
        return {
            "metric": self.metric.name,
            "score_before": self.first,
            "score": self.best.score if self.best else None,
            "best_epoch": self.best.epoch if self.best else len(self.history),
            "epochs": self.history,
            "steps": self.step,
            "batch_size": self.course.size,
            "training_samples": len(self.course.training),
            "held_out_samples": len(self.course.held_out),
            "objective": dict(self.learner.weights),
            "device": str(self.hardware.device),
            "seconds": round(self.elapsed, 3),
        }

    # --- what an interruption must not lose

    def _saved(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "elapsed": self.elapsed,
            "ended": self.ended,
            "losses": self.losses,
            "history": self.history,
            "first": self.first,
            "best": asdict(self.best) if self.best else None,
            "student": self.student.state_dict(),
            "projections": self.learner.projections.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": random_state(),
            "hooks": self.hooks.state_dict(),
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.step, self.elapsed, self.ended = state["step"], state["elapsed"], state["ended"]
        self.losses, self.history, self.first = state["losses"], state["history"], state["first"]
        self.best = _Best(**state["best"]) if state["best"] else None
        self.student.load_state_dict(state["student"])
        self.learner.projections.load_state_dict(state["projections"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.hooks.load_state_dict(state["hooks"])
        set_random_state(state["random"])


def _weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all that the module learns and counts, on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}


def _static_size(model: TorchModel) -> int | None:
    """The one number of samples that the model takes; None if any will do."""
    front = model.signature.inputs[0].shape[:1]
    return front[0] if front and isinstance(front[0], int) else None


def _optimizer(learner: Learner, settings: Training, hardware: Hardware) -> torch.optim.Optimizer:
    """Biases, norms and scales, which have one axis at most, are not decayed."""
    import torch

    fused = not hardware.is_cpu  # one kernel for all weights
    weights = [weight for _, weight in learner.trained() if weight.requires_grad]
    groups = [
        {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [weight for weight in weights if weight.ndim <= 1], "weight_decay": 0.0},
    ]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, settings.learning_rate, fused=fused)
    nesterov = settings.momentum > 0
    return torch.optim.SGD(groups, settings.learning_rate, momentum=settings.momentum, nesterov=nesterov, fused=fused)


def _masks(learner: Learner, model: TorchModel) -> dict[str, torch.Tensor]:
    """Where pruned weights may be other than zero, on the device of the student.

    Raises:
        PreconditionError: a hook's student has no such weights.
    """
    found = masks(model)
    weights = dict(learner.student.named_parameters())
    for name, mask in found.items():
        if name not in weights or weights[name].shape != mask.shape:
            raise PreconditionError(
                f"the weight {name!r} was pruned, and the hooks' student has none of that name and shape: take the "
                "student hook away, or prune_weights"
            )
    return {name: mask.to(weights[name].device) for name, mask in found.items()}


def _switch(module: torch.nn.Module, *, training: bool) -> None:
    """Training or eval mode; a torch.export program has the one that it was exported in, and its batch norms rest."""
    try:
        module.train(training)
    except NotImplementedError:
        log.debug("the model is a torch.export program, which has one mode only")


@contextmanager
def _told(size: int) -> Iterator[None]:
    """Say whose fault it is when a forward or backward pass fails."""
    try:
        yield
    except OptkitError:
        raise
    except Exception as error:  # whatever a user's forward and autograd raise
        raise PassError(
            f"the model cannot be trained on a batch of {size}: {reason(error)}{blame(error)}; if memory is short or "
            "a batch norm sees one value, change batch_size"
        ) from error
