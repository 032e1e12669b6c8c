"""Student, teacher and objective as one PyTorch module. This file imports torch: it is imported when one is trained."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from optkit.data import Metric
from optkit.errors import DataError, PreconditionError, did_you_mean
from optkit.failures import blame, reason
from optkit.models import Signature
from optkit.source.forward import tensors
from optkit.targets.pytorch import named_outputs
from optkit.training.hardware import Hardware
from optkit.training.hooks import HookCalls, Parts
from optkit.training.settings import Objective, OutputKind, judged

Outputs = Mapping[str, torch.Tensor]

_IGNORED = -100
"""The label that PyTorch's losses leave out, unless the metric names another."""


class Learner(nn.Module):
    """Gives the loss of a batch and the terms that it is made of, ``[1, 1 + terms]`` in the order of ``weights``.

    All of it is one module, so that several GPUs can share a batch.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        signature: Signature,
        objective: Objective,
        metric: Metric,
        hooks: HookCalls,
        labelled: bool,
        hardware: Hardware,
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher
        self.reference = teacher
        """Whose outputs a metric compares with; the teacher's where there is one."""
        self.projections = nn.ModuleDict()
        self.weights = objective.weights(teacher is not None, labelled)
        self.signature, self._objective, self._hooks, self._hardware = signature, objective, hooks, hardware
        self._target = judged(metric, signature.outputs[0].name)
        self._ignored = getattr(metric, "ignore", _IGNORED)
        self._kinds: dict[str, OutputKind] = {
            spec.name: objective.kind_of(spec.name, signature.outputs[0].name, metric) for spec in signature.outputs
        }
        self._pairs = dict(objective.features) if teacher is not None and "features" in self.weights else {}
        self._seen = threading.local()  # each GPU's thread has its own
        self._watches: list[Any] = []
        self._classes: int | None = None
        self._all_count = False
        for mine, its in self._pairs.items():
            assert teacher is not None  # without one there are no pairs
            self._watches += [_watch(student, mine, "student", self._seen), _watch(teacher, its, "teacher", self._seen)]

    def close(self) -> None:
        """Leave the student as it was handed over, but for its weights."""
        for watch in self._watches:
            watch.remove()

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """The student's parameters and those of the projections."""
        return [*self.student.named_parameters(), *self.projections.named_parameters()]

    def forward(self, inputs: tuple[torch.Tensor, ...], labels: torch.Tensor | None) -> torch.Tensor:
        """Run student and teacher, and measure how far apart they and the labels are."""
        # Within forward: threads that share a batch among GPUs do not take mixed precision over
        with self._hardware.autocast():
            return self._losses(inputs, labels)

    def _losses(self, inputs: tuple[torch.Tensor, ...], labels: torch.Tensor | None) -> torch.Tensor:
        outputs = self._outputs_of(self.student, inputs)
        with torch.no_grad():
            taught = self._outputs_of(self.teacher, inputs)
        features = self._features()
        terms: dict[str, torch.Tensor] = {}
        if "labels" in self.weights and labels is not None:
            terms["labels"] = self._to_labels(outputs[self._target], labels)
        if "outputs" in self.weights:
            terms["outputs"] = self._to_teacher(outputs, taught, labels)
        if "features" in self.weights:
            terms["features"] = torch.stack([relative_error(mine, its) for mine, its in features.values()]).mean()
        loss = torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()
        loss = self._hooks.loss(Parts(inputs, labels, outputs, taught, features, terms), loss)
        return torch.stack([loss, *terms.values()]).float().unsqueeze(0)

    def answers(self, inputs: tuple[torch.Tensor, ...]) -> tuple[Outputs, Outputs]:
        """Outputs of the student and of the reference by name; the latter is empty without one."""
        return self._outputs_of(self.student, inputs), self._outputs_of(self.reference, inputs)

    def _outputs_of(self, module: nn.Module | None, inputs: tuple[torch.Tensor, ...]) -> Outputs:
        return {} if module is None else named_outputs(module(*inputs), self.signature)

    def fit(self, inputs: tuple[torch.Tensor, ...]) -> None:
        """Check on a batch that student and teacher go together, and make the projections between their features.

        Raises:
            PreconditionError: they do not.
        """
        with torch.no_grad():
            try:
                outputs, taught = self.answers(inputs)
            except Exception as error:  # whatever a user's forward raises
                raise PreconditionError(
                    f"the model does not run on a training batch of {len(inputs[0])}: {reason(error)}{blame(error)}; "
                    "look at batch_size, or at what the hooks changed"
                ) from error
        for name, its in taught.items():
            if outputs[name].shape != its.shape:
                raise PreconditionError(
                    f"the teacher gives the output {name!r} as {list(its.shape)} and the student as "
                    f"{list(outputs[name].shape)}: a teacher must have the student's outputs"
                )
        target = outputs.get(self._target)
        if target is None:
            raise PreconditionError(f"the model has no output {self._target!r}, {did_you_mean(self._target, outputs)}")
        if "labels" in self.weights and self._kinds[self._target] == "logits":
            self._classes = _classes_last(target).shape[-1]
        for index, (name, its_name) in enumerate(self._pairs.items()):
            mine, its = self._captured("student", name), self._captured("teacher", its_name)
            projection = _projection(mine, its, f"features {name!r} and {its_name!r}")
            self.projections[str(index)] = projection.to(mine.device)

    def check_labels(self, labels: np.ndarray[Any, Any] | None) -> None:
        """Refuse labels that are no classes, and see whether all count; a GPU would not say which, or have to be asked.

        Raises:
            DataError: there is one.
        """
        self._all_count = labels is not None and not (labels == self._ignored).any()
        if labels is None or self._classes is None or labels.dtype.kind not in "iu":
            return
        wrong = labels[(labels != self._ignored) & ((labels < 0) | (labels >= self._classes))]
        if wrong.size:
            raise DataError(
                f"label {wrong.flat[0]} is not a class of the output {self._target!r} with {self._classes} classes"
            )

    def _features(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        return {
            name: (self.projections[str(index)](self._captured("student", name)), self._captured("teacher", its))
            for index, (name, its) in enumerate(self._pairs.items())
        }

    def _captured(self, who: str, name: str) -> torch.Tensor:
        found: torch.Tensor | None = getattr(self._seen, f"{who} {name}", None)
        if found is None:
            raise PreconditionError(
                f"features: the {who} did not run its module {name!r} as one: name another, or give the model as a "
                "state_dict with a factory (a torch.export program has no modules any more)"
            )
        return found

    def _to_labels(self, output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        output = output.float()
        if self._kinds[self._target] == "values":
            if output.numel() != labels.numel():
                raise DataError(
                    f"labels of shape {list(labels.shape)} do not fit the output {self._target!r} of shape "
                    f"{list(output.shape)}: set the weight `labels` of the loss to 0, or `kind: logits`"
                )
            return F.mse_loss(output, labels.reshape(output.shape).to(output.dtype))
        logits = _classes_last(output)
        if labels.shape != logits.shape[:-1] or labels.is_floating_point():
            raise DataError(
                f"labels of shape {list(labels.shape)} ({labels.dtype}) are no classes of the output "
                f"{self._target!r} of shape {list(output.shape)}: set `kind: values`, or the weight `labels` to 0"
            )
        flat = labels.reshape(-1)
        return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), flat, ignore_index=self._ignored)

    def _to_teacher(self, outputs: Outputs, taught: Outputs, labels: torch.Tensor | None) -> torch.Tensor:
        terms = []
        for name, output in outputs.items():
            if not output.is_floating_point():
                continue  # a class that was already chosen teaches nothing
            if self._kinds[name] == "values":
                terms.append(relative_error(output, taught[name]))
                continue
            mine, its = _classes_last(output.float()), _classes_last(taught[name].float())
            fits = labels is not None and labels.shape == mine.shape[:-1] and not labels.is_floating_point()
            if labels is not None and fits and not self._all_count:
                # Whoever takes some of a GPU's numbers has to wait until it has counted them
                counts = labels != self._ignored
                mine, its = mine[counts], its[counts]
            terms.append(softened(mine, its, self._objective.temperature))
        return torch.stack(terms).mean()


def softened(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """``T^2 KL(softmax(t / T) || softmax(s / T))`` over the last axis, the mean over all others.

    The factor keeps the gradients' size apart from the temperature (Hinton et al. 2015, section 2).
    """
    mine = F.log_softmax(student.reshape(-1, student.shape[-1]) / temperature, dim=-1)
    its = F.log_softmax(teacher.reshape(-1, teacher.shape[-1]) / temperature, dim=-1)
    return F.kl_div(mine, its, reduction="batchmean", log_target=True) * temperature**2


def relative_error(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """``sum (s - t)^2 / sum t^2``, which does not depend on the size of the values: 1 / SQNR."""
    mine, its = student.float(), teacher.float()
    return (mine - its).square().sum() / its.square().sum().clamp_min(torch.finfo(torch.float32).tiny)


def _classes_last(logits: torch.Tensor) -> torch.Tensor:
    """Images have their classes in axis 1, everything else in the last one."""
    return logits.movedim(1, -1) if logits.ndim > 3 else logits


def _watch(module: nn.Module, name: str, who: str, seen: threading.local) -> Any:
    """Keep what an inner module gives, until what is returned is removed."""
    inner = dict(module.named_modules())
    # What reads the checkpoint may have wrapped the user's module
    target = inner.get(name, inner.get(f"module.{name}"))
    if target is None or not name:
        hint = did_you_mean(name, [known for known in inner if known])
        raise PreconditionError(f"features: the {who} has no module {name!r}; {hint}")

    def keep(part: nn.Module, arguments: Any, output: Any) -> None:
        setattr(seen, f"{who} {name}", next((tensor for _, tensor in tensors(output)), None))

    return target.register_forward_hook(keep)


def _projection(mine: torch.Tensor, its: torch.Tensor, what: str) -> nn.Module:
    """What takes the student's features to the shape of the teacher's: a pool for images, a linear map for channels."""
    if mine.shape == its.shape:
        return nn.Identity()
    if mine.ndim != its.ndim or mine.ndim < 2 or len(mine) != len(its):
        raise PreconditionError(f"{what} have the shapes {list(mine.shape)} and {list(its.shape)}: name modules alike")
    if mine.ndim >= 4:
        pools = {4: nn.AdaptiveAvgPool2d, 5: nn.AdaptiveAvgPool3d}
        sizes = its.shape[2:]
        pool = pools[mine.ndim](tuple(sizes)) if mine.shape[2:] != sizes else nn.Identity()
        return nn.Sequential(pool, _Channels(1, mine.shape[1], its.shape[1]))
    apart = [axis for axis in range(mine.ndim) if mine.shape[axis] != its.shape[axis]]
    if len(apart) != 1:
        raise PreconditionError(f"{what} have the shapes {list(mine.shape)} and {list(its.shape)}: name modules alike")
    return _Channels(apart[0], mine.shape[apart[0]], its.shape[apart[0]])


class _Channels(nn.Module):
    """A linear map of one axis, without a bias."""

    def __init__(self, axis: int, before: int, after: int) -> None:
        super().__init__()
        self._axis = axis
        self.linear = nn.Linear(before, after, bias=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        mapped: torch.Tensor = self.linear(features.movedim(self._axis, -1))
        return mapped.movedim(-1, self._axis)
