"""What TensorRT made of a model: the layers that its inspector tells, in which precision, from which ONNX nodes.

TensorRT before 10 chooses precisions itself and every version may fuse, reformat and fall back, so a precision that
was asked for is proved from the engine and not from the request.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from optkit.errors import BuildError
from optkit.models import OnnxModel
from optkit.quantize.placement.graph import is_int8_product
from optkit.targets.base import WEAK_TYPES

if TYPE_CHECKING:
    import onnx_ir as ir

log = logging.getLogger("optkit.targets")

_PRECISIONS = (
    (re.compile(r"\bint8\b", re.I), "INT8"),
    (re.compile(r"\bfp8|e4m3", re.I), "FP8"),
    (re.compile(r"\bfp16\b|\bhalf\b", re.I), "FP16"),
    (re.compile(r"\bbf16\b|bfloat16", re.I), "BF16"),
    (re.compile(r"\bfp32\b|\bfloat\b", re.I), "FP32"),
    (re.compile(r"\bint32\b", re.I), "INT32"),
    (re.compile(r"\bint64\b", re.I), "INT64"),
    (re.compile(r"\bbool\b", re.I), "BOOL"),
)

_CONVERSIONS = frozenset({"Cast", "DequantizeLinear", "QuantizeLinear"})

_PRODUCT = re.compile(r"conv|gemm|mat(rix)?_?mul|fully", re.I)
"""Kinds of layers that compute, whatever the names in them: of a kernel's nodes only the Q or DQ may have one."""

_REFORMAT = re.compile(r"reformat", re.I)

_COPY, _CLONE = "Reformatting CopyNode", re.compile(r"_clone_\d+$")
"""How TensorRT names a copy that it adds beside a layer, and a node that it has in several places."""

_KERNEL = re.compile(r"_(i8|bf16|f16|tf32|f32)(?:i8|bf16|f16|f32)_")
"""What names of kernels begin their types with: what they read and what they write. Of layers with dynamic shapes
TensorRT 8.5.3 tells no formats, but the kernel (on an H200)."""

_READ_BY_KERNELS = {"i8": "INT8", "bf16": "BF16", "f16": "FP16", "tf32": "FP32", "f32": "FP32"}

_WHOLE_NUMBERS = frozenset({"INT32", "INT64", "BOOL"})
"""What indices and masks come in, beside what a layer computes."""

_NOT_TOLD = "not told"

_WHOLE = "Myelin"
"""The kind of a layer that is a graph of its own, of which TensorRT 8 tells the border only."""

_WIDTHS = {"FP32": 32, "FP16": 16, "BF16": 16, "INT8": 8, "FP8": 8}

_HALVES = {"float16": "FP16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Layer:
    """A layer of the engine.

    Attributes:
        name: TensorRT's.
        kind: TensorRT's type of layer.
        precision: INT8 if it reads INT8; else that of its weights, else of what it reads, else of what it writes, where
            indices count last; ``""`` if TensorRT tells none of these.
        inputs: formats of what it reads, as TensorRT words them.
        outputs: formats of what it writes.
        nodes: the ONNX nodes that it computes, as far as names tell.
        tactic: the kernel, where TensorRT tells.
        converts: whether it only quantizes, dequantizes or casts.
        hides: whether it may compute in a narrower precision than that, of those that the engine may have: its formats
            and its kernel are not told, or only the formats at the border of many nodes.
    """

    name: str
    kind: str
    precision: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[str, ...]
    tactic: str = ""
    converts: bool = False
    hides: bool = False

    @property
    def reformats(self) -> bool:
        """Whether it only moves data from one format or precision to another."""
        return self.converts or bool(_REFORMAT.search(self.kind) or _REFORMAT.search(self.name))

    @property
    def computes(self) -> bool:
        """Whether it does more than move data or hold a constant."""
        return not (self.reformats or self.kind == "Constant")


def read_layers(information: Mapping[str, Any], model: OnnxModel) -> list[Layer]:
    """The layers of an engine that was built from ``model``; none if the engine keeps them to itself."""
    ops = {str(node.name): node.op_type for node in model.ir.graph if node.name}
    narrowest = min((_WIDTHS[name] for name in precisions_of(model)), default=32)
    return [_layer(told, ops, narrowest) for told in information.get("Layers", ()) if isinstance(told, Mapping)]


def _layer(told: Mapping[str, Any], ops: Mapping[str, str], narrowest: int) -> Layer:
    inputs, outputs = (tuple(_format(t) for t in told.get(side, ()) if t) for side in ("Inputs", "Outputs"))
    name, kind, tactic = (str(told.get(key, "")) for key in ("Name", "LayerType", "TacticName"))
    weights, kernel = told.get("Weights"), _KERNEL.search(tactic)
    # Weights that are an input of a layer, and not part of it, leave TensorRT 8 saying that it has some in FP32
    if kernel is not None:
        precision = _READ_BY_KERNELS[kernel[1]]
    elif _precision(inputs[:1]) == "INT8":
        precision = "INT8"
    else:
        precision = _precision((weights.get("Type", "") if isinstance(weights, Mapping) else "", *inputs, *outputs))
    nodes = _nodes_in(f"{name} {told.get('Metadata', '')}", ops)
    computes = _PRODUCT.search(kind) or kernel is not None
    tells = kernel is not None or not (kind == _WHOLE or any("dynamic shapes" in text for text in inputs))
    return Layer(
        name,
        kind,
        precision,
        inputs,
        outputs,
        nodes,
        tactic,
        converts=bool(nodes) and {ops[node] for node in nodes} <= _CONVERSIONS and not computes,
        hides=not tells and _WIDTHS.get(precision, 32) > narrowest,
    )


def _format(tensor: Any) -> str:
    """The format of a tensor; TensorRT 11 tells the type apart from it."""
    if not isinstance(tensor, Mapping):
        return str(tensor)
    parts = [tensor.get("Datatype"), tensor.get("Format/Datatype"), tensor.get("Format")]
    return " ".join(str(part) for part in parts if part)


def _precision(texts: Iterable[str]) -> str:
    """The first that a text names; whole numbers only if there are no others."""
    named = [name for text in texts for pattern, name in _PRECISIONS if pattern.search(text)]
    return next((name for name in named if name not in _WHOLE_NUMBERS), named[0] if named else "")


def _nodes_in(text: str, names: Iterable[str]) -> tuple[str, ...]:
    """The nodes whose names stand in a text whole: no letter, digit, dot or slash goes on beside them.

    A node that TensorRT moves across a branching is in each of the branches as ``NAME_clone_0`` and so on.
    """
    tokens = set(re.split(r"\s\+\s|[\s\[\]{}(),;|]|\.\.\.|\x1f|\x1e", text))
    tokens |= {_CLONE.sub("", token) for token in tokens}
    return tuple(name for name in names if name in tokens)


def is_copy(name: str) -> bool:
    """Whether TensorRT added a layer of that name to bring a tensor into another format."""
    return name.startswith(_COPY)


def nodes_of_layers(names: Iterable[str], records: Mapping[str, Any], model: OnnxModel) -> dict[str, tuple[str, ...]]:
    """The ONNX nodes of layers by name: what the inspector told when the engine was built, else what a name says.

    Args:
        names: of layers, as TensorRT's profiler has them.
        records: of the engine, with the ``inspector``'s summary in them if there is one.
        model: what the engine was built from.
    """
    inspected = {layer["name"]: tuple(layer["nodes"]) for layer in records.get("inspector", {}).get("layers", ())}
    known = [str(node.name) for node in model.ir.graph if node.name]
    return {name: inspected.get(name) or _nodes_in(name, known) for name in names}


def summary(layers: Sequence[Layer], model: OnnxModel) -> dict[str, Any]:
    """How many layers compute in each precision, how many only reformat, and which nodes fell back to float."""
    computing = [layer for layer in layers if layer.computes]
    return {
        "count": len(layers),
        "precisions": _counted(computing),
        "reformats": sum(layer.reformats for layer in layers),
        "islands": _islands(layers, model),
        "layers": [asdict(layer) for layer in layers],
    }


def _counted(layers: Iterable[Layer]) -> dict[str, int]:
    return dict(Counter(precision_in_words(layer.precision, layer.hides) for layer in layers).most_common())


def precision_in_words(precision: str, hides: bool) -> str:
    """What a layer tells of its precision."""
    return f"{precision} or narrower" if hides and precision else precision or _NOT_TOLD


def counts_in_words(precisions: Mapping[str, int]) -> str:
    """The ``precisions`` of a ``summary`` as text: ``53 in INT8, 1 not told``."""
    return ", ".join(f"{n} {name if name == _NOT_TOLD else f'in {name}'}" for name, n in precisions.items())


def _islands(layers: Sequence[Layer], model: OnnxModel) -> list[str]:
    """Weighted nodes that the graph has in INT8 and the engine in another precision, as far as names tell."""
    found = {node: layer.precision for layer in _telling(layers) for node in layer.nodes}
    return [name for name in _int8_nodes(model) if found.get(name, "INT8") != "INT8"]


def _telling(layers: Iterable[Layer]) -> list[Layer]:
    """The layers that compute and tell in which precision, for all of their nodes."""
    told = [layer for layer in layers if layer.computes and layer.precision and not layer.hides]
    return [layer for layer in told if layer.kind != _WHOLE]


def _int8_nodes(model: OnnxModel) -> list[str]:
    return [str(node.name) for node in model.ir.graph if is_int8_product(node)]


def lowered(layers: Sequence[Layer], exact: Iterable[str]) -> list[str]:
    """Nodes that should compute in float32 and whose layer computes in FP16 or BF16, as far as names tell.

    What is part of an INT8 kernel is none of these: its activation is computed in float32 before the result is rounded.
    """
    halves = {node for layer in _telling(layers) if layer.precision in _HALVES.values() for node in layer.nodes}
    return [name for name in exact if name in halves]


def clipped_numbers(layers: Sequence[Layer], model: OnnxModel) -> list[str]:
    """Clips that come after a quantizer behind them: TensorRT 8.5.3 clips INT8 numbers at the bounds of floats then."""
    at: dict[str, int] = {}
    for position, layer in enumerate(layers):
        for node in layer.nodes if not is_copy(layer.name) else ():
            at.setdefault(node, position)
    clips = {str(node.name): node for node in model.ir.graph if node.op_type == "Clip"}
    return [
        name
        for name, clip in clips.items()
        if any(at.get(quantizer, len(layers)) < at.get(name, 0) for quantizer in _next_quantizers(clip))
    ]


def _next_quantizers(node: ir.Node) -> set[str]:
    """The nearest QuantizeLinear nodes on every way from a node on."""
    found, seen, ahead = set(), {node}, [node]
    while ahead:
        readers = {use.node for output in ahead.pop().outputs for use in output.uses()} - seen
        seen |= readers
        found |= {str(reader.name) for reader in readers if reader.op_type == "QuantizeLinear"}
        ahead += [reader for reader in readers if reader.op_type != "QuantizeLinear"]
    return found


def unproved(layers: Sequence[Layer], model: OnnxModel, asked: Sequence[str]) -> list[str]:
    """Of the lowest precision that was asked for, what no layer computes in; arguments as of ``prove``."""
    if "INT8" in asked and not _int8_nodes(model):
        asked = [name for name in asked if name != "INT8"]
    have = {layer.precision for layer in layers if layer.computes}
    return [name for name in (["INT8"] if "INT8" in asked else asked) if name not in have]


def prove(layers: Sequence[Layer], model: OnnxModel, asked: Sequence[str]) -> list[str]:
    """Check that the engine computes in the lowest precision that was asked for.

    Where INT8 was, what little is left beside it may well run in float32 instead of FP16. TensorRT 8 makes one layer
    of a whole transformer and hides what is in it: then nothing is proved, nor is the opposite, and a warning says so.

    Args:
        layers: those of the engine; with none there is nothing to tell, which is an error as well.
        model: what the engine was built from.
        asked: ``INT8``, ``FP16``, ``BF16``.

    Returns:
        The precisions that could not be proved, because layers that may compute in them hide theirs.

    Raises:
        BuildError: one is missing, and no layer hides its precision; the message says what the engine has instead.
    """
    if not layers:
        raise BuildError("TensorRT tells nothing about the engine's layers, so its precision cannot be proved")
    computing = [layer for layer in layers if layer.computes]
    missing = unproved(layers, model, asked)
    hiding = sum(layer.hides for layer in computing)
    if missing and hiding:
        log.warning(
            "TensorRT hides the precision of %d of %d layers: that the engine computes in %s is not proved",
            hiding,
            len(computing),
            " and ".join(missing),
        )
    elif missing:
        raise BuildError(
            f"{' and '.join(missing)} was asked for, and no layer of the engine computes in it "
            f"({counts_in_words(_counted(computing))}): TensorRT has no kernel for it here or found none faster; build "
            "in another precision, or exclude what keeps it from fusing"
        )
    return missing


def precisions_of(model: OnnxModel) -> list[str]:
    """The precisions beside float32 that an engine of a model may compute in, by its record or by its types."""
    if WEAK_TYPES in model.records:
        return list(model.records[WEAK_TYPES]["precisions"])
    nodes = [node for node in model.ir.graph if node.op_type != "Cast"]
    kinds = {str(value.dtype.numpy()) for node in nodes for value in node.outputs if value.dtype is not None}
    quantized = any(node.op_type == "QuantizeLinear" for node in nodes)
    return [name for kind, name in _HALVES.items() if kind in kinds] + (["INT8"] if quantized else [])
