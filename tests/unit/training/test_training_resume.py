"""An interrupted training comes to the same weights, bit for bit, and states that do not fit are left alone."""

from __future__ import annotations

import copy
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import interrupted
import pytest
import torch
from training_nets import same, write_points

from optkit.context import Context
from optkit.errors import PassError
from optkit.models import TorchModel
from optkit.training import Hooks, State, Training, train
from optkit.training.hooks import HookCalls
from optkit.training.resume import Store, key_of

SHORT = Training(epochs=2, batch_size=32, save_every=0)
STEPS = 8  # an epoch: 270 samples in batches of 32


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked")
def test_a_run_that_is_killed_anywhere_gives_the_same_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_points(tmp_path)
    interrupted.run(tmp_path, tmp_path / "whole.pt", "")
    assert capsys.readouterr().out == "12\n"
    shutil.rmtree(tmp_path / "state")
    # In the first save, within an epoch, before a save has its name, between two epochs, after the last step
    deaths = ["write:1", "step:2", "rename:2", "term:4", "step:7", "step:12"]
    command = [sys.executable, interrupted.__file__, str(tmp_path), str(tmp_path / "killed.pt"), *deaths]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["12", "12", "11", "10", "9", "6", "1"]
    whole, killed = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    assert [path.name.partition("-")[0] for path in (tmp_path / "state").iterdir()] == ["training"]  # and nothing half


@pytest.fixture
def resuming(taught: Context, tmp_path: Path) -> Context:
    return replace(taught, resume=tmp_path / "out.resume")


def broken_off(student: TorchModel, context: Context, settings: Training = SHORT) -> None:
    """Train five steps, then fail."""

    class Fails(Hooks):
        def on_step(self, state: State) -> None:
            if state.step == 6:
                raise PassError("enough")

    with pytest.raises(PassError, match="enough"):
        train(student, settings, context, teacher=context.original, hooks=HookCalls(Fails(context)))


def counted(student: TorchModel, context: Context, settings: Training = SHORT) -> tuple[int, TorchModel]:
    """How many steps a training still had to do, and what came of it."""
    steps: list[int] = []

    class Counts(Hooks):
        def on_step(self, state: State) -> None:
            steps.append(state.step)

    trained = train(student, settings, context, teacher=context.original, hooks=HookCalls(Counts(context)))
    return len(steps), trained


def test_the_same_training_goes_on_and_another_one_does_not(resuming, student, caplog):
    broken_off(student, resuming)
    assert counted(student, resuming)[0] == 2 * STEPS - 5
    assert caplog.text == ""
    (done,) = resuming.resume.iterdir()
    assert done.name.endswith(".done.pt")


@pytest.mark.parametrize(
    "change",
    [
        lambda student, context: (student, context, SHORT.model_copy(update={"learning_rate": 0.5})),
        lambda student, context: (student, replace(context, seed=1), SHORT),
        lambda student, context: (replace(student, module=changed(student.module)), context, SHORT),
        lambda student, context: (student, replace(context, original=student), SHORT),
    ],
    ids=["settings", "seed", "student", "teacher"],
)
def test_a_state_of_another_training_is_left_alone_with_a_warning(resuming, student, caplog, change):
    broken_off(student, resuming)
    student, context, settings = change(student, resuming)
    with caplog.at_level(logging.WARNING):
        assert counted(student, context, settings)[0] == 2 * STEPS
    assert "is the state of a training with other settings, weights or data: it is not used" in caplog.text


def changed(module: torch.nn.Module) -> torch.nn.Module:
    other = copy.deepcopy(module)
    with torch.no_grad():
        next(other.parameters())[0, 0] += 1e-6
    return other


def test_how_often_it_saves_is_no_other_training(resuming, student):
    broken_off(student, resuming)
    assert counted(student, resuming, SHORT.model_copy(update={"save_every": 60.0}))[0] == 2 * STEPS - 5


def test_a_training_that_is_over_is_not_repeated(resuming, student, caplog):
    steps, first = counted(student, resuming)
    again, second = counted(student, resuming)
    assert (steps, again) == (2 * STEPS, 0)
    assert same(first.module, second.module)
    assert first.records == second.records
    # A second training of the same pipeline does not take the first one's state for a stranger's
    counted(second, resuming)
    assert caplog.text == ""


def test_a_damaged_state_is_not_used(resuming, student, caplog):
    broken_off(student, resuming)
    (path,) = resuming.resume.iterdir()
    path.write_bytes(path.read_bytes()[:1000])
    assert counted(student, resuming)[0] == 2 * STEPS
    assert "is damaged" in caplog.text and "the training starts anew" in caplog.text


def test_a_state_runs_no_code(tmp_path: Path):
    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    store = Store(tmp_path, "training", "0")
    torch.save({"step": Payload()}, tmp_path / "training-0.pt")
    assert store.load() is None
    assert not (tmp_path / "ran").exists()


def test_without_a_folder_nothing_is_kept(taught, student, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    train(student, SHORT, taught)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_key_depends_on_every_weight_and_on_their_type():
    one = torch.nn.Linear(2, 2)
    key = key_of({"a": 1}, one)
    assert key == key_of({"a": 1}, one) != key_of({"a": 2}, one)
    assert key != key_of({"a": 1}, one, one) and key != key_of({"a": 1}, one, None)
    assert key != key_of({"a": 1}, changed(one))
    assert key_of({}, one.to(torch.bfloat16)) != key_of({}, one.double())
