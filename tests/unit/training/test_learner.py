"""The objective: each term against its formula written out in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from optkit.metrics import Cosine, Spearman, TokenAccuracy, Top1
from optkit.models import Signature, TensorSpec
from optkit.training import Objective
from optkit.training.hardware import Hardware
from optkit.training.hooks import NO_HOOKS
from optkit.training.learner import Learner, relative_error, softened

CPU = Hardware(torch.device("cpu"))


class Gives(nn.Module):
    """Whatever it is told, from a parameter, so that there is a gradient."""

    def __init__(self, *outputs: np.ndarray[Any, Any]) -> None:
        super().__init__()
        self.outputs = [torch.from_numpy(output) for output in outputs]
        self.one = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> Any:
        return tuple(out * self.one if out.is_floating_point() else out for out in self.outputs)


def arrays(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def log_softmax(values: np.ndarray[Any, Any], axis: int = -1) -> np.ndarray[Any, Any]:
    values = values.astype(np.float64)
    return values - np.log(np.exp(values).sum(axis, keepdims=True))


def losses(
    objective: Objective, metric: Any, student: nn.Module, teacher: nn.Module | None, labels: Any
) -> list[float]:
    """The loss and its terms."""
    specs = [TensorSpec(f"out{i}", "float32", tuple(out.shape)) for i, out in enumerate(student.outputs)]
    signature = Signature((TensorSpec("x", "float32", ("batch", 1)),), tuple(specs))
    learner = Learner(student, teacher, signature, objective, metric, NO_HOOKS, labels is not None, CPU)
    given = learner((torch.zeros(4, 1),), None if labels is None else torch.from_numpy(labels))
    assert given.shape == (1, 1 + len(learner.weights))
    return given[0].tolist()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("shape", [(4, 5), (4, 3, 5)])
def test_softened_logits(temperature, shape):
    student, teacher = arrays(*shape), arrays(*shape, seed=1)
    p, q = log_softmax(teacher / temperature), log_softmax(student / temperature)
    expected = temperature**2 * (np.exp(p) * (p - q)).sum(-1).mean()
    assert softened(torch.from_numpy(student), torch.from_numpy(teacher), temperature) == pytest.approx(
        expected, rel=1e-5
    )
    assert softened(torch.from_numpy(student), torch.from_numpy(student), temperature) == pytest.approx(0, abs=1e-6)


def test_the_relative_error_is_the_inverse_of_the_sqnr_whatever_the_size():
    student, teacher = arrays(4, 7), arrays(4, 7, seed=1)
    expected = ((student - teacher) ** 2).sum() / (teacher**2).sum()
    for size in (1.0, 1e-4, 1e4):
        found = relative_error(torch.from_numpy(size * student), torch.from_numpy(size * teacher))
        assert found == pytest.approx(expected, rel=1e-5)


def test_the_loss_is_the_weighted_sum_of_its_terms():
    student, teacher = arrays(4, 5), arrays(4, 5, seed=1)
    labels = np.array([0, 4, 2, 2])
    loss, hard, soft = losses(Objective(labels=0.3, outputs=0.7), Top1(), Gives(student), Gives(teacher), labels)
    assert hard == pytest.approx(-log_softmax(student)[np.arange(4), labels].mean(), rel=1e-5)
    assert soft == pytest.approx(float(softened(torch.from_numpy(student), torch.from_numpy(teacher), 4.0)), rel=1e-5)
    assert loss == pytest.approx(0.3 * hard + 0.7 * soft, rel=1e-5)


def test_tokens_that_are_padding_count_in_neither_term():
    student, teacher = arrays(4, 3, 5), arrays(4, 3, 5, seed=1)
    labels = np.random.default_rng(2).integers(0, 5, (4, 3))
    labels[:, 2] = -1
    metric = TokenAccuracy(ignore=-1)
    _, hard, soft = losses(Objective(), metric, Gives(student), Gives(teacher), labels)
    kept = losses(Objective(), metric, Gives(student[:, :2]), Gives(teacher[:, :2]), labels[:, :2])
    assert [hard, soft] == pytest.approx(kept[1:], rel=1e-5)


def test_the_classes_of_images_are_in_axis_one():
    student = arrays(4, 3, 2, 2)
    labels = np.random.default_rng(2).integers(0, 3, (4, 2, 2))
    _, hard = losses(Objective(outputs=0, kind="logits"), Top1(), Gives(student), None, labels)
    expected = -np.take_along_axis(log_softmax(student, 1), labels[:, None], axis=1).mean()
    assert hard == pytest.approx(expected, rel=1e-5)


def test_only_the_output_that_the_metric_judges_is_logits_and_integers_teach_nothing():
    mine, its = (arrays(4, 5), arrays(4, 2)), (arrays(4, 5, seed=1), arrays(4, 2, seed=1))
    labels = np.array([0, 1, 1, 0])
    chosen = np.zeros(4, np.int64)
    _, hard, soft = losses(Objective(), Top1(output="out1"), Gives(*mine, chosen), Gives(*its, chosen), labels)
    assert hard == pytest.approx(-log_softmax(mine[1])[np.arange(4), labels].mean(), rel=1e-5)
    value = float(relative_error(torch.from_numpy(mine[0]), torch.from_numpy(its[0])))
    logits = float(softened(torch.from_numpy(mine[1]), torch.from_numpy(its[1]), 4.0))
    assert soft == pytest.approx((value + logits) / 2, rel=1e-5)


def test_values_are_learnt_by_the_squared_error():
    student, labels = arrays(4, 1), arrays(4, seed=1)
    _, hard = losses(Objective(), Spearman(), Gives(student), None, labels)
    assert hard == pytest.approx(((student[:, 0] - labels) ** 2).mean(), rel=1e-5)


@pytest.mark.parametrize(
    ("objective", "taught", "labelled", "weights"),
    [
        (Objective(), True, True, {"labels": 0.3, "outputs": 0.7}),
        (Objective(), True, False, {"outputs": 0.7}),
        (Objective(), False, True, {"labels": 1.0}),
        (Objective(features=["a"]), False, True, {"labels": 1.0}),
        (Objective(features=["a"], outputs=0), True, True, {"labels": 0.3, "features": 1.0}),
        (Objective(labels=0), False, True, {}),
    ],
)
def test_what_counts_depends_on_what_there_is(objective, taught, labelled, weights):
    assert objective.weights(taught, labelled) == weights


@pytest.mark.parametrize(
    ("mine", "its"),
    [
        ((4, 3, 8, 8), (4, 5, 8, 8)),
        ((4, 3, 8, 8), (4, 5, 4, 4)),
        ((4, 7, 3), (4, 7, 5)),
        ((4, 3, 7), (4, 5, 7)),
        ((4, 3), (4, 9)),
    ],
)
def test_features_are_projected_to_the_teachers_shape(mine, its):
    class Net(nn.Module):
        def __init__(self, shape: tuple[int, ...]) -> None:
            super().__init__()
            self.inner = nn.Identity()
            self.feature = nn.Parameter(torch.from_numpy(arrays(*shape)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(self.feature).reshape(4, -1)[:, :2]

    signature = Signature((TensorSpec("x", "float32", ("batch", 1)),), (TensorSpec("y", "float32", ("batch", 2)),))
    objective = Objective(features=["inner"], outputs=0)
    torch.manual_seed(0)
    learner = Learner(Net(mine), Net(its).requires_grad_(False), signature, objective, Cosine(), NO_HOOKS, False, CPU)
    learner.fit((torch.zeros(4, 1),))
    loss = learner((torch.zeros(4, 1),), None)[0, 0]
    loss.backward()
    assert torch.isfinite(loss) and loss > 0
    assert all(weight.grad is not None for _, weight in learner.trained())


@pytest.mark.parametrize("left_out", [0, 1])
def test_labels_that_were_looked_at_on_the_host_give_the_same_loss(left_out):
    student, teacher = Gives(arrays(4, 5)), Gives(arrays(4, 5, seed=1))
    labels = np.array([0, 4, 2, 1])
    labels[:left_out] = -100
    signature = Signature((TensorSpec("x", "float32", ("batch", 1)),), (TensorSpec("out0", "float32", ("batch", 5)),))
    learner = Learner(student, teacher, signature, Objective(), Top1(), NO_HOOKS, True, CPU)
    asked = learner((torch.zeros(4, 1),), torch.from_numpy(labels)).tolist()
    learner.check_labels(labels)
    assert learner((torch.zeros(4, 1),), torch.from_numpy(labels)).tolist() == asked
    learner.check_labels(np.full(4, -100))  # a batch later all may count again
    learner.check_labels(labels)
    assert learner((torch.zeros(4, 1),), torch.from_numpy(labels)).tolist() == asked
