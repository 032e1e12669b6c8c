"""How a model is trained, and on what: the settings that every pass that trains has in common."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, model_validator

from optkit.documents import Strict
from optkit.metrics import F1, Agreement, Metric, TokenAccuracy, Top1, TopK
from optkit.tunable import Tunable

OutputKind: TypeAlias = Literal["logits", "values"]

_CLASSIFIES = (Top1, TopK, F1, TokenAccuracy, Agreement)


class Training(Strict):
    """How a model is trained."""

    epochs: int = Field(default=10, ge=1)
    """How often every training sample is seen."""
    minutes: float | None = Field(default=None, gt=0)
    """Stop after so long, if that is sooner; the schedule then ends with the time. It makes runs differ."""
    samples: int | None = Field(default=None, ge=1)
    """How many samples of the training split, held-out ones included; all if not given."""
    batch_size: Annotated[int, Field(ge=1), Tunable(choices=(32, 64, 128, 256))] = 64
    """How many samples make a step; a model with a static batch takes its own size."""
    held_out: float = Field(default=0.1, ge=0, lt=1)
    """The part of the training samples that only judges: the best epoch by the data's metric wins. With 0 the last.
    Weights that came in and are clearly better than those of every epoch stay."""
    optimizer: Annotated[Literal["adamw", "sgd"], Tunable()] = "adamw"
    learning_rate: Annotated[float, Field(gt=0), Tunable(low=1e-5, high=1e-1, log=True)] = 1e-3
    """At its highest, after the warm-up."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Of ``sgd``, after Nesterov."""
    weight_decay: Annotated[float, Field(ge=0), Tunable(low=1e-6, high=1e-2, log=True)] = 1e-4
    """Not of biases, norms and scales."""
    schedule: Annotated[Literal["cosine", "constant"], Tunable()] = "cosine"
    """After the warm-up: down to zero along half a cosine, or no change."""
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """The part of all steps in which the learning rate rises from zero."""
    clip: float | None = Field(default=None, gt=0)
    """The largest norm of all gradients together; larger ones are scaled down."""
    patience: int | None = Field(default=None, ge=1)
    """Stop when so many epochs in a row were not better than the best one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` is the GPUs if there are any: each batch is shared out among all of them."""
    amp: bool = True
    """Mixed precision on a GPU: bfloat16 where it has that, else float16 with scaled losses."""
    channels_last: bool = True
    """On a GPU, images with the channels last, as its kernels for half precision like them."""
    readers: int = Field(default=8, ge=1)
    """Threads that make batches for a GPU, as many as there are cores at most; on the CPU it is one."""
    save_every: float = Field(default=60.0, ge=0)
    """Seconds between two saves of the state that an interrupted run goes on from; 0 is after every step."""

    @model_validator(mode="after")
    def _check(self) -> Training:
        if self.patience is not None and self.held_out == 0:
            raise ValueError("patience needs samples to judge by: set held_out")
        return self

    def learning_rate_at(self, progress: float, step: float) -> float:
        """The learning rate when the part ``progress`` of the run is over, whose steps are the part ``step`` of it."""
        if progress < self.warmup:
            return self.learning_rate * min(1.0, (progress + step) / self.warmup)
        if self.schedule == "constant":
            return self.learning_rate
        over = (min(progress, 1.0) - self.warmup) / (1 - self.warmup)
        return self.learning_rate * (1 + math.cos(math.pi * over)) / 2


def _same_names(value: Any) -> Any:
    """Let a recipe list the modules whose names are the same in student and teacher."""
    return {name: name for name in value} if isinstance(value, (list, tuple)) else value


class Objective(Strict):
    """What the student learns: the weighted sum of up to three terms.

    ``labels`` is the cross entropy with the labels, or for outputs that are values the squared error. ``outputs`` is
    the distance to the teacher's outputs: for logits ``T^2 KL(softmax(t / T) || softmax(s / T))`` (Hinton et al. 2015),
    for values the squared error over the teacher's power. ``features`` is the latter for the outputs of inner modules,
    the student's projected to the teacher's width where that differs (Romero et al. 2015).
    """

    labels: Annotated[float | None, Field(ge=0)] = None
    """Weight of the labels; if not given 0.3, without a teacher 1, and 0 where the data have none."""
    outputs: Annotated[float, Field(ge=0), Tunable(low=0.1, high=1.0)] = 0.7
    """Weight of the teacher's outputs."""
    temperature: Annotated[float, Field(gt=0), Tunable(low=1.0, high=8.0)] = 4.0
    """``T``, by which logits are divided: the higher, the more the small ones count."""
    kind: OutputKind | Literal["auto"] = "auto"
    """What outputs are; ``auto`` takes the one that a metric of classes looks at for logits, and others for values."""
    features: Annotated[dict[str, str], BeforeValidator(_same_names)] = Field(default_factory=dict)
    """Modules of the student and of the teacher whose outputs are matched; a list where the names are the same."""
    feature_weight: Annotated[float, Field(ge=0), Tunable(low=0.1, high=10.0, log=True)] = 1.0

    def weights(self, taught: bool, labelled: bool) -> dict[str, float]:
        """The weight of each term that counts, with a teacher or without, with labels or without."""
        labels = self.labels if self.labels is not None else ((0.3 if taught else 1.0) if labelled else 0.0)
        terms = {"labels": labels}
        if taught:
            terms["outputs"] = self.outputs
            terms["features"] = self.feature_weight if self.features else 0.0
        return {name: weight for name, weight in terms.items() if weight > 0}

    def kind_of(self, output: str, first: str, metric: Metric) -> OutputKind:
        """What an output is; ``first`` is the name of the first one."""
        if self.kind != "auto":
            return self.kind
        return "logits" if isinstance(metric, _CLASSIFIES) and output == judged(metric, first) else "values"


def judged(metric: Metric, first: str) -> str:
    """The output that a metric looks at and that labels belong to."""
    return getattr(metric, "output", None) or first
