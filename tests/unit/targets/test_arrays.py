from __future__ import annotations

import contextlib
import ctypes
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from optkit.errors import UsageError
from optkit.targets import cuda
from optkit.targets.arrays import as_numpy, lies_on_gpu, on_host
from optkit.targets.onnxruntime import open_onnx

X = np.arange(6, dtype=np.float32).reshape(2, 3)


class GpuArray:
    """What PyCUDA, CuPy and PyTorch show of an array on a GPU; the memory behind it is the host's."""

    def __init__(self, array: np.ndarray, **more: Any) -> None:
        self._array = array
        described = {"shape": array.shape, "typestr": array.dtype.str, "data": (array.ctypes.data, False), "version": 3}
        self.__cuda_array_interface__ = {**described, **more}


class DlpackOnly:
    """An array that speaks DLPack and nothing else."""

    def __init__(self, array: np.ndarray, device: int = 1) -> None:
        self._array, self._device = array, device

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device, 0


class Driver:
    """A driver whose device memory is the host's. It keeps the contexts that are current, as the real one does."""

    def __init__(self, owner: int | None) -> None:
        self.owner, self.contexts, self.log = owner, [7], []

    def __getattr__(self, name: str) -> Any:
        def call(*given: Any) -> int:
            self.log.append(name)
            return 0

        return call

    def cuPointerGetAttribute(self, out: Any, attribute: int, pointer: Any) -> int:
        if attribute == 1 and self.owner is not None:
            out._obj.value = self.owner
        return 0

    def cuDevicePrimaryCtxRetain(self, out: Any, device: Any) -> int:
        self.log.append("retain")
        out._obj.value = 42
        return 0

    def cuCtxPushCurrent_v2(self, context: Any) -> int:
        self.contexts.append(context.value)
        return 0

    def cuCtxPopCurrent_v2(self, out: Any) -> int:
        self.contexts.pop()
        return 0

    def cuMemcpyDtoH_v2(self, to: Any, pointer: Any, size: Any) -> int:
        self.log.append(f"copy in {self.contexts[-1]}")
        ctypes.memmove(to, pointer.value, size.value)
        return 0


@pytest.fixture
def driver(monkeypatch):
    """Put a driver in the place of the real one."""

    def install(owner: int | None = None) -> Driver:
        made = Driver(owner)
        monkeypatch.setattr(cuda.ctypes, "CDLL", lambda name: made)
        return made

    return install


@pytest.mark.parametrize(
    "value",
    [X, X.tolist(), torch.from_numpy(X), torch.from_numpy(X).requires_grad_(), DlpackOnly(X), DlpackOnly(X, device=3)],
    ids=["numpy", "list", "tensor", "tensor in training", "DLPack", "pinned"],
)
def test_takes_what_lies_in_host_memory(value):
    assert not lies_on_gpu(value)
    np.testing.assert_array_equal(as_numpy(value, "x"), X)


def test_shares_the_memory_of_a_tensor():
    tensor = torch.from_numpy(X.copy())
    array = as_numpy(tensor, "x")
    tensor[0, 0] = 9
    assert array[0, 0] == 9


def test_takes_bfloat16():
    array = as_numpy(torch.from_numpy(X).bfloat16(), "x")
    assert array.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(array.astype(np.float32), X)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (object(), "input 'x': a object is no array"),
        ([[1.0], [1.0, 2.0]], "input 'x': a list cannot be read: ValueError"),
        (DlpackOnly(X, device=2), "a DlpackOnly on the GPU without __cuda_array_interface__ cannot be read"),
    ],
)
def test_says_what_is_no_array(value, said):
    with pytest.raises(UsageError, match=said):
        as_numpy(value, "x")


@pytest.mark.parametrize(("owner", "context"), [(5, 5), (None, 42)], ids=["PyCUDA's context", "the primary context"])
def test_reads_the_gpu_in_the_context_that_owns_the_memory(driver, owner, context):
    made = driver(owner)
    value = GpuArray(X, stream=1)
    assert lies_on_gpu(value)
    np.testing.assert_array_equal(on_host({"x": value})["x"], X)
    assert made.log.index("cuStreamSynchronize") < made.log.index(f"copy in {context}")
    assert made.contexts == [7], "the caller's own context is current again"
    assert ("retain" in made.log) is ("cuDevicePrimaryCtxRelease_v2" in made.log) is (owner is None)


def test_waits_for_everything_where_no_stream_is_named(driver):
    made = driver(5)
    as_numpy(GpuArray(X), "x")
    assert made.log.index("cuCtxSynchronize") < made.log.index("copy in 5")


def test_leaves_the_callers_context_after_a_failure(driver, monkeypatch):
    made = driver(5)
    monkeypatch.setattr(made, "cuMemcpyDtoH_v2", lambda *given: 700, raising=False)
    with pytest.raises(UsageError, match=r"input 'x': an array on the GPU cannot be read \(error 700\)"):
        as_numpy(GpuArray(X), "x")
    assert made.contexts == [7]


def test_refuses_an_array_on_the_gpu_that_does_not_lie_in_c_order(driver):
    driver()
    with pytest.raises(UsageError, match="input 'x': an array on the GPU must lie in C order: make it contiguous"):
        as_numpy(GpuArray(X, strides=(4, 8)), "x")


def test_needs_no_driver_for_an_empty_array():
    assert as_numpy(GpuArray(np.empty((0, 3), np.float32)), "x").shape == (0, 3)


def test_says_that_there_is_no_driver():
    with contextlib.suppress(OSError):
        ctypes.CDLL(cuda.LIBRARY)
        pytest.skip("this machine has a driver")
    with pytest.raises(UsageError, match="input 'x': it lies on a GPU, and there is no NVIDIA driver"):
        as_numpy(GpuArray(X), "x")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (
            GpuArray(X),
            r"input 'x': it lies on a GPU, and this engine runs on the CPU: hand over .* x.cpu\(\) in PyTorch",
        ),
        (DlpackOnly(X, device=2), "input 'x': it lies on a GPU"),
        (torch.from_numpy(X), "input 'x': a Tensor is no NumPy array"),
    ],
    ids=["GPU", "GPU by DLPack", "tensor"],
)
def test_a_runner_on_the_cpu_says_what_it_does_not_take(onnx_model, value, said):
    with (
        open_onnx(onnx_model("g (float[2,3] x) => (float[2,3] y) { y = Relu(x) }")) as runner,
        pytest.raises(UsageError, match=said),
    ):
        runner.run({"x": value})
