"""What the worker's session decides without a GPU: which profile takes a shape, and how a failure is told."""

from __future__ import annotations

import numpy as np
import pytest

from optkit.errors import PassError, UsageError
from optkit.models import Signature
from optkit.targets.base import Environment
from optkit.targets.tensorrt_runner import TensorRtRunner, _failure
from optkit.targets.worker.build import RefusalError
from optkit.targets.worker.gpu import CudaError
from optkit.targets.worker.run import _Queue, _Tensors


class Profiles:
    """As much of an engine as is asked for its profiles: least, best and largest shapes by input."""

    def __init__(self, *profiles: dict[str, tuple[tuple[int, ...], ...]]) -> None:
        self._profiles = profiles
        self.num_optimization_profiles = len(profiles)

    def get_tensor_profile_shape(self, name: str, index: int) -> tuple[tuple[int, ...], ...]:
        return self._profiles[index][name]


LONG = {"x": ((1, 3, 8), (1, 3, 8), (1, 3, 64)), "mask": ((1, 8), (1, 8), (1, 64))}
BATCHED = {"x": ((2, 3, 8), (8, 3, 32), (32, 3, 64)), "mask": ((2, 8), (8, 32), (32, 64))}


@pytest.fixture
def queue():
    """A queue of an engine with these profiles; ``number`` tells it from others of the same engine."""

    def make(*profiles: dict[str, tuple[tuple[int, ...], ...]], number: int = 0) -> _Queue:
        made = _Queue.__new__(_Queue)
        made._engine, made._number = Profiles(*profiles), number
        return made

    return make


@pytest.fixture
def tensors():
    made = _Tensors.__new__(_Tensors)
    made.inputs, made.dtypes = ["x", "mask"], {"x": "float32", "mask": "int32"}
    return made


@pytest.mark.parametrize(("batch", "length", "profile"), [(1, 8, 0), (1, 64, 0), (2, 8, 1), (32, 64, 1)])
def test_takes_the_profile_that_fits(queue, batch, length, profile):
    assert queue(LONG, BATCHED)._fitting_profile({"x": (batch, 3, length), "mask": (batch, length)}) == profile


@pytest.mark.parametrize(("number", "profile"), [(0, 1), (1, 2), (2, 2)])
def test_each_queue_takes_a_fitting_profile_of_its_own_while_there_are_any(queue, number, profile):
    shapes = {"x": (8, 3, 8), "mask": (8, 8)}
    assert queue(LONG, BATCHED, BATCHED, number=number)._fitting_profile(shapes) == profile


@pytest.mark.parametrize("shapes", [{"x": (33, 3, 8), "mask": (33, 8)}, {"x": (2, 3, 65), "mask": (2, 65)}])
def test_a_shape_that_no_profile_takes_is_told_with_the_ranges(queue, shapes):
    with pytest.raises(RefusalError) as refusal:
        queue(LONG, BATCHED)._fitting_profile(shapes)
    error = _failure({"error": "refused", "text": str(refusal.value)}, "the log")
    assert isinstance(error, UsageError)
    assert f"takes x {list(shapes['x'])}, mask {list(shapes['mask'])}" in str(error)
    assert "x from [2, 3, 8] to [32, 3, 64]" in str(error) and "widen `dims` in the recipe" in str(error)


def test_refuses_values_that_an_old_engine_cannot_hold(tensors):
    x = np.ones((2, 3, 8), np.float32)
    prepared = tensors.prepared({"x": x, "mask": np.full((2, 8), 7, np.int64)})
    assert prepared["mask"].dtype == np.int32 and (prepared["mask"] == 7).all()
    with pytest.raises(RefusalError, match="'mask' has values that do not fit into the engine's int32"):
        tensors.prepared({"x": x, "mask": np.full((2, 8), 1 << 40)})
    with pytest.raises(RefusalError, match="input 'mask' is missing"):
        tensors.prepared({"x": x})


def test_tells_a_full_gpu_from_other_failures():
    assert CudaError("out of GPU memory", 2).out_of_memory and not CudaError("illegal address", 700).out_of_memory
    full = _failure({"error": "cuda", "text": "out of GPU memory: 9 MB wanted", "out_of_memory": True}, "")
    assert isinstance(full, PassError) and "use a smaller batch, or free memory on the GPU" in str(full)
    other = _failure({"error": "cuda", "text": "cuStreamSynchronize: 700", "out_of_memory": False}, "the last lines")
    assert str(other) == "TensorRT failed to run the engine: cuStreamSynchronize: 700\nthe last lines"


def test_calls_with_transfers_are_told_apart(monkeypatch):
    def ask(self, what, feeds, rounds, transfers):
        assert what == "time"
        return {"settings": {"transfers": transfers}, "arrays": {"seconds": np.full(rounds, 2.0 if transfers else 1.0)}}

    monkeypatch.setattr(TensorRtRunner, "_ask", ask)
    runner = TensorRtRunner.__new__(TensorRtRunner)
    runner.signature, runner.environment = Signature((), (), {}), Environment("H200", "tensorrt 8.5.3", {})
    with runner.with_transfers() as copied:
        assert copied.time({}, 2).tolist() == [2.0, 2.0]
        assert runner.time({}, 3).tolist() == [1.0, 1.0, 1.0]
    assert copied.environment.settings["transfers"] and not runner.environment.settings["transfers"]
