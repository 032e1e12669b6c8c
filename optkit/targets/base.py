"""The contract of a target: what its engine wants, how it is built, and how it is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict

from optkit.context import Context
from optkit.errors import UsageError, did_you_mean
from optkit.models import Engine, Feeds, OnnxModel, Signature
from optkit.targets.arrays import lies_on_gpu


@dataclass(frozen=True)
class Availability:
    """Whether something can be done on this machine; if not, why, and the command or step that would mend it."""

    ok: bool
    reason: str = ""
    mend: str = ""


@dataclass(frozen=True)
class Int8Policy:
    """What a target wants of an INT8 graph. ``quantize.placement`` turns it into Q/DQ pairs.

    Attributes:
        activations: dtype of quantized activations.
        symmetric: whether the zero point of activations is 0 and their range reaches as far down as up.
        rules: names of the placement rules, in order (``quantize/placement``).
        bias: whether biases are INT32 behind a DequantizeLinear, or stay float.
        float_type: the precision that layers left out of INT8 run in.
        dynamic: names of the placement rules where the ranges of activations are found at each call; none if the
            target has no kernels for that.
        sums_in_16_bits: whether kernels add two products of UINT8 and INT8 in 16 bits, which weights must not fill.
    """

    activations: Literal["uint8", "int8"]
    symmetric: bool
    rules: tuple[str, ...]
    bias: Literal["int32", "float"] = "float"
    float_type: Literal["float32", "float16"] = "float32"
    dynamic: tuple[str, ...] = ()
    sums_in_16_bits: bool = False


ORT_CPU = Int8Policy(
    "uint8",
    False,
    ("conv_in_out", "linear_inputs", "add_both_sides", "pool_in_out", "pass_through"),
    bias="int32",
    dynamic=("dynamic_inputs", "dynamic_recurrent"),
)
"""ONNX Runtime's CPU kernels: QLinearConv forms only between quantized tensors, and U8S8 is the fast product."""

TENSORRT = Int8Policy(
    "int8",
    True,
    ("small_kernels_float", "depthwise_float", "head_float", "weighted_inputs", "skip_branch", "concat_one_scale"),
    float_type="float16",
)
"""TensorRT: symmetric, inputs only, so that convolution, addition and activation become one INT8 kernel."""


WEAK_TYPES = "weak_types"
"""The record that tells a target whose engines are not typed what the graph held before it was widened: ``precisions``
that kernels may use, and the nodes that compute in ``float32`` all the same."""


@dataclass(frozen=True)
class Dialect:
    """The ONNX that a target's engine is built from.

    Attributes:
        int8: how INT8 is placed; None if the target has no INT8.
        opsets: lowest and highest ai.onnx opset that it reads.
        domains: op domains beside ai.onnx that it reads.
        floats: float types that its kernels compute in.
        typed: whether the engine computes in the types that the graph says; else the builder chooses among those
            that the graph holds.
        builder_opset: the highest opset that the builder itself reads, if that is lower: the build lowers the graph.
        lacks: ops that the builder itself lacks: the build expresses them with others.
        lacks_in: ops that the builder lacks in a float type, as (op, type): they stay in float32.
        explicit: whether the builder needs kernel shapes, zero points and bounds written where ONNX has a default.
        tunes_for_shapes: whether kernels are chosen by shapes, so that the builder should know every fixed size.
        width_multiple: what numbers of channels its kernels take without padding.
        sparse: whether it will use kernels for 2:4 sparse weights; False if it has them and they were not asked for,
            None if it has none.
    """

    int8: Int8Policy | None
    opsets: tuple[int, int] = (13, 23)
    domains: frozenset[str] = frozenset()
    floats: frozenset[str] = frozenset({"float32"})
    typed: bool = True
    builder_opset: int | None = None
    lacks: frozenset[str] = frozenset()
    lacks_in: frozenset[tuple[str, str]] = frozenset()
    explicit: bool = False
    tunes_for_shapes: bool = False
    width_multiple: int = 8
    sparse: bool | None = None


@dataclass(frozen=True)
class Environment:
    """Where a runner ran: what is printed beside every latency.

    Attributes:
        device: its name.
        runtime: what ran there, with its version.
        settings: whatever changes the latency.
        calls_at_once: how many calls are under way while each is timed.
    """

    device: str
    runtime: str
    settings: dict[str, Any] = field(default_factory=dict)
    calls_at_once: int = 1


@dataclass(frozen=True)
class Misfit:
    """Why an engine that was built elsewhere is not one for this machine.

    Attributes:
        what: what differs, in words.
        changes: options of the target to change so that a new build fits; None if no build would.
    """

    what: str
    changes: Mapping[str, Any] | None = field(default_factory=dict)


class Runner(Protocol):
    """An opened model that runs. Close it, or use it as a context manager."""

    signature: Signature
    environment: Environment

    def run(self, feeds: Feeds) -> dict[str, np.ndarray[Any, Any]]:
        """Outputs by name for one batch of feeds."""

    def time(self, feeds: Feeds, rounds: int) -> np.ndarray[Any, Any]:
        """Seconds of each of ``rounds`` consecutive calls, float64[rounds]; the caller warms up."""

    def close(self) -> None:
        """Release what the runner holds."""

    def __enter__(self) -> Runner: ...

    def __exit__(self, *exc: object) -> None: ...


class Target(BaseModel):
    """What an engine is built for. Its fields are its YAML keys; ``name`` tells which target it is."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: Any

    @property
    def dialect(self) -> Dialect:
        """The ONNX that this target wants."""
        raise NotImplementedError

    def can_build(self) -> Availability:
        """Whether an engine can be built here."""
        raise NotImplementedError

    def can_run(self) -> Availability:
        """Whether an engine can be run here."""
        raise NotImplementedError

    def build(self, model: OnnxModel, folder: Path, context: Context) -> Engine:
        """Build the engine into ``folder``.

        Raises:
            UnavailableError: the target cannot build on this machine.
            BuildError: the model cannot be built; the message names the ONNX node where the builder does.
        """
        raise NotImplementedError

    def open(self, engine: Engine, threads: int) -> Runner:
        """Open a built engine.

        Raises:
            UnavailableError: the engine cannot run on this machine; the message says why.
        """
        raise NotImplementedError

    def versions(self) -> dict[str, str]:
        """Versions of the tools that shape this target's engines, for the manifest."""
        raise NotImplementedError

    def misfit(self, engine: Engine) -> Misfit | None:
        """Why this machine is another one than the engine's records say it was built for; None if nothing says so."""
        return None

    @property
    def exact_sums(self) -> Mapping[str, Any]:
        """Options that keep sums of INT8 products exact where kernels add them in 16 bits (``sums_in_16_bits``)."""
        return {}


def check_feeds(signature: Signature, feeds: Feeds) -> None:
    """Refuse feeds that are not what the signature says, before a runtime does so in its own words.

    A named dimension may have any size, but the same one wherever its name stands.

    Raises:
        UsageError: a feed is missing or unknown, or its dtype or shape is another one.
    """
    known = [spec.name for spec in signature.inputs]
    for name in feeds:
        if name not in known:
            raise UsageError(f"unknown input {name!r}: {did_you_mean(name, known)}")
    sizes: dict[str, tuple[int, str]] = {}
    for spec in signature.inputs:
        if spec.name not in feeds:
            raise UsageError(f"input {spec.name!r} is missing: the model takes {quote(known)}")
        array = feeds[spec.name]
        if not isinstance(array, np.ndarray):
            raise UsageError(f"input {spec.name!r}: {_foreign(array)}")
        if array.dtype.name != spec.dtype or array.ndim != len(spec.shape):
            raise UsageError(f"input {spec.name!r}: {spec} is wanted, not {_described(array)}")
        for dim, size in zip(spec.shape, array.shape, strict=True):
            wanted, origin = sizes.setdefault(dim, (size, spec.name)) if isinstance(dim, str) else (dim, spec.name)
            if size != wanted:
                why = f", and {dim} is {wanted} in {origin!r}" if origin != spec.name else ""
                raise UsageError(f"input {spec.name!r}: {spec} is wanted, not {_described(array)}{why}")


def _foreign(value: Any) -> str:
    if lies_on_gpu(value):
        return (
            "it lies on a GPU, and this engine runs on the CPU: hand over a copy in host memory, as x.cpu() in PyTorch "
            "or x.get() in CuPy and PyCUDA"
        )
    return f"a {type(value).__name__} is no NumPy array: hand over numpy.asarray of it"


def _described(array: np.ndarray[Any, Any]) -> str:
    return f"{array.dtype.name}[{','.join(map(str, array.shape))}]"


def quote(names: Sequence[str]) -> str:
    """Names for a message: ``'a', 'b' and 3 more``."""
    shown = ", ".join(repr(name) for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
