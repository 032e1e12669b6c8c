"""The NVIDIA driver and GPUs of this machine, asked through the driver's own library; no CUDA package is needed."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from typing import Any

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"

_NAME_BYTES = 256
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
        reason: why there are none.
    """

    cuda: str = ""
    gpus: tuple[Gpu, ...] = ()
    reason: str = ""


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
    return Cuda(cuda, tuple(_gpu(driver, index) for index in range(count.value)))


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
