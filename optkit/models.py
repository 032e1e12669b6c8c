"""What flows through the pipeline: signatures, the model before and after export, and the built engine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from optkit.errors import UsageError

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

Feeds: TypeAlias = Mapping[str, np.ndarray[Any, Any]]
"""Arrays by tensor name: what a runner takes and gives."""

Record: TypeAlias = Mapping[str, Any]
"""Something JSON-serializable that a pass leaves for the bundle and the report."""

DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


@dataclass(frozen=True)
class DimRange:
    """The sizes a dynamic dimension may take; ``opt`` is the one that latency is measured and engines are tuned at."""

    min: int = 1
    opt: int = 1
    max: int = 32

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise UsageError(
                f"a dynamic dimension needs 1 <= min <= opt <= max, not {self.min}, {self.opt}, {self.max}"
            )


@dataclass(frozen=True)
class TensorSpec:
    """A named tensor: ``dtype`` is a NumPy name (or ``bfloat16``), a dimension a size or a name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    @classmethod
    def parse(cls, name: str, text: str) -> TensorSpec:
        """Read ``float32[batch,3,224,224]``.

        Raises:
            UsageError: the text does not follow that form, or names an unknown dtype.
        """
        match = re.fullmatch(r"\s*(\w+)\s*\[([^\]]*)\]\s*", text)
        if match is None or match[1] not in DTYPES:
            raise UsageError(
                f"input {name!r}: {text!r} is not a tensor; write dtype[dims], as in float32[batch,3,224,224], "
                f"with a dtype of {', '.join(DTYPES)}"
            )
        words = [word.strip() for word in match[2].split(",")] if match[2].strip() else []
        for word in words:
            if not word.isidentifier() and not (word.isdigit() and int(word) > 0):
                raise UsageError(f"input {name!r}: dimension {word!r} is neither a positive size nor a name")
        return cls(name, match[1], tuple(int(word) if word.isdigit() else word for word in words))

    def sized(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with every dynamic dimension replaced by its size in ``sizes``."""
        return tuple(dim if isinstance(dim, int) else sizes[dim] for dim in self.shape)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Signature:
    """The boundary of a model: its inputs, its outputs, and the range of each dynamic dimension."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dims: Mapping[str, DimRange] = field(default_factory=dict)

    @property
    def dynamic(self) -> tuple[str, ...]:
        """The names of the inputs' dynamic dimensions, in order of appearance."""
        return tuple(dict.fromkeys(dim for spec in self.inputs for dim in spec.shape if isinstance(dim, str)))

    @property
    def batch(self) -> str | None:
        """The dynamic dimension that every input has in front, if there is one."""
        fronts = {spec.shape[0] if spec.shape else None for spec in self.inputs}
        front = fronts.pop() if len(fronts) == 1 else None
        return front if isinstance(front, str) else None

    def range(self, dim: str) -> DimRange:
        """The range of a dynamic dimension."""
        return self.dims.get(dim, DimRange())

    def sizes(self, **chosen: int) -> dict[str, int]:
        """A size for every dynamic dimension: the chosen one, else its ``opt``."""
        return {dim: chosen.get(dim, self.range(dim).opt) for dim in self.dynamic}

    def random_feeds(self, rng: np.random.Generator, **chosen: int) -> dict[str, np.ndarray[Any, Any]]:
        """Feeds of the given sizes: standard normal floats, and zeros and ones for integers and booleans."""
        sizes = self.sizes(**chosen)
        return {spec.name: _random_array(rng, spec.dtype, spec.sized(sizes)) for spec in self.inputs}


def _random_array(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    if dtype == "bfloat16":
        import ml_dtypes

        return rng.standard_normal(shape).astype(ml_dtypes.bfloat16)
    if dtype.startswith("float"):
        return rng.standard_normal(shape).astype(dtype)
    # 0 and 1 are valid token ids, masks, and flags alike; a row of zeros alone is no mask, attention would be undefined
    array = rng.integers(0, 2, shape)
    if array.ndim > 1:
        array[..., 0] = 1
    return array.astype(dtype)


@dataclass(frozen=True)
class TorchModel:
    """A PyTorch module in eval mode. Whoever changes it works on a deep copy."""

    module: torch.nn.Module
    signature: Signature
    records: Record = field(default_factory=dict)


@dataclass(frozen=True)
class OnnxModel:
    """An ONNX model as ``onnx_ir`` holds it. ``records`` is what passes leave for the bundle: ranges, placement."""

    ir: ir.Model
    signature: Signature
    records: Record = field(default_factory=dict)

    def clone(self) -> OnnxModel:
        """A copy whose graph may be edited; the initializers' data is shared."""
        return replace(self, ir=self.ir.clone())

    def with_record(self, name: str, value: Any) -> OnnxModel:
        """The same model with one record added."""
        return replace(self, records={**self.records, name: value})


@dataclass(frozen=True)
class Engine:
    """What a target built: a file in the bundle, and which target opens it."""

    path: Path
    target: str
    signature: Signature
    records: Record = field(default_factory=dict)


Model: TypeAlias = TorchModel | OnnxModel | Engine
