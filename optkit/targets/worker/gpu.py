"""The CUDA driver as a runner needs it: memory, streams, events and graphs.

NVIDIA's ``cuda-bindings`` makes the calls where it is installed, else ctypes makes them to the driver's own library; no
CUDA toolkit and no CUDA runtime is needed. Pointers and handles are plain integers either way.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Call = Callable[..., Any]

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


class _IpcHandle(ctypes.Structure):
    """CUipcMemHandle: 64 bytes that another process opens the memory by."""

    _fields_ = (("reserved", ctypes.c_ubyte * 64),)


_P, _A, _S, _I, _U = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_int, ctypes.c_uint

# name: symbol in the library, what it gives, what it takes
_FUNCTIONS: dict[str, tuple[str, Sequence[Any], Sequence[Any]]] = {
    "cuInit": ("cuInit", (), (_U,)),
    "cuDeviceGet": ("cuDeviceGet", (_I,), (_I,)),
    "cuDeviceGetAttribute": ("cuDeviceGetAttribute", (_I,), (_I, _I)),
    "cuDevicePrimaryCtxRetain": ("cuDevicePrimaryCtxRetain", (_P,), (_I,)),
    "cuCtxSetCurrent": ("cuCtxSetCurrent", (), (_P,)),
    "cuMemGetInfo": ("cuMemGetInfo_v2", (_S, _S), ()),
    "cuMemAlloc": ("cuMemAlloc_v2", (_A,), (_S,)),
    "cuMemFree": ("cuMemFree_v2", (), (_A,)),
    "cuMemHostAlloc": ("cuMemHostAlloc", (_P,), (_S, _U)),
    "cuMemFreeHost": ("cuMemFreeHost", (), (_P,)),
    "cuMemcpyHtoDAsync": ("cuMemcpyHtoDAsync_v2", (), (_A, _P, _S, _P)),
    "cuMemcpyDtoHAsync": ("cuMemcpyDtoHAsync_v2", (), (_P, _A, _S, _P)),
    "cuMemcpyPeer": ("cuMemcpyPeer", (), (_A, _P, _A, _P, _S)),
    "cuCtxSynchronize": ("cuCtxSynchronize", (), ()),
    "cuIpcGetMemHandle": ("cuIpcGetMemHandle", (_IpcHandle,), (_A,)),
    "cuIpcOpenMemHandle": ("cuIpcOpenMemHandle_v2", (_A,), (_IpcHandle, _U)),
    "cuIpcCloseMemHandle": ("cuIpcCloseMemHandle", (), (_A,)),
    "cuStreamCreate": ("cuStreamCreate", (_P,), (_U,)),
    "cuStreamSynchronize": ("cuStreamSynchronize", (), (_P,)),
    "cuStreamBeginCapture": ("cuStreamBeginCapture_v2", (), (_P, _I)),
    "cuStreamEndCapture": ("cuStreamEndCapture", (_P,), (_P,)),
    "cuGraphInstantiate": ("cuGraphInstantiateWithFlags", (_P,), (_P, _A)),
    "cuGraphLaunch": ("cuGraphLaunch", (), (_P, _P)),
    "cuGraphDestroy": ("cuGraphDestroy", (), (_P,)),
    "cuGraphExecDestroy": ("cuGraphExecDestroy", (), (_P,)),
    "cuEventCreate": ("cuEventCreate", (_P,), (_U,)),
    "cuEventDestroy": ("cuEventDestroy_v2", (), (_P,)),
    "cuEventRecord": ("cuEventRecord", (), (_P, _P)),
    "cuEventElapsedTime": ("cuEventElapsedTime", (ctypes.c_float,), (_P, _P)),
}

_RESULT_LAST = frozenset({"cuStreamEndCapture"})

_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
_L2_BYTES = 38  # CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
_LAZY_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS


class CudaError(Exception):
    """A call to the driver failed."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.out_of_memory = code == _OUT_OF_MEMORY


class Cuda:
    """The first GPU that the driver shows, in its primary context, which the CUDA runtime and TensorRT use too.

    Args:
        bindings: use ``cuda-bindings`` where it is installed; else ctypes at once.

    Raises:
        CudaError: there is no driver or no GPU.
    """

    def __init__(self, bindings: bool = True) -> None:
        self._plain, through = _through_ctypes()  # for what cuda-bindings wants objects of its own
        self._call, self.through = (_through_bindings() if bindings else None) or (self._plain, through)
        self._call("cuInit", 0)
        self._device = self._call("cuDeviceGet", 0)
        self._context = self._call("cuDevicePrimaryCtxRetain", self._device)
        self.make_current()

    def make_current(self) -> None:
        """Make the context that of the calling thread."""
        self._call("cuCtxSetCurrent", self._context)

    @property
    def l2_bytes(self) -> int:
        """The size of the second-level cache."""
        return int(self._call("cuDeviceGetAttribute", _L2_BYTES, self._device))

    @property
    def free_bytes(self) -> int:
        """Device memory that is free."""
        return int(self._call("cuMemGetInfo")[0])

    def allocate(self, size: int) -> int:
        """Device memory, at least one byte.

        Raises:
            CudaError: there is not as much.
        """
        try:
            return int(self._call("cuMemAlloc", max(size, 1)))
        except CudaError as error:
            if error.out_of_memory:
                text = f"out of GPU memory: {size / 1e6:.0f} MB wanted, {self.free_bytes / 1e6:.0f} MB free"
                raise CudaError(text, _OUT_OF_MEMORY) from error
            raise

    def free(self, pointer: int) -> None:
        """Release device memory."""
        self._call("cuMemFree", pointer)

    def allocate_host(self, size: int) -> int:
        """Pinned host memory, which transfers run from at full speed."""
        return int(self._call("cuMemHostAlloc", max(size, 1), 0))

    def free_host(self, pointer: int) -> None:
        """Release pinned host memory."""
        self._call("cuMemFreeHost", pointer)

    def to_device(self, pointer: int, host: int, size: int, stream: int) -> None:
        """Copy from the host; the host's memory must stay until the stream is synchronized."""
        if size:
            self._call("cuMemcpyHtoDAsync", pointer, host, size, stream)

    def to_host(self, host: int, pointer: int, size: int, stream: int) -> None:
        """Copy to the host; it is there once the stream is synchronized."""
        if size:
            self._call("cuMemcpyDtoHAsync", host, pointer, size, stream)

    def handle_of(self, pointer: int) -> bytes:
        """What another process opens memory from ``allocate`` by.

        Raises:
            CudaError: this system shares no GPU memory between processes.
        """
        return bytes(self._plain("cuIpcGetMemHandle", pointer).reserved)

    def open_handle(self, handle: bytes) -> int:
        """The memory of another process; it must stay allocated there until it is closed here.

        Raises:
            CudaError: this system shares no GPU memory between processes.
        """
        return int(self._plain("cuIpcOpenMemHandle", _IpcHandle.from_buffer_copy(handle), _LAZY_PEER_ACCESS))

    def close_handle(self, pointer: int) -> None:
        """Let go of another process's memory."""
        self._plain("cuIpcCloseMemHandle", pointer)

    def copy(self, into: int, source: int, size: int, context: int | None = None) -> None:
        """Copy within the GPU, and wait for it; ``source`` may belong to another ``context`` of this process."""
        if size:
            self._plain("cuMemcpyPeer", into, self._context, source, context or self._context, size)
            self._plain("cuCtxSynchronize")

    def stream(self) -> int:
        """A new stream that does not wait for the default one."""
        return int(self._call("cuStreamCreate", _NON_BLOCKING))

    def synchronize(self, stream: int) -> None:
        """Wait until all work of the stream is done; errors of that work come out here."""
        self._call("cuStreamSynchronize", stream)

    def capture(self, stream: int, work: Callable[[], None]) -> int:
        """A CUDA graph, ready to launch, of what ``work`` enqueues on the stream.

        Raises:
            CudaError: something that ``work`` does cannot be captured.
        """
        self._call("cuStreamBeginCapture", stream, _THREAD_LOCAL)
        try:
            work()
        finally:
            graph = self._call("cuStreamEndCapture", stream)  # also after a failure: the stream must leave the mode
        try:
            return int(self._call("cuGraphInstantiate", graph, 0))
        finally:
            self._call("cuGraphDestroy", graph)

    def launch(self, graph: int, stream: int) -> None:
        """Enqueue a captured graph."""
        self._call("cuGraphLaunch", graph, stream)

    def destroy_graph(self, graph: int) -> None:
        """Release a captured graph."""
        self._call("cuGraphExecDestroy", graph)

    def event(self) -> int:
        """A new event that takes the time."""
        return int(self._call("cuEventCreate", 0))

    def destroy_event(self, event: int) -> None:
        """Release an event."""
        self._call("cuEventDestroy", event)

    def record(self, event: int, stream: int) -> None:
        """Let the event take the time when the stream gets there."""
        self._call("cuEventRecord", event, stream)

    def seconds(self, start: int, stop: int) -> float:
        """The time between two events that have happened."""
        return float(self._call("cuEventElapsedTime", start, stop)) * 1e-3


def _through_ctypes() -> tuple[Call, str]:
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise CudaError(f"no NVIDIA driver on this machine ({error})", 0) from error
    functions = {}
    for name, (symbol, gives, takes) in _FUNCTIONS.items():
        function = getattr(library, symbol)
        pointers = [ctypes.POINTER(kind) for kind in gives]
        function.argtypes = [*takes, *pointers] if name in _RESULT_LAST else [*pointers, *takes]
        functions[name] = function

    def call(name: str, *arguments: Any) -> Any:
        results = [kind() for kind in _FUNCTIONS[name][1]]
        references = [ctypes.byref(result) for result in results]
        code = functions[name](*((*arguments, *references) if name in _RESULT_LAST else (*references, *arguments)))
        if code:
            text = ctypes.c_char_p()
            library.cuGetErrorName(code, ctypes.byref(text))
            raise CudaError(f"{name}: {(text.value or b'').decode() or code}", code)
        return _one_or_all([r if isinstance(r, ctypes.Structure) else r.value or 0 for r in results])

    return call, "ctypes"


def _through_bindings() -> tuple[Call, str] | None:
    try:
        driver = importlib.import_module("cuda.bindings.driver")
        version = importlib.import_module("cuda.bindings").__version__
    except ImportError:
        return None
    enums = {
        ("cuDeviceGetAttribute", 0): driver.CUdevice_attribute,
        ("cuStreamBeginCapture", 1): driver.CUstreamCaptureMode,
    }

    def call(name: str, *arguments: Any) -> Any:
        typed = [enums[name, i](value) if (name, i) in enums else value for i, value in enumerate(arguments)]
        code, *results = getattr(driver, name)(*typed)
        if int(code):
            raise CudaError(f"{name}: {code.name}", int(code))
        return _one_or_all([result if isinstance(result, float) else int(result) for result in results])

    return call, f"cuda-bindings {version}"


def _one_or_all(results: list[Any]) -> Any:
    return results[0] if len(results) == 1 else results
