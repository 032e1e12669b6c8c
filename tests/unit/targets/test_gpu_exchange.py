"""What an exchange does with its buffers, on a driver whose device memory is the host's; tests/gpu has the real one."""

from __future__ import annotations

import contextlib
import ctypes
from typing import Any

import numpy as np
import pytest

from optkit.errors import UsageError
from optkit.models import Signature, TensorSpec
from optkit.targets import gpu_exchange
from optkit.targets.arrays import lies_on_gpu
from optkit.targets.gpu_exchange import Exchange, GpuArray, RunError
from optkit.targets.worker.gpu import CudaError

SIGNATURE = Signature(
    (TensorSpec("x", "float32", ("n", 2)), TensorSpec("z", "float32", ("n",))),
    (TensorSpec("y", "float32", ("n", 2)),),
)


class Driver:
    """As much of ``Cuda`` as an exchange asks for."""

    def __init__(self, bindings: bool = True) -> None:
        self.memory: dict[int, Any] = {}
        self.opened: list[int] = []

    def make_current(self) -> None: ...

    def synchronize(self, stream: int) -> None: ...

    def allocate(self, size: int) -> int:
        block = ctypes.create_string_buffer(max(size, 1))
        self.memory[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def free(self, pointer: int) -> None:
        del self.memory[pointer]

    def to_device(self, pointer: int, host: int, size: int, stream: int) -> None:
        ctypes.memmove(pointer, host, size)

    def copy(self, into: int, source: int, size: int, context: int | None = None) -> None:
        ctypes.memmove(into, source, size)

    def open_handle(self, handle: bytes) -> int:
        self.opened.append(int.from_bytes(handle, "big"))
        return self.opened[-1]

    def close_handle(self, pointer: int) -> None:
        self.opened.remove(pointer)


class Engine:
    """A worker whose engine gives ``y = x + z``."""

    def __init__(self, kind: str = "float32") -> None:
        self.kind, self.arrays, self.asked, self.refusal = kind, {}, [], None

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(request["do"])
        if self.refusal:
            return {"error": "refused", "text": self.refusal}
        if request["do"] == "run_shared":
            self.arrays["y"][...] = self.arrays["x"] + self.arrays["z"][:, None]
            return {}
        shapes = {**request["shapes"], "y": request["shapes"]["x"]}
        self.arrays = {name: np.zeros(shape, self.kind) for name, shape in shapes.items()}
        return {"buffers": {name: self._told(array) for name, array in self.arrays.items()}}

    @staticmethod
    def _told(array: np.ndarray) -> dict[str, Any]:
        handle = array.ctypes.data.to_bytes(8, "big").hex()
        return {"dtype": array.dtype.name, "shape": list(array.shape), "bytes": array.nbytes, "handle": handle}


@pytest.fixture
def driver(monkeypatch):
    made = Driver()

    @contextlib.contextmanager
    def settled(told: dict[str, Any]):
        yield told["data"][0], 0

    def to_host(told: dict[str, Any]) -> np.ndarray:
        array = np.empty(told["shape"], told["typestr"])
        ctypes.memmove(array.ctypes.data, told["data"][0], array.nbytes)
        return array

    monkeypatch.setattr(gpu_exchange, "Cuda", lambda bindings: made)
    monkeypatch.setattr(gpu_exchange.cuda, "settled", settled)
    monkeypatch.setattr(gpu_exchange.cuda, "to_host", to_host)
    return made


def on_gpu(exchange: Exchange, array: np.ndarray) -> GpuArray:
    return exchange.upload(array.astype(np.float32))


def feeds(exchange: Exchange, n: int) -> dict[str, Any]:
    """One on the GPU, one in host memory."""
    return {"x": on_gpu(exchange, np.arange(2 * n).reshape(n, 2)), "z": np.full(n, 10, np.float32)}


def test_gives_arrays_on_the_gpu_that_outlast_the_next_call(driver):
    engine = Engine()
    exchange = Exchange(SIGNATURE, engine)
    given = [exchange.run(feeds(exchange, n))["y"] for n in (3, 3, 5)]
    assert engine.asked == ["share", "run_shared", "run_shared", "share", "run_shared"]
    for n, y in zip((3, 3, 5), given, strict=True):
        assert lies_on_gpu(y) and y.shape == (n, 2) and repr(y) == f"GpuArray(float32[{n},2])"
        np.testing.assert_array_equal(y, np.arange(2 * n).reshape(n, 2) + 10)
    assert len(driver.opened) == 3
    exchange.close()
    assert driver.opened == []
    del given, y
    assert driver.memory == {}


def test_refuses_feeds_before_anything_is_copied(driver):
    engine = Engine()
    exchange = Exchange(SIGNATURE, engine)
    with pytest.raises(UsageError, match=r"input 'z': float32\[n\] is wanted, not float32\[4\], and n is 3 in 'x'"):
        exchange.run({**feeds(exchange, 3), "z": np.zeros(4, np.float32)})
    with pytest.raises(UsageError, match="input 'x' is missing"):
        exchange.run({"z": on_gpu(exchange, np.zeros(3))})
    assert engine.asked == []


def test_says_that_the_engine_has_other_types(driver):
    exchange = Exchange(SIGNATURE, Engine("float16"))
    with pytest.raises(CudaError, match="the engine has 'x' in float16"):
        exchange.run(feeds(exchange, 2))
    assert driver.opened == []


def test_hands_on_what_the_worker_refused_and_lays_out_anew(driver):
    engine = Engine()
    exchange = Exchange(SIGNATURE, engine)
    exchange.run(feeds(exchange, 2))
    engine.refusal = "no optimization profile"
    with pytest.raises(RunError, match="no optimization profile"):
        exchange.run(feeds(exchange, 3))
    engine.refusal = None
    np.testing.assert_array_equal(exchange.run(feeds(exchange, 2))["y"], [[10, 11], [12, 13]])
    assert engine.asked == ["share", "run_shared", "share", "share", "run_shared"]


def test_an_array_on_the_gpu_becomes_numpy_only_by_a_copy(driver):
    array = on_gpu(Exchange(SIGNATURE, Engine()), np.arange(4))
    assert array.get().tolist() == [0, 1, 2, 3]
    assert np.asarray(array, np.int64).dtype == np.int64
    with pytest.raises(ValueError, match="without a copy"):
        np.array(array, copy=False)
