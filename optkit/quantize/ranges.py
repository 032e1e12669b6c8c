"""Ranges on disk: what one calibration found, and from what, so that it can be used again and nowhere else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from optkit.errors import PreconditionError
from optkit.models import OnnxModel
from optkit.quantize.scales import Scale

_PARTS = {"model": "model", "data": "calibration data", "settings": "settings"}


@dataclass(frozen=True)
class Ranges:
    """What a calibration found.

    Attributes:
        origin: what it depends on, JSON-serializable: ``model`` (a digest), ``data`` (the split's fingerprint) and
            ``settings``.
        samples: how many samples were observed.
        ranking: SQNR of each range method in dB, the chosen one first; empty if there was nothing to choose.
        activations: the scale of every quantized tensor.
    """

    origin: Mapping[str, Any]
    samples: int
    ranking: Mapping[str, float]
    activations: Mapping[str, Scale]

    def document(self) -> dict[str, Any]:
        """What ``ranges.json`` holds; a float32 survives JSON."""
        tensors = {name: asdict(scale) | {"scale": float(scale.scale)} for name, scale in self.activations.items()}
        return {
            **self.origin,
            "samples": self.samples,
            "sqnr_by_method": dict(self.ranking),
            "tensors": dict(sorted(tensors.items())),
        }


def load(path: str | Path, origin: Mapping[str, Any]) -> Ranges:
    """Read the ranges of a bundle, or of a file like its ``ranges.json``.

    Args:
        path: the file, or the bundle.
        origin: what the ranges are wanted for.

    Raises:
        PreconditionError: the file cannot be read, or its ranges were found from something else; the message says what.
    """
    file = Path(path) / "ranges.json" if Path(path).is_dir() else Path(path)
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        found = {part: document[part] for part in _PARTS}
        tensors = {
            name: Scale(np.float32(one["scale"]), int(one["zero_point"]), one["dtype"])
            for name, one in document["tensors"].items()
        }
        ranges = Ranges(origin, int(document["samples"]), document["sqnr_by_method"], tensors)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PreconditionError(
            f"calibrate.ranges: {file} holds no ranges that optkit wrote ({type(error).__name__}: {error}); {_MEND}"
        ) from error
    differing = [f"{_PARTS[part]} ({why})" for part, why in _differences(found, origin)]
    if differing:
        raise PreconditionError(
            f"calibrate.ranges: {file} was made from other than what is here: {' and '.join(differing)}; {_MEND}"
        )
    return ranges


_MEND = "leave calibrate.ranges out to calibrate anew"


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[tuple[str, str]]:
    # As JSON has it: a tuple comes back as a list
    wanted = json.loads(json.dumps(wanted))
    return [(part, _what_differs(found[part], wanted[part])) for part in _PARTS if found[part] != wanted[part]]


def _what_differs(found: Any, wanted: Any) -> str:
    if not (isinstance(found, dict) and isinstance(wanted, dict)):
        return "its graph or its weights differ"
    names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    shown = [f"{name} {_short(found.get(name))} there, {_short(wanted.get(name))} here" for name in names[:3]]
    return "; ".join(shown)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"


def digest(model: OnnxModel) -> str:
    """SHA-256 of a model's graph and weights. Names of tensors count, ranges go by them; names of nodes do not."""
    found = hashlib.sha256()
    for node in model.ir.graph.all_nodes():
        attributes = sorted((name, str(attribute.value)) for name, attribute in node.attributes.items())
        ends = [[None if value is None else value.name for value in values] for values in (node.inputs, node.outputs)]
        found.update(repr((node.domain, node.op_type, *ends, attributes)).encode())
    for name, value in sorted(model.ir.graph.initializers.items()):
        tensor = value.const_value
        assert tensor is not None  # an initializer has data
        found.update(repr((name, str(tensor.dtype), tuple(map(str, tensor.shape)))).encode())
        found.update(tensor.tobytes())
    return found.hexdigest()
