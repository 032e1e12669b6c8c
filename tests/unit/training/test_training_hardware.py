"""Where a training computes: what a GPU would do with types and layouts, on the CPU."""

from __future__ import annotations

import os
import sys
import threading
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn

from optkit.errors import DataError
from optkit.metrics import Batch, Top1
from optkit.models import Signature, TensorSpec, TorchModel
from optkit.training import Hooks, Objective, Training, train
from optkit.training.hardware import Hardware, hardware_for
from optkit.training.hooks import NO_HOOKS, HookCalls
from optkit.training.learner import Learner
from optkit.training.samples import ahead

LIKE_A_GPU = Hardware(torch.device("cpu"), torch.bfloat16, channels_last=True)
SIGNATURE = Signature(
    (TensorSpec("image", "float32", ("batch", 3, 8, 8)),), (TensorSpec("logits", "float32", ("batch", 4)),)
)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))


def images() -> Batch:
    rng = np.random.default_rng(0)
    return Batch(
        {"image": rng.standard_normal((6, 3, 8, 8)).astype(np.float32)}, rng.integers(0, 4, 6).astype(np.uint8)
    )


def test_images_and_weights_lie_with_the_channels_last_and_come_back_as_they_were():
    module = net()
    before = {name: (value.clone(), value.stride()) for name, value in module.state_dict().items()}
    placed = LIKE_A_GPU.placed(module)
    (image,) = LIKE_A_GPU.inputs(images(), SIGNATURE)
    assert placed[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert image.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_array_equal(image.numpy(), images().feeds["image"])
    for name, value in LIKE_A_GPU.back(placed).state_dict().items():
        assert torch.equal(value, before[name][0]) and value.stride() == before[name][1]


def test_volumes_keep_their_layout():
    module = nn.Conv3d(1, 2, 3)
    assert LIKE_A_GPU.placed(module).weight.is_contiguous()


def test_mixed_precision_comes_near_the_loss_and_the_gradients_of_float32():
    def learnt(hardware: Hardware) -> tuple[float, torch.Tensor]:
        student, teacher = hardware.placed(net()).train(), hardware.placed(net()).eval()
        learner = Learner(student, teacher, SIGNATURE, Objective(features=["2"]), Top1(), NO_HOOKS, True, hardware)
        inputs = hardware.inputs(images(), SIGNATURE)
        learner.fit(inputs)
        losses = learner(inputs, hardware.labels(images()))
        losses[0, 0].backward()
        assert losses.dtype == torch.float32
        return losses.tolist(), student[0].weight.grad

    whole, exact = learnt(Hardware(torch.device("cpu")))
    half, near = learnt(LIKE_A_GPU)
    np.testing.assert_allclose(half, whole, rtol=0.05, atol=0.01)
    assert not torch.equal(exact, near)
    assert nn.functional.cosine_similarity(exact.flatten(), near.flatten(), dim=0) > 0.99


def test_labels_are_int64_or_float32():
    batch = images()
    assert LIKE_A_GPU.labels(batch).dtype == torch.int64
    assert LIKE_A_GPU.labels(Batch(batch.feeds, np.zeros(6))).dtype == torch.float32
    assert LIKE_A_GPU.labels(Batch(batch.feeds, None)) is None
    with pytest.raises(DataError, match=r"a training batch has no input 'image', did you mean 'images'\?"):
        LIKE_A_GPU.inputs(Batch({"images": batch.feeds["image"]}, None), SIGNATURE)


def test_a_processor_reads_in_one_thread_and_pins_nothing():
    batch = images()
    assert LIKE_A_GPU.pinned(batch) is batch
    assert LIKE_A_GPU.readers(Training(readers=4)) == 1
    gpu = Hardware(torch.device("cuda"))
    assert gpu.readers(Training(readers=1)) == 1
    assert gpu.readers(Training(readers=1000)) == os.cpu_count()


def test_convolutions_are_timed_on_a_gpu_where_sizes_stay_and_threads_take_short_turns():
    gpu = Hardware(torch.device("cuda"))
    anysize = Signature((TensorSpec("image", "float32", ("batch", 3, "height", 8)),), SIGNATURE.outputs)
    found, turn, turns = [], sys.getswitchinterval(), []
    for hardware, signature in ((gpu, SIGNATURE), (gpu, anysize), (LIKE_A_GPU, SIGNATURE)):
        with hardware.tuned(signature):
            found.append(torch.backends.cudnn.benchmark)
            turns.append(sys.getswitchinterval() < turn)
        assert not torch.backends.cudnn.benchmark and sys.getswitchinterval() == turn
    assert found == [True, False, False] and turns == [True, True, False]


@pytest.mark.parametrize("depth", [1, 3])
def test_what_is_made_ahead_comes_in_order_until_it_fails(depth):
    def items():
        yield from range(5)
        raise DataError("no more")

    given = ahead(items(), depth)
    assert [next(given) for _ in range(5)] == list(range(5))
    with pytest.raises(DataError, match="no more"):
        next(given)
    assert list(ahead(iter(range(7)), depth)) == list(range(7))


def test_without_a_gpu_or_if_told_so_it_is_the_cpu_in_float32():
    hardware = hardware_for(Training(device="cpu"))
    assert hardware.is_cpu and hardware.half is None and not hardware.channels_last
    assert not hardware.scaler().is_enabled()
    module = net()
    assert hardware.shared(module) is module


@dataclass(frozen=True)
class Pretended(Hardware):
    """A GPU whose memory is the processor's."""

    @property
    def is_cpu(self) -> bool:
        return False


@pytest.mark.parametrize("hooked", [False, True], ids=["pinned by a thread", "pinned after the hook"])
def test_batches_take_the_way_to_a_gpu_and_teach_the_same(taught, student, monkeypatch, hooked):
    pinned: list[str] = []

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(threading.current_thread().name)
        return tensor.clone()

    class Mirrors(Hooks):
        def batch(self, batch, rng):
            return replace(batch, feeds={name: array[::-1] for name, array in batch.feeds.items()})

    def run() -> TorchModel:
        hooks = HookCalls((Mirrors if hooked else Hooks)(taught))
        # Not adamw, which makes as much of the rounding of a gradient that is zero as of a gradient
        settings = Training(epochs=3, batch_size=32, optimizer="sgd", learning_rate=0.03, readers=3)
        return train(student, settings, taught, teacher=taught.original, hooks=hooks)

    there = run()
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr("optkit.training.loop.hardware_for", lambda settings: Pretended(torch.device("cpu")))
    here = run()
    for name, value in there.module.state_dict().items():
        # The optimizer's one kernel rounds in another place
        torch.testing.assert_close(here.module.state_dict()[name], value, rtol=1e-3, atol=1e-4)
    assert here.records["training"]["steps"] == there.records["training"]["steps"]
    beside = [name for name in pinned if name != threading.main_thread().name]
    judged = 4  # once before and after each epoch: 30 held-out points are one batch
    assert len(beside) == judged + (0 if hooked else here.records["training"]["steps"])
