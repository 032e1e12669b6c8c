"""Distillation where PyTorch sees a GPU: mixed precision, an interruption, and a batch shared out among two."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from optkit.context import Context
from optkit.data import open_data
from optkit.errors import PassError
from optkit.models import Signature, TensorSpec, TorchModel
from optkit.passes.distill import Distill
from optkit.training import Hooks, Parts, State, Training, train
from optkit.training.hooks import HookCalls

# PyTorch warns about the GPUs and drivers of machines that nobody can choose
pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("default")]

DEVICE = "cuda"
SIGNATURE = Signature(
    (TensorSpec("image", "float32", ("batch", 3, 16, 16)),), (TensorSpec("logits", "float32", ("batch", 3)),)
)
SETTINGS = Training(device=DEVICE, epochs=4, batch_size=32, learning_rate=0.03, clip=1.0, held_out=0.2)
STEPS = 4 * 7  # 240 of 300 samples, in batches of 32


class Pale(nn.Module):
    """Right without training: the channel with the largest mean."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return 10 * image.mean((2, 3))


def student() -> TorchModel:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    return TorchModel(net.eval().requires_grad_(False), SIGNATURE)


@pytest.fixture
def taught(context: Context, tmp_path: Path) -> Context:
    """Images whose class is the channel that is brightest, and a teacher that sees it."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 400)
    images = rng.standard_normal((400, 3, 16, 16)).astype(np.float32)
    images[np.arange(400), labels] += 0.5
    np.savez(tmp_path / "images.npz", image=images, label=labels)
    document = {
        "source": {"kind": "npz", "path": "images.npz"},
        "splits": {"calibration": {"count": 16}, "validation": {"count": 100}},
        "inputs": {"image": "image"},
        "label": "label",
        "metric": "top1",
    }
    (tmp_path / "images.yaml").write_text(yaml.safe_dump(document))
    teacher = TorchModel(Pale().eval(), SIGNATURE)
    return replace(context, data=open_data(tmp_path / "images.yaml"), original=teacher)


@pytest.mark.parametrize("amp", [True, False], ids=["half", "float"])
def test_the_loss_falls_and_the_model_comes_back_to_the_cpu(taught: Context, amp: bool) -> None:
    model = student()
    before = copy.deepcopy(model.module.state_dict())
    trained = Distill(train=SETTINGS.model_copy(update={"amp": amp})).run(model, taught)
    record = trained.records["distill"]
    first, *_, last = (epoch["loss"] for epoch in record["epochs"])
    assert record["device"] == DEVICE and record["steps"] == STEPS
    assert last < first / 2
    assert record["score"] > record["score_before"] and record["score"] > 0.9
    for name, value in trained.module.state_dict().items():
        assert value.device.type == "cpu" and value.isfinite().all()
        assert torch.equal(before[name], model.module.state_dict()[name])
    assert trained.module[0].weight.is_contiguous()


def test_batches_that_a_hook_changes_arrive_as_it_left_them(taught: Context) -> None:
    plain, changed = [], []

    class Turned(Hooks):
        """Views of what was read, which must not be overwritten while the GPU fetches them."""

        def batch(self, batch, rng):
            flipped = batch.feeds["image"][::-1, :, :, ::-1]
            changed.append(flipped.sum(dtype=np.float64))
            return replace(batch, feeds={"image": flipped}, labels=batch.labels[::-1])

        def loss(self, parts: Parts, loss: torch.Tensor) -> torch.Tensor:
            plain.append(parts.inputs[0].double().sum())
            return loss

    train(student(), SETTINGS, taught, teacher=taught.original, hooks=HookCalls(Turned(taught)))
    # With several GPUs each sums up its share, so one step has several sums
    sums = torch.stack([value.cpu() for value in plain]).reshape(len(changed), -1).sum(1)
    np.testing.assert_allclose(sums.numpy(), changed, rtol=1e-6, atol=1e-6)


def test_every_image_arrives_once_in_an_epoch(taught: Context) -> None:
    seen: list[torch.Tensor] = []

    class Sees(Hooks):
        def loss(self, parts: Parts, loss: torch.Tensor) -> torch.Tensor:
            seen.append(parts.inputs[0].double().sum((1, 2, 3)))
            return loss

    settings = SETTINGS.model_copy(update={"epochs": 1, "held_out": 0.0, "batch_size": 50})
    train(student(), settings, taught, teacher=taught.original, hooks=HookCalls(Sees(taught)))
    assert taught.data is not None  # the fixture gave it
    samples = taught.data.training()
    (batch,) = samples.batches(range(300), 300)
    expected = np.sort(batch.feeds["image"].sum((1, 2, 3), dtype=np.float64))
    np.testing.assert_allclose(np.sort(torch.cat([part.cpu() for part in seen]).numpy()), expected, rtol=1e-6)


def test_a_run_that_was_broken_off_goes_on(taught: Context, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"save_every": 0.0, "held_out": 0.0})  # so the last weights count
    resuming = replace(taught, resume=tmp_path / "state")
    steps: list[int] = []

    class Fails(Hooks):
        def on_step(self, state: State) -> None:
            if state.step == 13:
                raise PassError("enough")

    class Counts(Hooks):
        def on_step(self, state: State) -> None:
            steps.append(state.step)

    def run(context: Context, hooks: Hooks) -> TorchModel:
        return train(student(), settings, context, teacher=context.original, hooks=HookCalls(hooks))

    with pytest.raises(PassError, match="enough"):
        run(resuming, Fails(resuming))
    resumed = run(resuming, Counts(resuming))
    assert steps == list(range(13, 4 * 9 + 1))
    whole = run(taught, Hooks(taught))
    start, again, once = (
        torch.cat([weight.flatten() for weight in model.module.parameters()]) for model in (student(), resumed, whole)
    )
    # A GPU adds in another order each time; what a lost momentum or other batches would do is far more
    assert (again - once).norm() < 0.05 * (once - start).norm()


def test_all_gpus_share_every_batch(taught: Context) -> None:
    count = torch.cuda.device_count()
    if count < 2:
        pytest.skip("PyTorch sees one GPU")
    devices: set[tuple[int, int]] = set()

    class Looks(Hooks):
        def loss(self, parts: Parts, loss: torch.Tensor) -> torch.Tensor:
            devices.add((parts.inputs[0].get_device(), len(parts.inputs[0])))
            return loss

    trained = train(student(), SETTINGS, taught, teacher=taught.original, hooks=HookCalls(Looks(taught)))
    assert {device for device, _ in devices} == set(range(count))
    assert all(size < SETTINGS.batch_size for _, size in devices)
    assert trained.records["training"]["score"] > 0.9
