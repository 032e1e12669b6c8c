"""Says what a file is and what is in it, without running any code that it brings."""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from optkit.errors import CheckpointError
from optkit.models import TorchModel

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

Document = dict[str, Any]

_PLANS = {b"ftrt": "TensorRT engine", b"vtrt": "TensorRT-RTX engine"}

_DOMAINS_OF_ONNX = ("", "ai.onnx")


def inspect_path(path: Path) -> Document:
    """What is at ``path``, JSON-serializable: its kind, signature, tensors, operators and precision, as far as told.

    Raises:
        CheckpointError: the file cannot be read, or it is nothing that optkit knows.
    """
    from optkit import bundle, source

    if bundle.is_bundle(path):
        return _bundle(path)
    if path.is_file() and (plan := _PLANS.get(_head(path))):
        return {"path": str(path), "kind": plan, "bytes": path.stat().st_size, "note": "only its runtime can read it"}
    kind = source.recognise(path)
    read = {
        "onnx": _onnx,
        "torch.export": _exported,
        "torch.save": _saved,
        "torchscript": _torchscript,
        "safetensors": _safetensors,
        "huggingface": _huggingface,
    }[kind]
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else None
    return {"path": str(path), "kind": kind, "bytes": size or path.stat().st_size, **read(path)}


@dataclass(frozen=True)
class _Tensor:
    dtype: str
    shape: tuple[int, ...]
    bytes: int

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


def _tensors(tensors: Mapping[str, _Tensor]) -> Document:
    """How many numbers of which type there are, and every tensor by its name."""
    dtypes = {
        dtype: {
            "tensors": len(those),
            "elements": sum(math.prod(t.shape) for t in those),
            "bytes": sum(t.bytes for t in those),
        }
        for dtype in sorted({tensor.dtype for tensor in tensors.values()})
        for those in [[tensor for tensor in tensors.values() if tensor.dtype == dtype]]
    }
    return {
        "parameters": sum(count["elements"] for count in dtypes.values()),
        "dtypes": dtypes,
        "tensors": {name: str(tensor) for name, tensor in tensors.items()},
    }


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(4)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def _bundle(path: Path) -> Document:
    from optkit import bundle

    manifest = bundle.load(path).manifest
    told = {key: manifest[key] for key in ("name", "verdict", "target", "engine", "seed", "versions", "checkpoint")}
    inspector = manifest["records"].get("engine", {}).get("inspector", {})
    layers = {layer["name"]: _layer_in_words(layer) for layer in inspector.get("layers", ())}
    engine = {"engine_precisions": inspector.get("precisions"), "engine_layers": layers}
    document = {"path": str(path), "kind": "bundle", **told, **engine}
    onnx = path / "model.onnx"
    return {**document, **_onnx(onnx)} if onnx.is_file() else document


def _layer_in_words(layer: Mapping[str, Any]) -> str:
    from optkit.targets.engine_layers import precision_in_words

    precision = precision_in_words(layer["precision"], layer.get("hides", False))
    return f"{precision}, {layer['kind']}: {', '.join(layer['nodes']) or 'no node'}"


# ONNX


def _onnx(path: Path) -> Document:
    import onnx_ir as ir

    try:
        model = ir.load(path)
    except Exception as error:
        raise _damaged(path, error) from error
    nodes = list(model.graph.all_nodes())
    weights = {name: value.const_value for graph in model.graphs() for name, value in graph.initializers.items()}
    return {
        "producer": f"{model.producer_name or 'unknown'} {model.producer_version or ''}".strip(),
        "ir_version": model.ir_version,
        "opsets": {domain or "ai.onnx": version for domain, version in model.opset_imports.items()},
        "inputs": {str(value.name): _shape(value) for value in model.graph.inputs if not value.is_initializer()},
        "outputs": {str(value.name): _shape(value) for value in model.graph.outputs},
        **_tensors(
            {name: _Tensor(str(w.dtype.numpy()), tuple(w.shape.numpy()), w.nbytes) for name, w in weights.items() if w}
        ),
        "operators": dict(Counter(map(_operator, nodes)).most_common()),
        "quantization": _quantization(nodes),
    }


def _shape(value: ir.Value) -> str:
    dims = "?" if value.shape is None else ",".join(str(dim).replace("None", "?") for dim in value.shape)
    return f"{'?' if value.dtype is None else value.dtype.numpy()}[{dims}]"


def _operator(node: ir.Node) -> str:
    return node.op_type if node.domain in _DOMAINS_OF_ONNX else f"{node.domain}.{node.op_type}"


def _quantization(nodes: Iterable[ir.Node]) -> Document | None:
    """Where Q/DQ pairs stand: which operators compute on quantized inputs, and how the inputs are quantized."""
    nodes = list(nodes)
    pairs = [node for node in nodes if node.op_type == "DequantizeLinear"]
    if not pairs:
        return None
    quantized: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for node in nodes:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            continue
        sources = [value.producer() for value in node.inputs[:2] if value is not None]
        total[_operator(node)] += 1
        quantized[_operator(node)] += bool(sources) and all(s is not None and s in pairs for s in sources)
    weights = [node for node in pairs if _constant(node, 0) is not None]
    return {
        "operators": {name: {"quantized": count, "of": total[name]} for name, count in quantized.items() if count},
        "activations": dict(Counter(_codes(node) for node in pairs if node not in weights)),
        "weights": dict(Counter(_codes(node) for node in weights)),
    }


def _codes(node: ir.Node) -> str:
    """How one tensor is quantized: ``int8 symmetric per channel``."""
    scale, zero = _constant(node, 1), _constant(node, 2)
    dtype = zero.dtype if zero is not None else np.dtype(np.uint8)
    middle = 128 if dtype == np.uint8 else 0
    symmetric = zero is None or bool((zero.astype(np.int64) == middle).all())
    granularity = "per tensor" if scale is None or scale.size == 1 else "per channel"
    return f"{dtype} {'symmetric' if symmetric else 'asymmetric'} {granularity}"


def _constant(node: ir.Node, index: int) -> np.ndarray[Any, Any] | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    return None if value is None or value.const_value is None else np.asarray(value.const_value.numpy())


# PyTorch


def _exported(path: Path) -> Document:
    from optkit.recipe import Recipe
    from optkit.source import load_model

    model = load_model(path, Recipe.load("fp32")).model
    assert isinstance(model, TorchModel)  # that is what a .pt2 becomes
    signature = model.signature
    graphs: list[Any] = [module.graph for module in model.module.modules() if hasattr(module, "graph")]
    calls = [node for graph in graphs for node in graph.nodes if node.op == "call_function"]
    return {
        "inputs": {spec.name: str(spec) for spec in signature.inputs},
        "outputs": {spec.name: str(spec) for spec in signature.outputs},
        "dims": {name: [bounds.min, bounds.opt, bounds.max] for name, bounds in signature.dims.items()},
        **_state(model.module.state_dict()),
        "operators": dict(Counter(str(node.target) for node in calls).most_common()),
    }


def _torchscript(path: Path) -> Document:
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            module = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise _damaged(path, error) from error
    graph: Any = module.inlined_graph
    kinds = (node.kind() for node in graph.nodes())
    return {
        "inputs": {argument.name: str(argument.type) for argument in module.forward.schema.arguments[1:]},
        **_state(module.state_dict()),
        "operators": dict(Counter(kind for kind in kinds if not kind.startswith("prim::")).most_common()),
    }


def _saved(path: Path) -> Document:
    from optkit import source

    try:
        content = source.unpickle(path)
    except source.RefusedPickleError as refused:
        return {"note": f"a pickle that names {refused}: loading it could run code, so nothing of it was loaded"}
    except Exception as error:
        raise _damaged(path, error) from error
    return _state(dict(_tensors_in(content)))


def _tensors_in(content: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in nested dicts and lists, named by their path: a training checkpoint holds more than weights."""
    import torch

    if isinstance(content, torch.Tensor):
        yield prefix, content
    pairs = content.items() if isinstance(content, Mapping) else enumerate(content) if _is_list(content) else ()
    for key, value in pairs:
        yield from _tensors_in(value, f"{prefix}.{key}" if prefix else str(key))


def _is_list(content: Any) -> bool:
    return isinstance(content, (list, tuple))


def _state(state: Mapping[str, torch.Tensor]) -> Document:
    return _tensors(
        {name: _Tensor(str(t.dtype).removeprefix("torch."), tuple(t.shape), t.nbytes) for name, t in state.items()}
    )


def _safetensors(path: Path) -> Document:
    return _tensors(_header(path))


def _header(path: Path) -> dict[str, _Tensor]:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        parts = {name: part for name, part in header.items() if name != "__metadata__"}
        found = {name: _stored(part) for name, part in parts.items()}
        stored = max((part["data_offsets"][1] for part in parts.values()), default=0)
        complete = path.stat().st_size >= 8 + length + stored
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from error
    if not complete:
        raise _damaged(path, "it ends before its last tensor does")
    return found


_STORED = {"F": "float", "I": "int", "U": "uint", "BF": "bfloat", "BOOL": "bool"}


def _stored(part: Mapping[str, Any]) -> _Tensor:
    """One entry of a safetensors header, where ``F32`` is float32."""
    name = str(part["dtype"])
    letters = name.rstrip("0123456789")
    begin, end = part["data_offsets"]
    return _Tensor(_STORED.get(letters, letters) + name[len(letters) :], tuple(part["shape"]), end - begin)


def _huggingface(path: Path) -> Document:
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        told = {"model_type": config.get("model_type"), "architectures": config.get("architectures")}
    except (OSError, ValueError, AttributeError) as error:
        raise _damaged(path / "config.json", error) from error
    found: dict[str, _Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        found.update(_header(file))
    return {**told, **_tensors(found)}


def _damaged(path: Path, error: Exception | str) -> CheckpointError:
    return CheckpointError(f"{path}: truncated or damaged: {error}; save or download it again")


# For a reader


def describe(document: Document) -> str:
    """The document as text; long lists are cut, ``--json`` has all of them."""
    return "\n".join(_lines(document))


SHOWN = 12
"""How many entries of a list are shown."""


def _lines(document: Document, indent: str = "") -> Iterator[str]:
    width = max((len(key) for key in list(document)[:SHOWN]), default=0)
    for key, value in list(document.items())[: None if not indent else SHOWN]:
        if isinstance(value, Mapping) and value and not indent:
            yield f"{key}:"
            yield from _lines(dict(value), "  ")
        elif value not in (None, {}, []):
            yield f"{indent}{key:{width}}  {_plain(value)}" if indent else f"{key}: {_plain(value)}"
    if indent and len(document) > SHOWN:
        yield f"{indent}… and {len(document) - SHOWN} more (--json lists all)"


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
