"""The processor of this machine, as far as it decides how fast and how exactly ONNX Runtime computes."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optkit.models import Record

CPUINFO = Path("/proc/cpuinfo")

VECTOR_FEATURES = ("avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimd", "asimddp", "i8mm", "sve")


@dataclass(frozen=True)
class Cpu:
    """A processor: its name, and which of ``VECTOR_FEATURES`` it has (none where the system does not say)."""

    name: str
    features: tuple[str, ...]

    @property
    def isa(self) -> str:
        """The vector width that ONNX Runtime lays out its weights for, or the machine's type where it is unknown."""
        widest = [name for name in ("avx512f", "avx2", "asimd") if name in self.features]
        return widest[0] if widest else platform.machine()

    @property
    def saturates_int8(self) -> bool:
        """Whether products of uint8 and int8 are summed in 16 bits, which loses accuracy on large weights.

        x86 without VNNI does so (``vpmaddubsw``).
        """
        return "avx2" in self.features and not {"avx512_vnni", "avx_vnni"} & set(self.features)


def this_cpu(cpuinfo: Path = CPUINFO) -> Cpu:
    """The processor of this machine."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return Cpu(platform.processor() or platform.machine(), ())
    entries = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = entries.get("flags", entries.get("Features", "")).split()
    name = entries.get("model name") or platform.processor() or platform.machine()
    return Cpu(name, tuple(feature for feature in VECTOR_FEATURES if feature in flags))


def recorded_cpu(records: Record) -> Cpu | None:
    """The processor that an engine was built on, if its records say so."""
    cpu = records.get("cpu")
    return None if cpu is None else Cpu(cpu["name"], tuple(cpu["features"]))
