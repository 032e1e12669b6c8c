"""What the worker's session decides without a GPU: which profile takes a shape, and how a failure is told."""

from __future__ import annotations

import numpy as np
import pytest

from optkit.errors import PassError, UsageError
from optkit.targets.tensorrt_runner import _failure
from optkit.targets.worker.build import RefusalError
from optkit.targets.worker.gpu import CudaError
from optkit.targets.worker.run import _Session


class Profiles:
    """As much of an engine as is asked for its profiles: least, best and largest shapes by input."""

    def __init__(self, *profiles: dict[str, tuple[tuple[int, ...], ...]]) -> None:
        self._profiles = profiles
        self.num_optimization_profiles = len(profiles)

    def get_tensor_profile_shape(self, name: str, index: int) -> tuple[tuple[int, ...], ...]:
        return self._profiles[index][name]


@pytest.fixture
def session():
    made = _Session.__new__(_Session)
    made._engine = Profiles(
        {"x": ((1, 3, 8), (1, 3, 8), (1, 3, 64)), "mask": ((1, 8), (1, 8), (1, 64))},
        {"x": ((2, 3, 8), (8, 3, 32), (32, 3, 64)), "mask": ((2, 8), (8, 32), (32, 64))},
    )
    made._inputs, made._dtypes = ["x", "mask"], {"x": "float32", "mask": "int32"}
    return made


@pytest.mark.parametrize(("batch", "length", "profile"), [(1, 8, 0), (1, 64, 0), (2, 8, 1), (32, 64, 1)])
def test_takes_the_profile_that_fits(session, batch, length, profile):
    assert session._fitting_profile({"x": (batch, 3, length), "mask": (batch, length)}) == profile


@pytest.mark.parametrize("shapes", [{"x": (33, 3, 8), "mask": (33, 8)}, {"x": (2, 3, 65), "mask": (2, 65)}])
def test_a_shape_that_no_profile_takes_is_told_with_the_ranges(session, shapes):
    with pytest.raises(RefusalError) as refusal:
        session._fitting_profile(shapes)
    error = _failure({"error": "refused", "text": str(refusal.value)}, "the log")
    assert isinstance(error, UsageError)
    assert f"takes x {list(shapes['x'])}, mask {list(shapes['mask'])}" in str(error)
    assert "x from [2, 3, 8] to [32, 3, 64]" in str(error) and "widen `dims` in the recipe" in str(error)


def test_refuses_values_that_an_old_engine_cannot_hold(session):
    x = np.ones((2, 3, 8), np.float32)
    prepared = session._prepared({"x": x, "mask": np.full((2, 8), 7, np.int64)})
    assert prepared["mask"].dtype == np.int32 and (prepared["mask"] == 7).all()
    with pytest.raises(RefusalError, match="'mask' has values that do not fit into the engine's int32"):
        session._prepared({"x": x, "mask": np.full((2, 8), 1 << 40)})
    with pytest.raises(RefusalError, match="input 'mask' is missing"):
        session._prepared({"x": x})


def test_tells_a_full_gpu_from_other_failures():
    assert CudaError("out of GPU memory", 2).out_of_memory and not CudaError("illegal address", 700).out_of_memory
    full = _failure({"error": "cuda", "text": "out of GPU memory: 9 MB wanted", "out_of_memory": True}, "")
    assert isinstance(full, PassError) and "use a smaller batch, or free memory on the GPU" in str(full)
    other = _failure({"error": "cuda", "text": "cuStreamSynchronize: 700", "out_of_memory": False}, "the last lines")
    assert str(other) == "TensorRT failed to run the engine: cuStreamSynchronize: 700\nthe last lines"
