"""The NVIDIA driver and GPUs of this machine, asked through the driver's own library; no CUDA package is needed."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optkit.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"

NVML = "nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"

_NAME_BYTES = 256
_POINTER_CONTEXT, _POINTER_DEVICE = 1, 9  # CU_POINTER_ATTRIBUTE_CONTEXT, _DEVICE_ORDINAL
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


@dataclass(frozen=True)
class Gpu:
    """A GPU: its name, its compute capability (as ``8.6``) and its memory in bytes."""

    name: str
    capability: str
    memory: int


@dataclass(frozen=True)
class Cuda:
    """What the driver says.

    Attributes:
        cuda: the newest CUDA that the driver runs, as ``13.0``; empty without a driver.
        gpus: in the driver's order.
        driver: the driver's own version, as ``580.159.04``, where the system tells it.
        reason: why there are none.
    """

    cuda: str = ""
    gpus: tuple[Gpu, ...] = ()
    reason: str = ""
    driver: str = ""


def detect(library: str = LIBRARY) -> Cuda:
    """Ask the driver for its GPUs; never raises."""
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return Cuda(reason=f"no NVIDIA driver on this machine ({library} cannot be loaded)")
    code = driver.cuInit(0)
    version = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    cuda = f"{version.value // 1000}.{version.value % 1000 // 10}"
    if code != 0:
        return Cuda(cuda, reason=f"the NVIDIA driver finds no usable GPU ({_error_name(driver, code)})")
    count = ctypes.c_int()
    driver.cuDeviceGetCount(ctypes.byref(count))
    return Cuda(cuda, tuple(_gpu(driver, index) for index in range(count.value)), driver=_driver_version())


def clocks() -> dict[str, int]:
    """The first GPU's clocks of the moment in MHz, ``sm`` and ``memory``, where NVML tells them."""
    try:
        nvml = ctypes.CDLL(NVML)
    except OSError:
        return {}
    device, found = ctypes.c_void_p(), {}
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device)):
        return {}
    for kind, name in ((1, "sm"), (2, "memory")):  # NVML_CLOCK_SM, NVML_CLOCK_MEM
        value = ctypes.c_uint()
        if nvml.nvmlDeviceGetClockInfo(device, kind, ctypes.byref(value)) == 0:
            found[name] = value.value
    return found


def to_host(described: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """A copy of an array that lies on a GPU, as its ``__cuda_array_interface__`` describes it.

    Raises:
        UsageError: its elements do not lie one after the other in C order, or it is not where it says it is.
    """
    import numpy as np

    array = np.empty(described["shape"], described["typestr"])
    if array.nbytes:
        with settled(described) as (pointer, _):
            to, size = array.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(array.nbytes)
            driver = _driver()
            _check(driver, driver.cuMemcpyDtoH_v2(to, ctypes.c_uint64(pointer), size))
    return array


@contextlib.contextmanager
def settled(described: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """Where an array on a GPU lies and the context that it belongs to, which is current within; no work on it is left.

    Raises:
        UsageError: its elements do not lie one after the other in C order, or it is not where it says it is.
    """
    import numpy as np

    packed: list[int] = []
    step = np.dtype(described["typestr"]).itemsize
    for size in reversed(described["shape"]):
        packed.insert(0, step)
        step *= size
    if described.get("strides") not in (None, tuple(packed)):
        raise UsageError("an array on the GPU must lie in C order: make it contiguous")
    driver = _driver()
    pointer, stream = ctypes.c_uint64(described["data"][0]), described.get("stream")
    with _context_of(driver, pointer) as context:
        # PyTorch names no stream: whatever works on the array in its context must have ended
        waited = driver.cuCtxSynchronize() if stream is None else driver.cuStreamSynchronize(ctypes.c_void_p(stream))
        _check(driver, waited)
        yield pointer.value, context


@contextlib.contextmanager
def kept_context() -> Iterator[None]:
    """Whatever is made current within, leave the caller's context current: PyCUDA has one of its own."""
    try:
        driver = ctypes.CDLL(LIBRARY)
    except OSError:
        yield
        return
    context = ctypes.c_void_p()
    driver.cuInit(0)
    driver.cuCtxGetCurrent(ctypes.byref(context))
    try:
        yield
    finally:
        driver.cuCtxSetCurrent(context)


def _driver() -> Any:
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise UsageError(f"it lies on a GPU, and there is no NVIDIA driver ({LIBRARY} cannot be loaded)") from error


def _check(driver: Any, code: int) -> None:
    if code != 0:
        raise UsageError(f"an array on the GPU cannot be read ({_error_name(driver, code)})")


@contextlib.contextmanager
def _context_of(driver: Any, pointer: ctypes.c_uint64) -> Iterator[int]:
    """Make the context current that a pointer belongs to, and afterwards again what the caller had.

    PyCUDA makes a context of its own; PyTorch, CuPy and the CUDA runtime share the device's primary one. Memory from a
    pool belongs to none: then it is that of the pointer's device.
    """
    context, device = ctypes.c_void_p(), ctypes.c_int()
    driver.cuInit(0)
    driver.cuPointerGetAttribute(ctypes.byref(context), _POINTER_CONTEXT, pointer)
    retained = not context.value
    if retained:
        driver.cuPointerGetAttribute(ctypes.byref(device), _POINTER_DEVICE, pointer)
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
    driver.cuCtxPushCurrent_v2(context)
    try:
        yield context.value or 0
    finally:
        driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
        if retained:
            driver.cuDevicePrimaryCtxRelease_v2(device)


def _driver_version() -> str:
    path = Path("/proc/driver/nvidia/version")
    words = path.read_text().split() if path.exists() else []
    return next((word for word in words if word[:1].isdigit() and word.count(".") >= 1), "")


def _gpu(driver: Any, index: int) -> Gpu:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name, memory = ctypes.create_string_buffer(_NAME_BYTES), ctypes.c_size_t()
    driver.cuDeviceGet(ctypes.byref(device), index)
    driver.cuDeviceGetName(name, _NAME_BYTES, device)
    driver.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, device)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), _CAPABILITY_MINOR, device)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    return Gpu(name.value.decode(errors="replace"), f"{major.value}.{minor.value}", memory.value)


def _error_name(driver: Any, code: int) -> str:
    name = ctypes.c_char_p()
    driver.cuGetErrorName(code, ctypes.byref(name))
    return name.value.decode() if name.value else f"error {code}"
