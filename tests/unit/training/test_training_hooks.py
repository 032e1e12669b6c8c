"""Hooks of the user's: what they may change, and what is said of those that are wrong."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import optkit
from optkit.context import Context
from optkit.errors import CheckpointError, UsageError
from optkit.models import TorchModel
from optkit.training import Training, load_hooks, train

QUICK = Training(epochs=2, batch_size=90, learning_rate=0.01)

HEADER = """
import numpy as np
import torch
from torch import nn

import optkit.errors
import beside
from optkit.data import Batch


class Mine(optkit.Hooks):
"""


def run(text: str, folder: Path, model: TorchModel, context: Context) -> TorchModel:
    """Train with a class ``Mine`` of these methods."""
    (folder / "beside.py").write_text("SCALE = 2.0\n")
    (folder / "hooks.py").write_text(HEADER + "".join(f"    {line}\n" for line in text.strip("\n").splitlines()))
    hooks = load_hooks(f"{folder / 'hooks.py'}:Mine", context)
    return train(model, QUICK, context, teacher=context.original, hooks=hooks)


def test_hooks_may_replace_student_loss_and_data_and_see_every_event(tmp_path, student, taught):
    trained = run(
        """
def student(self, module):
    import beside  # a file next to the hooks, imported when it is needed
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4 * int(beside.SCALE)), nn.ReLU(), nn.Linear(8, 4))

def teacher(self, module):
    self.log = [f"teacher {len(list(module.parameters()))}"]
    return module

def data(self, samples):
    class Half:
        def __len__(self):
            return len(samples) // 3
        def batches(self, positions, size, skip=0):
            return samples.batches([3 * position for position in positions], size, skip)
    return Half()

def batch(self, batch, rng):
    point = batch.feeds["point"]
    return Batch({"point": point + rng.normal(0, 1e-3, point.shape).astype(point.dtype)}, batch.labels)

def loss(self, parts, loss):
    assert set(parts.terms) == {"labels", "outputs"} and parts.outputs["logits"].requires_grad
    assert not parts.teacher["logits"].requires_grad and parts.labels.shape == (90,) and len(parts.inputs) == 1
    return loss + 0.1 * parts.outputs["logits"].square().mean()

def on_step(self, state):
    self.log.append(f"step {state.step} of {state.steps}")

def on_epoch(self, state):
    self.log.append(f"epoch {state.epoch} {state.score >= 0} {state.best >= 0}")

def on_end(self, state):
    (self.context.scratch / "log").write_text("; ".join(self.log))
    with torch.no_grad():
        state.student[2].bias.fill_(7)
""",
        tmp_path,
        student,
        taught,
    )
    assert trained.records["training"]["training_samples"] == 90
    assert [type(part).__name__ for part in trained.module] == ["Linear", "ReLU", "Linear"]
    assert trained.module[2].bias.tolist() == [7, 7, 7, 7]
    log = (taught.scratch / "log").read_text()
    assert log == "teacher 3; step 1 of 2; epoch 1 True True; step 2 of 2; epoch 2 True True"


@pytest.mark.parametrize(("event", "steps"), [("on_step", 1), ("on_epoch", 3)])
def test_a_hook_may_end_the_training(tmp_path, student, taught, event, steps):
    trained = run(f"def {event}(self, state): return True", tmp_path, student, taught)
    assert trained.records["training"]["steps"] == steps


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def loss(self, parts, loss): return None", r"loss \(.*hooks\.py:12\) must return a tensor .* nothing"),
        ("def loss(self, parts, loss): return parts.outputs['logits']", r"loss .* it returned Tensor \[90, 4\]"),
        ("def loss(self, parts, loss): return torch.tensor(1.0)", r"loss .* depends on the student's outputs, and it"),
        ("def loss(self, parts, loss): return 1 / 0", r"loss failed: ZeroDivisionError: .*hooks\.py:12: `def"),
        ("def student(self, module): pass", r"student \(.*hooks\.py:12\) must return a torch\.nn\.Module, .* nothing"),
        ("def teacher(self, module): return 'resnet'", r"teacher .* must return a torch\.nn\.Module, .* str 'resnet'"),
        ("def data(self, samples): return []", r"data .* must return an object with __len__ .* returned list"),
        ("def batch(self, batch, rng): return batch.feeds", r"batch .* must return an optkit\.data\.Batch .* dict"),
        ("def on_step(self, state): return 3", r"on_step .* must return None, or True to end the training, .* int 3"),
        ("def on_epoch(self, state): raise KeyError('x')", r"on_epoch failed: KeyError: 'x' at .*hooks\.py:12"),
        ("def on_end(self, state): state.nothing", r"on_end failed: AttributeError: 'State' object has no attribute"),
        ("def state_dict(self): return 1", r"state_dict .* must return a dict, and it returned int 1"),
    ],
)  # fmt: skip
def test_a_hook_that_fails_or_returns_nonsense_is_named_with_its_line(tmp_path, student, taught, text, message):
    with pytest.raises(UsageError, match=rf"hooks .*hooks\.py:Mine: {message}"):
        run(text, tmp_path, student, replace(taught, resume=tmp_path / "state"))


def test_data_of_a_hook_that_fail_on_the_way_are_the_hooks(tmp_path, student, taught):
    text = """
def data(self, samples):
    class Mine:
        def __len__(self):
            return 200
        def batches(self, positions, size, skip=0):
            yield from ({wrong})
    return Mine()
"""
    with pytest.raises(UsageError, match=r"hooks .*: data \(.*\) must return an optkit\.data\.Batch .* returned int 1"):
        run(text.format(wrong="[1, 2, 3]"), tmp_path, student, taught)
    with pytest.raises(UsageError, match=r"data failed: NameError: name 'lost' is not defined at .*hooks\.py:17"):
        run(text.format(wrong="lost"), tmp_path, student, taught)


def test_a_students_other_outputs_are_refused(tmp_path, student, taught):
    with pytest.raises(
        optkit.OptkitError, match=r"the teacher gives the output 'logits' as \[90, 4\] and the student as"
    ):
        run("def student(self, module): return nn.Linear(2, 3)", tmp_path, student, taught)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("class Mine:\n    pass\n", "is no class derived from optkit.Hooks: derive it"),
        ("def Mine(context):\n    pass\n", "is no class derived from optkit.Hooks: derive it"),
        ("import optkit\nclass Other(optkit.Hooks):\n    pass\n", "there is no function 'Mine'"),
        (
            "import optkit\nclass Mine(optkit.Hooks):\n    def on_stp(self, state):\n        pass\n",
            "has a method 'on_stp': did you mean 'on_step'?",
        ),
        (
            "import optkit\nclass Mine(optkit.Hooks):\n    def __init__(self):\n        pass\n",
            "making them failed: TypeError",
        ),
        ("import nowhere\n", "importing it failed: ModuleNotFoundError"),
    ],
)
def test_hooks_that_cannot_be_made(tmp_path, taught, text, message):
    (tmp_path / "hooks.py").write_text(text)
    with pytest.raises(UsageError) as caught:
        load_hooks(f"{tmp_path / 'hooks.py'}:Mine", taught)
    assert message in str(caught.value) and "hooks.py:Mine" in str(caught.value)


def test_an_error_of_optkits_own_passes_through_a_hook(tmp_path, student, taught):
    text = "def on_step(self, state): raise optkit.errors.CheckpointError('as it is')"
    with pytest.raises(CheckpointError, match=r"^as it is$"):
        run(text, tmp_path, student, taught)


def test_a_change_of_the_hooks_file_is_another_training(tmp_path, taught):
    path = tmp_path / "hooks.py"
    path.write_text("import optkit\nclass Mine(optkit.Hooks):\n    pass\n")
    first = load_hooks(f"{path}:Mine", taught).identity
    path.write_text("import optkit\nclass Mine(optkit.Hooks):\n    a = 1\n")
    assert first != load_hooks(f"{path}:Mine", taught).identity
    assert load_hooks(None, taught).identity == ""


def test_hooks_are_a_public_name_that_loads_no_torch():
    code = "import sys, optkit; optkit.Hooks; sys.exit('torch' in sys.modules or 'onnx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
