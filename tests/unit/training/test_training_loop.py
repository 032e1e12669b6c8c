"""The training loop: it learns what it is told, changes nothing it was given, and says what is wrong."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from training_nets import SIGNATURE, frozen, net, same

from optkit.errors import DataError, PassError, PreconditionError, UnavailableError
from optkit.metrics import Batch
from optkit.models import Signature, TensorSpec, TorchModel
from optkit.training import Hooks, Objective, Training, train
from optkit.training.hooks import HookCalls

QUICK = Training(epochs=8, batch_size=32, learning_rate=0.03)


def accuracy(model: TorchModel, data: Any) -> float:
    with torch.no_grad():
        right = [
            model.module(torch.from_numpy(batch.feeds["point"])).argmax(1).numpy() == batch.labels
            for batch in data.batches("validation", 50)
        ]
    return float(np.concatenate(right).mean())


@pytest.mark.parametrize(
    "objective",
    [Objective(), Objective(labels=1, outputs=0), Objective(labels=0), Objective(labels=0, kind="values")],
    ids=["both", "labels", "logits", "values"],
)
def test_a_student_learns_from_labels_and_teacher_together_and_from_each_alone(taught, student, objective):
    assert accuracy(student, taught.data) < 0.5
    trained = train(student, QUICK, taught, objective=objective, teacher=taught.original)
    assert accuracy(trained, taught.data) > 0.85
    record = trained.records["training"]
    assert record["score"] > 0.85 > record["score_before"]
    assert len(record["epochs"]) == 8 and record["steps"] == 64
    assert record["training_samples"] == 270 and record["held_out_samples"] == 30


def test_a_student_learns_without_labels_and_without_the_metric_of_classes(points, context, teacher, student):
    data = points(label=None, metric="cosine")
    trained = train(student, QUICK, replace(context, data=data, original=teacher), teacher=teacher)
    assert trained.records["training"]["objective"] == {"outputs": 0.7}
    error = []
    with torch.no_grad():
        for batch in data.batches("validation", 50):
            point = torch.from_numpy(batch.feeds["point"])
            error.append(
                (trained.module(point) - teacher.module(point)).square().sum() / teacher.module(point).square().sum()
            )
    assert torch.stack(error).mean() < 0.1


def test_a_value_is_learnt_from_labels(points, context):
    torch.manual_seed(0)
    signature = replace(SIGNATURE, outputs=(TensorSpec("norm", "float32", ("batch", 1)),))
    model = TorchModel(net(16, 1).eval().requires_grad_(False), signature)
    trained = train(model, QUICK, replace(context, data=points(label="norm", metric="spearman")))
    assert trained.records["training"]["score"] > 0.8


def test_what_was_handed_over_is_not_changed_and_what_comes_back_is_ready(taught, student, teacher):
    before = copy.deepcopy((student.module, teacher.module))
    generator = torch.get_rng_state()
    trained = train(student, QUICK, taught, teacher=teacher)
    assert same(before[0], student.module) and same(before[1], teacher.module)
    assert torch.equal(generator, torch.get_rng_state())
    assert trained.module is not student.module and trained.signature == student.signature
    assert not any(part.training for part in trained.module.modules())
    assert all(not weight.requires_grad and weight.grad is None for weight in trained.module.parameters())
    assert student.records == {}


def test_the_seed_decides_the_weights(taught, student):
    first, again = (train(student, QUICK, taught, teacher=taught.original) for _ in range(2))
    assert same(first.module, again.module)
    other = train(student, QUICK, replace(taught, seed=1), teacher=taught.original)
    assert not same(first.module, other.module)


def test_the_best_epoch_wins(taught, student):
    record = train(student, QUICK, taught, teacher=taught.original).records["training"]
    scores = [epoch["score"] for epoch in record["epochs"]]
    assert record["score"] == max(scores) == scores[record["best_epoch"] - 1]


def test_a_little_loss_of_a_model_that_may_know_the_held_out_samples_is_no_reason_to_stay(taught, teacher):
    trained = train(teacher, Training(epochs=1, batch_size=32, learning_rate=0.3), taught)
    record = trained.records["training"]
    assert record["score_before"] - 1 / 30**0.5 < record["score"] < record["score_before"]
    assert record["best_epoch"] == 1 and not same(trained.module, teacher.module)
    kept = train(teacher, Training(epochs=1, batch_size=32, learning_rate=0.3), taught, start_counts=True)
    assert kept.records["training"]["best_epoch"] == 0 and same(kept.module, teacher.module)


def test_a_model_that_training_ruins_stays_as_it_came_in(taught, teacher, caplog):
    harm = Training(epochs=2, batch_size=32, learning_rate=300.0, optimizer="sgd", momentum=0)
    trained = train(teacher, harm, taught)
    assert same(trained.module, teacher.module)
    assert "training made the model worse (top1 100.00 before, " in caplog.text
    record = trained.records["training"]
    assert record["best_epoch"] == 0 and record["score"] == record["score_before"] == 1.0
    last = train(teacher, harm.model_copy(update={"held_out": 0.0}), taught)
    assert not same(last.module, teacher.module) and last.records["training"]["score"] is None


def test_training_stops_early_when_nothing_gets_better(taught, teacher):
    trained = train(teacher, Training(epochs=9, batch_size=32, patience=2), taught)
    assert len(trained.records["training"]["epochs"]) == 3  # the first cannot be bettered


def test_a_time_budget_ends_the_training_with_the_schedule(taught, student):
    settings = Training(epochs=100000, minutes=5e-3, batch_size=32)
    record = train(student, settings, taught, teacher=taught.original).records["training"]
    assert 0.3 <= record["seconds"] < 10 and record["steps"] < 100000
    assert record["epochs"][-1]["learning_rate"] < settings.learning_rate / 2


def test_no_more_samples_than_wanted(taught, student):
    record = train(student, Training(epochs=1, samples=100, batch_size=16), taught).records["training"]
    assert record["training_samples"] + record["held_out_samples"] == 100


def test_the_learning_rate_rises_and_falls():
    cosine, constant = (
        Training(warmup=0.2, learning_rate=1.0),
        Training(warmup=0.2, learning_rate=1.0, schedule="constant"),
    )
    rates = [cosine.learning_rate_at(step / 10, 0.1) for step in range(11)]
    assert rates[:3] == pytest.approx([0.5, 1.0, 1.0]) and rates[6] == pytest.approx(0.5)
    assert rates[10] == pytest.approx(0.0) and sorted(rates[2:], reverse=True) == rates[2:]
    assert constant.learning_rate_at(0.9, 0.1) == 1.0


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_clipped_gradients_move_the_weights_less(taught, student, optimizer):
    def moved(**changes: Any) -> float:
        settings = Training(
            epochs=1, batch_size=250, held_out=0.1, learning_rate=0.1, warmup=0, optimizer=optimizer, **changes
        )
        start = dict(student.module.named_parameters())
        after = train(student, settings.model_copy(update={"held_out": 0.0}), taught).module
        return sum(float((weight - start[name]).abs().sum()) for name, weight in after.named_parameters())

    assert moved(clip=1e-12, weight_decay=0) < moved(weight_decay=0)


def test_features_of_other_widths_are_projected(taught, student, teacher):
    objective = Objective(labels=0, outputs=0, features={"0": "0", "4": "2"}, feature_weight=2)
    trained = train(student, QUICK, taught, objective=objective, teacher=teacher)
    epochs = trained.records["training"]["epochs"]
    assert epochs[-1]["loss"] < 0.5 * epochs[0]["loss"]
    assert trained.module.state_dict().keys() == student.module.state_dict().keys()
    assert not any(part._forward_hooks for part in trained.module.modules())


def test_pruned_weights_stay_zero(taught, student):
    weight = student.module[4].weight
    with torch.no_grad():
        weight[:, ::2] = 0
    pruned = replace(student, records={"sparsity": {"parameters": {"4.weight": {}}}})
    trained = train(pruned, QUICK, taught, teacher=taught.original)
    after = trained.module[4].weight
    assert torch.equal(after == 0, weight == 0)
    assert not torch.equal(after, weight)
    assert "sparsity" in trained.records


def test_a_model_of_one_batch_size_gets_it(taught, student):
    static = Signature((TensorSpec("point", "float32", (20, 2)),), (TensorSpec("logits", "float32", (20, 4)),))
    record = train(replace(student, signature=static), QUICK, taught).records["training"]
    assert record["batch_size"] == 20 and record["held_out_samples"] == 40


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch.fx, about itself
def test_an_exported_program_learns_with_its_batch_norms_at_rest(taught, student):
    program = torch.export.export(
        student.module, (torch.randn(2, 2),), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=1024)},)
    ).module()
    for part in program.modules():
        part.training = False
    model = TorchModel(program.requires_grad_(False), SIGNATURE)
    trained = train(model, QUICK, taught, teacher=taught.original)
    assert accuracy(trained, taught.data) > 0.8
    assert torch.equal(trained.module.state_dict()["1.running_mean"], student.module[1].running_mean)


def test_progress_tells_loss_and_metric(taught, student):
    told = []

    def progress(items: Any, description: Any, total: Any = None) -> Any:
        for item in items:
            yield item
            told.append(description())

    train(student, Training(epochs=2, batch_size=135), replace(taught, progress=progress), teacher=taught.original)
    assert len(told) == 3  # nobody asks after the last step
    assert told[0].startswith("training, epoch 1 of 2, loss ") and ", top1 " in told[0]


# --- what is wrong ----------------------------------------------------------------------------------------------------


def test_no_data(context, student):
    with pytest.raises(PreconditionError, match=r"training needs training data: add a `data:` section"):
        train(student, QUICK, context)


def test_fewer_samples_than_a_batch(points, context, student):
    data = points(splits={"calibration": {"count": 16}, "training": {"count": 20}, "validation": {"count": 50}})
    with pytest.raises(
        DataError, match=r"18 training samples beside the 2 that are held out, fewer than the 32 of a b"
    ):
        train(student, QUICK, replace(context, data=data))


def test_labels_that_the_data_do_not_have(points, context, student, teacher):
    context = replace(context, data=points(label=None, metric="agreement"))
    with pytest.raises(DataError, match=r"the loss gives labels the weight 0\.5, and the data have none: set `label`"):
        train(student, QUICK, context, objective=Objective(labels=0.5), teacher=teacher)
    with pytest.raises(PreconditionError, match="there is nothing to learn from: no labels and no teacher"):
        train(student, QUICK, context)


def test_labels_that_are_no_classes(points, context, student):
    data = points(label="norm", metric="agreement")
    with pytest.raises(
        DataError, match=r"labels of shape \[32\] \(torch\.float32\) are no classes of the output 'logits'"
    ):
        train(student, QUICK, replace(context, data=data))
    with pytest.raises(DataError, match=r"labels of shape \[32\] do not fit the output 'logits' of shape \[32, 4\]"):
        train(student, QUICK, replace(context, data=data), objective=Objective(kind="values"))


def test_a_label_without_a_class(points, context):
    narrow = replace(SIGNATURE, outputs=(TensorSpec("logits", "float32", ("batch", 2)),))
    model = TorchModel(net(8, 2).eval().requires_grad_(False), narrow)
    with pytest.raises(DataError, match=r"label 2|label [23] is not a class of .*2 classes"):
        train(model, QUICK, replace(context, data=points(metric="agreement")))


def test_a_teacher_with_other_outputs(taught, student):
    with pytest.raises(
        PreconditionError, match=r"the teacher gives the output 'logits' as \[32, 5\] and the student as"
    ):
        train(student, QUICK, taught, teacher=frozen(net(8, 5)))


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"fc": "0"}, r"the student has no module 'fc'; known: 0, 1, 2, 3, 4"),
        ({"0": "22"}, r"the teacher has no module '22'; did you mean '2'\?"),
    ],
)
def test_features_that_do_not_exist(taught, student, teacher, features, message):
    with pytest.raises(PreconditionError, match=message):
        train(student, QUICK, taught, objective=Objective(features=features), teacher=teacher)


def test_features_that_cannot_be_compared_or_were_not_computed(taught, teacher):
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.whole = net(8)
            self.unused = nn.Linear(2, 2)
            self.folded = nn.Unflatten(1, (2, 1))

        def forward(self, point: torch.Tensor) -> torch.Tensor:
            self.folded(point)
            return self.whole(point)

    with pytest.raises(PreconditionError, match=r"the student did not run its module 'unused' as one"):
        train(frozen(Odd()), QUICK, taught, objective=Objective(features={"unused": "0"}), teacher=teacher)
    with pytest.raises(PreconditionError, match=r"'folded' and '0' have the shapes \[32, 2, 1\] and \[32, 4\]: name"):
        train(frozen(Odd()), QUICK, taught, objective=Objective(features={"folded": "0"}), teacher=teacher)


def test_a_loss_that_is_not_a_number(taught, student):
    wild = Training(epochs=3, batch_size=32, learning_rate=1e30, optimizer="sgd", warmup=0)
    with pytest.raises(
        PassError, match=r"the loss is (nan|inf) at step \d+ of 24 with a learning rate of .*e\+\d+.*clip"
    ):
        train(student, wild, taught, teacher=taught.original)


def test_a_model_that_cannot_be_trained(taught, student):
    class Once(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net(8)

        def forward(self, point: torch.Tensor) -> torch.Tensor:
            return self.net(point).detach()

    with pytest.raises(PassError, match=r"the model cannot be trained on a batch of 32: RuntimeError: element 0"):
        train(frozen(Once()), QUICK, taught)
    with pytest.raises(PassError, match=r"cannot be trained on a batch of 1: ValueError: Expected more than 1 value"):
        train(student, Training(batch_size=1), taught)


def test_a_gpu_that_is_not_there(taught, student):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UnavailableError, match="device: cuda, and PyTorch finds no GPU here"):
        train(student, Training(device="cuda"), taught)


def test_a_hook_cannot_take_pruned_weights_away(taught, student):
    class Other(Hooks):
        def student(self, module: nn.Module) -> nn.Module:
            return net(6)

    pruned = replace(student, records={"sparsity": {"parameters": {"4.weight": {}}}})
    with pytest.raises(PreconditionError, match=r"'4\.weight' was pruned, and the hooks' student has none of that"):
        train(pruned, QUICK, taught, hooks=HookCalls(Other(taught)))


def test_a_batch_without_an_input(taught, student):
    class Lost(Hooks):
        def batch(self, batch: Batch, rng: np.random.Generator) -> Batch:
            return Batch({"points": batch.feeds["point"]}, batch.labels)

    with pytest.raises(DataError, match=r"a training batch has no input 'point', did you mean 'points'\?"):
        train(student, QUICK, taught, hooks=HookCalls(Lost(taught)))
