"""Arrays on the GPU to and from an engine in a worker process, with no way through host memory.

The worker allocates the engine's inputs and outputs and hands out CUDA IPC handles; here they are opened, so that a
feed is one copy within the GPU away from the engine, and an output one copy away from it. Where the system does not
share GPU memory between processes, or the engine has other types than the signature, arrays go through host memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from optkit.errors import UsageError
from optkit.models import Signature
from optkit.targets import cuda
from optkit.targets.arrays import described, lies_on_gpu
from optkit.targets.base import check_feeds
from optkit.targets.worker.gpu import Cuda, CudaError


class GpuArray:
    """An array that lies on the GPU, which it is freed from with this object.

    ``torch.as_tensor(x, device="cuda")`` and ``cupy.asarray(x)`` share its memory; ``numpy.asarray(x)`` copies it.

    Attributes:
        shape: its sizes; elements lie in C order.
        dtype: NumPy's.
        pointer: where it lies in device memory.
    """

    def __init__(self, gpu: Cuda, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.shape, self.dtype = shape, dtype
        self.pointer = 0
        self._gpu = gpu
        with cuda.kept_context():
            gpu.make_current()
            self.pointer = gpu.allocate(self.nbytes)

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """What PyTorch, CuPy, Numba and JAX take it by; everything that wrote to it has ended."""
        where = {"data": (self.pointer, False), "strides": None, "stream": None}
        return {"shape": self.shape, "typestr": self.dtype.str, **where, "version": 3}

    def get(self) -> np.ndarray[Any, Any]:
        """A copy in host memory, as CuPy and PyCUDA call it."""
        return cuda.to_host(self.__cuda_array_interface__)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        if copy is False:
            raise ValueError("an array on the GPU cannot become one of NumPy without a copy")
        return self.get() if dtype is None else self.get().astype(dtype)

    def __repr__(self) -> str:
        return f"GpuArray({self.dtype}[{','.join(map(str, self.shape))}])"

    def __del__(self) -> None:
        if self.pointer:
            # The driver may be gone at the end of the process
            with contextlib.suppress(Exception), cuda.kept_context():
                self._gpu.make_current()
                self._gpu.free(self.pointer)


class Exchange:
    """The inputs and outputs of an engine in a worker process, open in this one.

    Args:
        signature: the engine's.
        ask: sends the worker a request and gives its reply.

    Raises:
        CudaError: there is no driver or no GPU.
    """

    def __init__(self, signature: Signature, ask: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self._signature, self._ask = signature, ask
        with cuda.kept_context():
            self._gpu = Cuda(bindings=False)
        self._layout: dict[str, list[int]] = {}
        self._buffers: dict[str, tuple[int, tuple[int, ...], int]] = {}
        """By name: where it is, its shape, its bytes."""

    def run(self, feeds: Mapping[str, Any]) -> dict[str, GpuArray]:
        """The outputs of one batch of feeds, some of which lie on the GPU.

        Raises:
            UsageError: a feed is missing, unknown, or not of the signature's dtype and shape.
            CudaError: this engine's memory cannot be shared; or the GPU is full.
            RunError: the engine failed.
        """
        check_feeds(self._signature, {name: _stand_in(value) for name, value in feeds.items()})
        with cuda.kept_context():
            self._gpu.make_current()
            self._lay_out({name: list(np.shape(_stand_in(value))) for name, value in feeds.items()})
            for name, value in feeds.items():
                self._feed(name, value)
            self._asked({"do": "run_shared"})
            return {spec.name: self._taken(spec.name, spec.dtype) for spec in self._signature.outputs}

    def upload(self, array: np.ndarray[Any, Any]) -> GpuArray:
        """An array of host memory, on the GPU."""
        made = GpuArray(self._gpu, array.shape, array.dtype)
        with cuda.kept_context():
            self._gpu.make_current()
            self._write(made.pointer, array)
        return made

    def close(self) -> None:
        """Let go of the worker's memory."""
        with contextlib.suppress(CudaError), cuda.kept_context():
            self._gpu.make_current()
            self._close()

    def _lay_out(self, shapes: dict[str, list[int]]) -> None:
        if shapes == self._layout:
            return
        self._close()
        told = self._asked({"do": "share", "shapes": shapes})["buffers"]
        for spec in (*self._signature.inputs, *self._signature.outputs):
            if told[spec.name]["dtype"] != spec.dtype:
                raise CudaError(f"the engine has {spec.name!r} in {told[spec.name]['dtype']}", 0)
        for name, buffer in told.items():
            pointer = self._gpu.open_handle(bytes.fromhex(buffer["handle"]))
            self._buffers[name] = pointer, tuple(buffer["shape"]), buffer["bytes"]
        self._layout = shapes

    def _close(self) -> None:
        self._layout = {}
        while self._buffers:
            self._gpu.close_handle(self._buffers.popitem()[1][0])

    def _feed(self, name: str, value: Any) -> None:
        pointer, _, size = self._buffers[name]
        if not lies_on_gpu(value):
            self._write(pointer, value)
            return
        try:
            with cuda.settled(described(value)) as (source, context):
                self._gpu.copy(pointer, source, size, context)
        except UsageError as error:
            raise UsageError(f"input {name!r}: {error}") from error

    def _write(self, pointer: int, array: np.ndarray[Any, Any]) -> None:
        array = np.ascontiguousarray(array)
        self._gpu.to_device(pointer, array.ctypes.data, array.nbytes, 0)
        self._gpu.synchronize(0)

    def _taken(self, name: str, dtype: str) -> GpuArray:
        pointer, shape, size = self._buffers[name]
        made = GpuArray(self._gpu, shape, np.dtype(dtype))
        self._gpu.copy(made.pointer, pointer, size)
        return made

    def _asked(self, request: dict[str, Any]) -> dict[str, Any]:
        reply = self._ask(request)
        if "error" in reply:
            self._layout = {}
            raise RunError(reply)
        return reply


class RunError(Exception):
    """The worker refused or failed; ``reply`` is its reply."""

    def __init__(self, reply: Mapping[str, Any]) -> None:
        super().__init__(reply["text"])
        self.reply = reply


def _stand_in(value: Any) -> np.ndarray[Any, Any]:
    """An array of the same dtype and shape that has no memory to speak of, to check feeds by."""
    if not lies_on_gpu(value):
        return value  # type: ignore[no-any-return]  # what is no array is refused by the check
    told = described(value)
    return np.broadcast_to(np.zeros((), told["typestr"]), told["shape"])
