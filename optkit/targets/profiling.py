"""Time layer by layer: what a target offers that can tell it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from optkit.models import Engine, Feeds, OnnxModel


@dataclass(frozen=True)
class LayerTime:
    """What one layer of an engine takes.

    Attributes:
        name: the runtime's.
        nodes: the ONNX nodes that it computes, as far as names tell.
        seconds: of a typical call, under a profiler, which slows small layers down.
        copies: whether it only brings a tensor into another format, before or behind a layer of those nodes.
    """

    name: str
    nodes: tuple[str, ...]
    seconds: float
    copies: bool = False


class Profiler(Protocol):
    """An engine that is open for profiling."""

    def layers(self, feeds: Feeds, calls: int) -> tuple[LayerTime, ...]:
        """The time of every layer over a few calls, which are never those that are timed as a whole."""


@runtime_checkable
class Profiles(Protocol):
    """A target that tells the time of its engines' layers."""

    def profiler(self, engine: Engine, model: OnnxModel, threads: int) -> AbstractContextManager[Profiler]:
        """Open an engine for profiling.

        Args:
            engine: a built engine.
            model: what it was built from.
            threads: intra-op threads, where it runs on the CPU.

        Raises:
            UnavailableError: the engine cannot run on this machine.
        """
