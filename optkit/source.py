"""Checkpoints in: whatever the user has becomes a ``TorchModel`` or an ``OnnxModel`` with a known signature.

What a file is gets decided by its content. Nothing in it runs unless the user trusts it, and a live module is copied,
never changed.

``TorchModel.module`` takes the inputs by position, in the order of ``signature.inputs``, and returns a tensor, a flat
tuple or list, or a flat dict of tensors in the order of ``signature.outputs``. A module that wants or gives anything
else is wrapped until it does.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import hashlib
import importlib
import importlib.util
import inspect
import itertools
import json
import logging
import re
import sys
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from optkit.errors import CheckpointError, UnavailableError, did_you_mean
from optkit.models import DTYPES, DimRange, OnnxModel, Signature, TensorSpec, TorchModel

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from optkit.recipe import ModelSource, Recipe

log = logging.getLogger("optkit.source")

READS = (
    "a torch.export .pt2, a state_dict (torch.save or safetensors) with a factory, TorchScript, ONNX, "
    "or a Hugging Face model folder"
)


@dataclass(frozen=True)
class Loaded:
    """A model ready for the pipeline, and where it came from (JSON-serializable, for the manifest)."""

    model: TorchModel | OnnxModel
    provenance: dict[str, Any]


def load_model(
    source: str | Path | torch.nn.Module | ir.Model | OnnxModel,
    recipe: Recipe,
    data_inputs: tuple[TensorSpec, ...] = (),
) -> Loaded:
    """Read a checkpoint, or take a model that is already in memory; the caller's object is never changed.

    Args:
        source: a file, a Hugging Face model folder, a module, or an ONNX model.
        recipe: ``model`` tells the factory and what to trust, ``inputs`` and ``dims`` the signature.
        data_inputs: the inputs that the data produces, for where neither recipe nor checkpoint say.

    Raises:
        CheckpointError: the source cannot be read, or does not fit its factory or its inputs.
        UnavailableError: a package that the source needs is not installed.
    """
    import onnx_ir as ir
    import torch

    if isinstance(source, (str, Path)):
        if not str(source):
            raise CheckpointError("no model: name a checkpoint, or set model.checkpoint in the recipe")
        return _from_path(Path(source).expanduser(), recipe, data_inputs)
    where = type(source).__name__
    if isinstance(source, torch.nn.Module):
        model = _torch_model(_Read(_copy(source), "module"), recipe, data_inputs, where)
        return Loaded(model, _provenance("module", recipe.model))
    if isinstance(source, OnnxModel):
        _refuse_nan(source.ir, where)
        if not recipe.inputs and not recipe.dims:
            return Loaded(source, _provenance("onnx", recipe.model))
        # Cloned: settling the signature renames dimensions in the graph
        changed = _onnx_model(source.ir.clone(), recipe, data_inputs, where)
        return Loaded(replace(changed, records=source.records), _provenance("onnx", recipe.model))
    if isinstance(source, ir.Model):
        return Loaded(_onnx_model(source.clone(), recipe, data_inputs, where), _provenance("onnx", recipe.model))
    raise CheckpointError(f"{where}: not a model; hand over a path, a torch.nn.Module or an onnx_ir.Model")


def _provenance(
    kind: str, source: ModelSource, path: Path | None = None, *, trusted_pickle: bool = False, **more: Any
) -> dict[str, Any]:
    by_factory = kind in ("state_dict", "safetensors")
    return {
        "kind": kind,
        "path": None if path is None else str(path),
        "sha256": None if path is None else _sha256(path),
        "factory": source.factory if by_factory else None,
        "arguments": dict(source.arguments) if by_factory else {},
        "trusted_pickle": trusted_pickle,
        **more,
    }


def _sha256(path: Path) -> str:
    """The hash of a file; of a folder, the hash of the hashes of its files, as ``sha256sum *`` lists them."""
    digest = hashlib.sha256()
    if path.is_dir():
        for part in sorted(part for part in path.iterdir() if part.is_file()):
            digest.update(f"{_sha256(part)}  {part.name}\n".encode())
        return digest.hexdigest()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# What is it?


def _from_path(path: Path, recipe: Recipe, data_inputs: tuple[TensorSpec, ...]) -> Loaded:
    kind = recognise(path)
    if kind == "onnx":
        model, external = _read_onnx(path, recipe, data_inputs)
        return Loaded(model, _provenance(kind, recipe.model, path, external_data=external))
    readers: dict[str, Callable[[Path, ModelSource], _Read]] = {
        "torch.export": _read_export,
        "torchscript": _read_torchscript,
        "torch.save": _read_pickle,
        "safetensors": _read_safetensors,
        "huggingface": _read_huggingface,
    }
    read = readers[kind](path, recipe.model)
    torch_model = _torch_model(read, recipe, data_inputs, str(path))
    return Loaded(torch_model, _provenance(read.kind, recipe.model, path, trusted_pickle=read.trusted_pickle))


_FOREIGN = {
    b"version https://git-lfs": "a Git LFS pointer instead of the file itself: run `git lfs pull`",
    b"\x89HDF": "HDF5, as Keras writes it",
    b"GGUF": "GGUF, quantized weights for llama.cpp",
    b"\x1f\x8b": "a gzip archive: unpack it first",
    b"<": "HTML or XML, perhaps the error page of a download",
}


def recognise(path: Path) -> str:
    """What a file or folder is, by its content: the name of one of the readers.

    Raises:
        CheckpointError: there is nothing, or nothing that optkit reads.
    """
    if path.is_dir():
        if (path / "config.json").is_file():
            return "huggingface"
        raise CheckpointError(f"{path}: a folder without config.json is no Hugging Face model; name the file in it")
    try:
        with path.open("rb") as file:
            head = file.read(64)
            size = path.stat().st_size
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file or folder (optkit reads local files only)") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if not head:
        raise CheckpointError(f"{path}: the file is empty; save or download the checkpoint again")
    if head.startswith(b"PK\x03\x04"):
        return _recognise_zip(path)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= max(size, 100_000_000):
        return "safetensors"
    if head[0] == 0x80:
        return "torch.save"
    if head[0] == 0x08 and len(head) > 1 and head[1] < 64:  # Field 1 of a ModelProto, the IR version
        return "onnx"
    known = next((what for magic, what in _FOREIGN.items() if head.startswith(magic)), "nothing known")
    raise CheckpointError(f"{path}: starts with {head[:8]!r}, which is {known}; optkit reads {READS}")


def _recognise_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise _damaged(path, "a zip archive without its end") from error
    members = {name.partition("/")[2] for name in names}
    if len({name.partition("/")[0] for name in names}) == 1 and len(set(names)) == len(names):
        if any(member.startswith("data/aotinductor/") for member in members):
            raise CheckpointError(f"{path}: compiled by AOTInductor; give the .pt2 that torch.export.save wrote")
        if any(member.startswith("models/") for member in members):
            return "torch.export"
        if "constants.pkl" in members:
            return "torchscript"
        if "data.pkl" in members:
            return "torch.save"
    if "serialized_exported_program.json" in names:
        raise CheckpointError(f"{path}: a .pt2 of torch 2.7 or older; write it again with a newer torch.export.save")
    raise CheckpointError(f"{path}: a zip archive with {', '.join(names[:3]) or 'nothing'} in it; optkit reads {READS}")


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: truncated or damaged: {what}; save or download the checkpoint again")


# Readers


@dataclass(frozen=True)
class _Read:
    """What a reader found: the module, and what the file says about its inputs."""

    module: torch.nn.Module
    kind: str
    trusted_pickle: bool = False
    declared: _Declared | None = None
    """Inputs that the file fixes."""
    guessed: Signature | None = None
    """Inputs for when nobody says anything."""
    parameters: tuple[inspect.Parameter, ...] | None = None
    """What forward takes, where its Python signature does not tell."""


@dataclass(frozen=True)
class _Declared:
    """The inputs as a file fixes them: a dimension is a size, a symbol, or a symbol that serves as its name too."""

    inputs: tuple[TensorSpec, ...]
    ranges: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)
    named: frozenset[str] = frozenset()


def _read_export(path: Path, source: ModelSource) -> _Read:
    import torch

    danger = _danger_in_export(path)
    if danger and not source.trust_pickle:
        raise CheckpointError(
            f"{path}: {danger}, so reading this .pt2 could run code; write it again with torch.export.save, "
            "or give --trust-pickle if you know who wrote it"
        )
    try:
        program = torch.export.load(path)
    except Exception as error:
        raise CheckpointError(
            f"{path}: torch {torch.__version__} cannot read this .pt2: {_reason(error)}; "
            "it is damaged, or another version of torch wrote it: export it again"
        ) from error
    inputs, parameters = _exported_inputs(program, path)
    if any(_is_training(node) for node in program.graph.nodes):
        raise CheckpointError(f"{path}: exported in training mode; call model.eval() before torch.export.export")
    module = program.module()
    for part in module.modules():
        part.training = False  # eval() is not supported on exported modules, and the graph is fixed anyway
    ranges = {str(symbol): _bounds(bounds) for symbol, bounds in program.range_constraints.items()}
    return _Read(module, "torch.export", bool(danger), _Declared(inputs, ranges), parameters=parameters)


def _exported_inputs(program: Any, path: Path) -> tuple[tuple[TensorSpec, ...], tuple[inspect.Parameter, ...]]:
    import torch

    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    users: list[Any] = [
        values.get(name) if isinstance(name, str) else name for name in program.graph_signature.user_inputs
    ]
    args, kwargs = program.call_spec.in_spec.children()
    names = program.module_call_graph[0].signature.forward_arg_names or []
    flat = args.num_children + kwargs.num_children == len(users) == len(names)
    if not (flat and all(isinstance(value, torch.Tensor) for value in users) and all(map(str.isidentifier, names))):
        raise CheckpointError(f"{path}: takes inputs other than plain tensors; export a module that takes tensors only")
    specs = (
        TensorSpec(name, _dtype(value.dtype, f"{path}: input {name!r}"), tuple(map(_dim, value.shape)))
        for name, value in zip(names, users, strict=True)
    )
    kinds = itertools.chain(
        itertools.repeat(inspect.Parameter.POSITIONAL_OR_KEYWORD, args.num_children),
        itertools.repeat(inspect.Parameter.KEYWORD_ONLY),
    )
    return tuple(specs), tuple(inspect.Parameter(name, kind) for name, kind in zip(names, kinds))  # noqa: B905


def _dim(dim: Any) -> int | str:
    return dim if isinstance(dim, int) else str(dim)


def _bounds(bounds: Any) -> tuple[int, int | None]:
    """The range of a symbol. torch.export assumes 2 where nothing is said, and lets 1 pass, so 2 counts as 1."""
    lower, upper = str(bounds.lower), str(bounds.upper)
    return (int(lower) if lower.isdigit() and int(lower) > 2 else 1), (int(upper) if upper.isdigit() else None)


def _is_training(node: Any) -> bool:
    if str(node.target) not in ("aten.dropout.default", "aten.batch_norm.default"):
        return False
    names = [argument.name for argument in node.target._schema.arguments]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    # Without running statistics, batch_norm uses those of the batch in eval mode too
    return given.get("train") is True or (given.get("training") is True and given.get("running_mean") is not None)


_OPERATORS = re.compile(
    "abs|add|and_|eq|floordiv|ge|getitem|gt|invert|le|lshift|lt|mod|mul|ne|neg|not_|or_|pos|pow|rshift|sub|truediv|xor"
)


def _danger_in_export(path: Path) -> str | None:
    """Why reading a .pt2 could run code, or None.

    ``torch.export.load`` unpickles example inputs and unusual tensors without ``weights_only``, evaluates symbolic
    sizes and guards as Python, writes Python from names, and looks operators up by name: all of it is checked first.
    """
    with zipfile.ZipFile(path) as archive:
        try:
            texts = {name: archive.read(name) for name in archive.namelist() if name.endswith(".json")}
            documents = {name.partition("/")[2]: json.loads(text) for name, text in texts.items()}
        except (zipfile.BadZipFile, ValueError, OSError) as error:
            raise _damaged(path, _reason(error)) from error
        pairs = [pair for document in documents.values() for pair in _pairs(document)]
        pickled = {value.get("path_name") for _, value in pairs if isinstance(value, dict) and value.get("use_pickle")}
        for name in archive.namelist():
            base = name.rpartition("/")[2]
            if base.startswith(("custom_obj_", "opaque_obj_")):
                return f"it holds the pickled object {base}"
            if (base.endswith(".pt") or base in pickled) and (refused := _refused_in(archive, name)):
                return f"{name.partition('/')[2]} pickles {refused}"
    return next((why for key, value in pairs if (why := _danger_in_value(key, value))), None)


def _pairs(document: Any) -> Iterator[tuple[str, Any]]:
    """Every key of a JSON document with its value, at any depth; the items of a list carry the list's key."""
    for key, value in document.items() if isinstance(document, dict) else ():
        yield from ((key, item) for item in (value if isinstance(value, list) else [value]))
    for value in document.values() if isinstance(document, dict) else document if isinstance(document, list) else ():
        yield from _pairs(value)


def _refused_in(archive: zipfile.ZipFile, member: str) -> str | None:
    import io

    content = archive.read(member)
    try:
        if content:
            unpickle(io.BytesIO(content))
    except RefusedPickleError as error:
        return str(error)
    except Exception as error:
        return f"something unreadable ({_reason(error)})"
    return None


def _danger_in_value(key: str, value: Any) -> str | None:
    if not isinstance(value, str):
        return None
    if key in ("expr_str", "guards_code") and not _is_arithmetic(value):
        return f"its {key} {value[:80]!r} is no arithmetic"
    if key in ("name", "as_name") and not re.fullmatch(r"[\w.]*", value):
        return f"the name {value[:80]!r} is no identifier"
    if key in ("target", "as_operator") and not _is_operator(value):
        return f"it calls {value[:80]!r}, which is no operator that is registered here"
    return None


def _is_arithmetic(text: str) -> bool:
    """Whether the text only computes with sizes: ``Mul(Integer(2), Symbol('s0'))``, ``L['x'].size()[0] % 4 == 0``."""
    try:
        return all(map(_is_harmless, ast.walk(ast.parse(text, mode="eval"))))
    except (SyntaxError, ValueError):
        return False


def _is_harmless(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):  # of a class of sympy, or of the size of a tensor
        return isinstance(node.func, ast.Attribute) or (
            isinstance(node.func, ast.Name)
            and re.fullmatch(r"[A-Z]\w*|floor|ceiling|abs|min|max", node.func.id) is not None
        )
    if isinstance(node, ast.Attribute):
        return node.attr in ("size", "stride", "storage_offset", "dim")
    if isinstance(node, ast.Constant):  # torch pastes guards into source code between quotes
        return isinstance(node.value, (int, float)) or re.fullmatch(r"[\w.]*", str(node.value)) is not None
    compound = (ast.Expression, ast.Subscript, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp)
    parts = (ast.Name, ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context, ast.keyword)
    return isinstance(node, (*compound, *parts))


def _is_operator(target: str) -> bool:
    import torch

    if target.startswith("torch.ops."):
        found: Any = torch.ops
        for name in target.split(".")[2:]:
            found = getattr(found, name, None)
        return isinstance(found, torch._ops.OperatorBase)
    root, _, name = target.partition(".")
    return {
        "_operator": _OPERATORS.fullmatch(name) is not None,
        "math": name.isidentifier(),
        "torch": re.fullmatch(r"_?sym_\w+", name) is not None,
    }.get(root, False)


def _read_torchscript(path: Path, source: ModelSource) -> _Read:
    import torch

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
            module = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise _damaged(path, _reason(error)) from error
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = (
        inspect.Parameter(a.name, kind, default=a.default_value if a.has_default_value() else inspect.Parameter.empty)
        for a in module.forward.schema.arguments[1:]
    )
    return _Read(module, "torchscript", parameters=tuple(parameters))


class RefusedPickleError(Exception):
    """``weights_only`` met this global, which is not on torch's list of harmless ones."""


def unpickle(file: Any) -> Any:
    """``torch.load`` that runs no code."""
    import pickle

    import torch

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]*\w)", str(error))
        raise RefusedPickleError(named[1] if named else "something other than tensors") from error


def _read_pickle(path: Path, source: ModelSource) -> _Read:
    trusted = False
    try:
        content = unpickle(path)
    except RefusedPickleError as refused:
        if not source.trust_pickle:
            raise CheckpointError(
                f"{path}: the pickle names {refused}, and unpickling it could run code, so it was not loaded. Where "
                "the model was made, write torch.save(model.state_dict(), ...) and give --model module:factory here, "
                "or write torch.export.save(torch.export.export(...), ...). If you trust the file: --trust-pickle"
            ) from refused
        content, trusted = _unpickle_trusted(path), True
    except Exception as error:
        raise _damaged(path, _reason(error)) from error
    return _from_content(path, content, source, trusted)


def _unpickle_trusted(path: Path) -> Any:
    import torch

    with _importable(Path.cwd()):
        try:
            return torch.load(path, map_location="cpu", weights_only=False)
        except Exception as error:
            raise CheckpointError(
                f"{path}: unpickling failed: {_reason(error)}{_blame(error)}; the code of a pickled module must be "
                "importable (PYTHONPATH)"
            ) from error


def _from_content(path: Path, content: Any, source: ModelSource, trusted: bool) -> _Read:
    import torch

    inner = content
    for key in ("state_dict", "model_state_dict", "model", "module", "net"):
        if isinstance(content, Mapping) and isinstance(content.get(key), (Mapping, torch.nn.Module)):
            inner = content[key]
            break
    if isinstance(inner, torch.nn.Module):
        return _Read(inner, "pickle", trusted)
    has_tensors = isinstance(inner, Mapping) and any(isinstance(value, torch.Tensor) for value in inner.values())
    if not has_tensors or not all(isinstance(key, str) for key in inner):
        what = f"a dict of {', '.join(map(str, list(content)[:5]))}" if isinstance(content, Mapping) else type(content)
        raise CheckpointError(f"{path}: holds {what}, but no state_dict; save model.state_dict()")
    return _Read(_built(path, dict(inner), getattr(inner, "_metadata", None), source), "state_dict", trusted)


def _read_safetensors(path: Path, source: ModelSource) -> _Read:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(path)
    except SafetensorError as error:
        raise _damaged(path, _reason(error)) from error
    return _Read(_built(path, state, None, source), "safetensors")


def _read_huggingface(path: Path, source: ModelSource) -> _Read:
    try:
        import transformers
    except ImportError as error:
        raise UnavailableError(f"{path}: a Hugging Face model needs transformers: pip install transformers") from error
    try:
        with _quiet_transformers(transformers):
            config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
            module, notes = _auto_class(transformers, config, path).from_pretrained(
                path, config=config, local_files_only=True, trust_remote_code=False, output_loading_info=True
            )
    except Exception as error:
        raise CheckpointError(f"{path}: transformers cannot load this folder: {_reason(error)}") from error
    if missing := sorted(map(str, [*notes["missing_keys"], *notes["mismatched_keys"]])):
        # transformers would go on with random numbers
        raise CheckpointError(
            f"{path}: the weights lack {_few(missing)} of {type(module).__name__}; correct config.json"
        )
    if unexpected := sorted(notes["unexpected_keys"]):
        log.warning("%s: weights that %s does not use: %s", path, type(module).__name__, _few(unexpected))
    if hasattr(module.config, "use_cache"):
        module.config.use_cache = False
    return _Read(module, "huggingface", guessed=_text_inputs(module))


def _auto_class(transformers: Any, config: Any, path: Path) -> Any:
    """``BertForMaskedLM`` wants ``AutoModelForMaskedLM``, and ``BertModel`` wants ``AutoModel``."""
    architecture = (config.architectures or ["Model"])[0]
    head = re.search(r"For[A-Z]\w*$", architecture)
    if head is not None and not hasattr(transformers, f"AutoModel{head[0]}"):
        log.warning("%s: transformers has no AutoModel%s; loaded without its head", path, head[0])
    return getattr(transformers, f"AutoModel{head[0]}" if head else "AutoModel", transformers.AutoModel)


@contextlib.contextmanager
def _quiet_transformers(transformers: Any) -> Iterator[None]:
    """No progress bars and no reports of its own: what matters in them is raised or logged here."""
    settings = transformers.utils.logging
    bars, verbosity = settings.is_progress_bar_enabled(), settings.get_verbosity()
    settings.disable_progress_bar()
    settings.set_verbosity_error()
    try:
        yield
    finally:
        settings.set_verbosity(verbosity)
        if bars:
            settings.enable_progress_bar()


def _text_inputs(module: Any) -> Signature | None:
    """Token ids and their mask, for a model that takes them."""
    taken = inspect.signature(module.forward).parameters
    names = [name for name in ("input_ids", "attention_mask") if name in taken]
    if module.main_input_name != "input_ids" or not names:
        return None
    # 514 positions mean 512 tokens in the RoBERTa family
    longest = 1 << (getattr(module.config, "max_position_embeddings", 512).bit_length() - 1)
    longest = min(longest, 512)
    specs = tuple(TensorSpec(name, "int64", ("batch", "sequence")) for name in names)
    return Signature(specs, (), {"sequence": DimRange(1, min(128, longest), longest)})


# Factories and state_dicts


def _built(path: Path, state: dict[str, Any], metadata: Any, source: ModelSource) -> torch.nn.Module:
    if source.factory is None:
        raise CheckpointError(
            f"{path}: holds a state_dict, {len(state)} tensors ({_few(list(state))}) but not the network; say which "
            "function builds it: --model module:function or --model path.py:function"
        )
    module = _call_factory(source.factory, source.arguments)
    _load_state(module, _without_prefix(state, module), metadata, f"{path} in {source.factory}")
    return module


def _call_factory(text: str, arguments: Mapping[str, Any]) -> torch.nn.Module:
    import torch

    place, _, name = text.rpartition(":")
    if not place or not name:
        raise CheckpointError(f"factory {text!r}: write module:function or path.py:function")
    folder = Path(place).expanduser().resolve().parent if place.endswith(".py") else Path.cwd()
    with _importable(folder):
        space = _import_file(place) if place.endswith(".py") else _import_module(place)
        factory = getattr(space, name, None)
        if not callable(factory):
            known = [key for key, value in vars(space).items() if callable(value) and not key.startswith("_")]
            raise CheckpointError(f"factory {text!r}: {place} has no function {name!r}; {did_you_mean(name, known)}")
        try:
            module = factory(**arguments)
        except (Exception, SystemExit) as error:
            raise CheckpointError(
                f"factory {text!r} ({_defined(factory)}) raised {_reason(error)}{_blame(error)}"
            ) from error
    if not isinstance(module, torch.nn.Module):
        raise CheckpointError(
            f"factory {text!r} ({_defined(factory)}) returned {type(module).__name__}; it must return a torch.nn.Module"
        )
    return module


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let the user's file import its neighbours, and only while it is needed."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))


def _import_file(place: str) -> Any:
    path = Path(place).expanduser().resolve()
    if not path.is_file():
        raise CheckpointError(f"factory {place!r}: no such file")
    name = f"_optkit_factory_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and torch.export look their classes' module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise CheckpointError(f"factory {place!r} cannot be imported: {_reason(error)}{_blame(error)}") from error
    return module


def _import_module(place: str) -> Any:
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name and f"{place}.".startswith(f"{error.name}."):
            raise CheckpointError(
                f"factory: no module {error.name!r}; install it, or write the path of the file: path.py:function"
            ) from error
        raise CheckpointError(f"factory {place!r} cannot be imported: {_reason(error)}{_blame(error)}") from error
    except (Exception, SystemExit) as error:
        raise CheckpointError(f"factory {place!r} cannot be imported: {_reason(error)}{_blame(error)}") from error


def _defined(factory: Any) -> str:
    try:
        return f"{inspect.getsourcefile(factory)}:{inspect.getsourcelines(factory)[1]}"
    except (TypeError, OSError):
        return "not written in Python"


def _without_prefix(state: dict[str, Any], module: torch.nn.Module) -> dict[str, Any]:
    """The state_dict without what DataParallel, torch.compile and Lightning put in front of every key."""
    own = module.state_dict()
    for prefix in ("module.", "_orig_mod.", "model."):
        if all(key.startswith(prefix) for key in state) and not any(key.startswith(prefix) for key in own):
            log.info("dropped the prefix %r from the keys of the state_dict", prefix)
            state = {key[len(prefix) :]: value for key, value in state.items()}
    return state


def _load_state(module: torch.nn.Module, state: dict[str, Any], metadata: Any, where: str) -> None:
    from collections import OrderedDict

    ordered = OrderedDict(state)
    if metadata is not None:
        setattr(ordered, "_metadata", metadata)  # noqa: B010 - versions, by which torch converts old layouts
    own = module.state_dict()
    try:
        result = module.load_state_dict(ordered, strict=False)
    except RuntimeError as error:
        shapes = [f"{key} is {_shape(state[key])}, not {_shape(own[key])}" for key in own if _differ(key, own, state)]
        missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        problem = _misfit(missing, unexpected, shapes) or _reason(error)
        raise CheckpointError(f"{where}: the state_dict does not fit: {problem}") from error
    # Tied weights are saved once, and BatchNorm's count of batches has no part in inference
    loaded = {own[key].data_ptr() for key in own.keys() - set(result.missing_keys)}
    missing = [
        key
        for key in result.missing_keys
        if not key.endswith("num_batches_tracked") and (key not in own or own[key].data_ptr() not in loaded)
    ]
    if problem := _misfit(missing, result.unexpected_keys, []):
        raise CheckpointError(f"{where}: the state_dict does not fit: {problem}")


def _differ(key: str, own: Mapping[str, Any], state: Mapping[str, Any]) -> bool:
    return key in state and _shape(own[key]) != _shape(state[key])


def _shape(value: Any) -> str:
    shape = None if "Uninitialized" in type(value).__name__ else getattr(value, "shape", None)
    return "?" if shape is None else str(list(shape))


def _misfit(missing: Sequence[str], unexpected: Sequence[str], shapes: Sequence[str]) -> str:
    groups = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
    text = "; ".join(f"{len(keys)} {what}: {_few(keys)}" for what, keys in groups if keys)
    return f"{text}; check the factory and its arguments" if text else ""


def _few(words: Sequence[str], count: int = 3) -> str:
    more = f" and {len(words) - count} more" if len(words) > count else ""
    return ", ".join(words[:count]) + more


# PyTorch modules


def _copy(module: torch.nn.Module) -> torch.nn.Module:
    import copy

    try:
        return copy.deepcopy(module)
    except Exception as error:
        raise CheckpointError(
            f"{type(module).__name__} cannot be copied: {_reason(error)}; hand over a state_dict with a factory instead"
        ) from error


def _torch_model(read: _Read, recipe: Recipe, data_inputs: tuple[TensorSpec, ...], where: str) -> TorchModel:
    module = read.module
    _refuse_empty(module, where)
    if read.declared is None:
        module = module.eval().cpu()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    _refuse_non_finite(module, where)
    parameters = read.parameters
    if parameters is None:
        parameters = tuple(inspect.signature(module.forward).parameters.values())
    inputs, dims = _torch_inputs(read, recipe, data_inputs, parameters, where)
    inputs = _in_order(inputs, parameters, f"{where}: {type(module).__name__}.forward")
    keywords = _by_keyword(inputs, parameters)
    outputs, plain = _probe(module, keywords, Signature(inputs, (), dims), where)
    if keywords or not plain:
        module = _adapted(module, tuple(spec.name for spec in inputs), keywords)
    return TorchModel(module, Signature(inputs, outputs, dims))


def _refuse_empty(module: torch.nn.Module, where: str) -> None:
    tensors = itertools.chain(module.named_parameters(), module.named_buffers())
    empty = [name for name, tensor in tensors if tensor.is_meta or "Uninitialized" in type(tensor).__name__]
    if empty:
        raise CheckpointError(
            f"{where}: {len(empty)} tensor(s) have no values yet: {_few(empty)}; load the weights first (lazy modules "
            "and the meta device have none)"
        )


def _refuse_non_finite(module: torch.nn.Module, where: str) -> None:
    """NaN is never right; infinity is in a buffer, where attention masks have it."""

    def is_bad(tensor: torch.Tensor, infinite: bool) -> bool:
        if not tensor.is_floating_point():
            return False
        values = tensor if tensor.element_size() > 1 else tensor.float()
        return bool(values.isnan().any()) or (infinite and bool(values.isinf().any()))

    bad = [name for name, tensor in module.named_parameters() if is_bad(tensor, infinite=True)]
    bad += [name for name, tensor in module.named_buffers() if is_bad(tensor, infinite=False)]
    if bad:
        raise CheckpointError(
            f"{where}: NaN or infinity in {len(bad)} tensor(s): {_few(bad)}; "
            "take a checkpoint from before the training diverged"
        )


def _torch_inputs(
    read: _Read,
    recipe: Recipe,
    data_inputs: tuple[TensorSpec, ...],
    parameters: Sequence[inspect.Parameter],
    where: str,
) -> tuple[tuple[TensorSpec, ...], dict[str, DimRange]]:
    if read.declared is not None:
        names = _settle(read.declared, recipe, data_inputs, where)
        return _settled(read.declared, names, recipe, where)
    wanted = _wanted(recipe) or data_inputs or (read.guessed.inputs if read.guessed else ())
    if not wanted:
        takes = next((p.name for p in parameters if p.kind not in _VARIADIC), "image")
        raise CheckpointError(
            f"{where}: neither checkpoint, recipe nor data say what the inputs are "
            f"({type(read.module).__name__}.forward takes {_listed(parameters)}); "
            f"write --input {takes}=float32[batch,3,224,224] with the dtype and the dimensions of yours"
        )
    symbols = frozenset(dim for spec in wanted for dim in spec.shape if isinstance(dim, str))
    guessed = read.guessed.dims if read.guessed else {}
    declared = _Declared(wanted, {}, symbols)
    inputs, dims = _settled(declared, {symbol: symbol for symbol in symbols}, recipe, where)
    dynamic = {dim for spec in inputs for dim in spec.shape}
    return inputs, {**{dim: bounds for dim, bounds in guessed.items() if dim in dynamic}, **dims}


def _wanted(recipe: Recipe) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec.parse(name, text) for name, text in recipe.inputs.items())


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _listed(parameters: Iterable[inspect.Parameter]) -> str:
    return ", ".join(_written(parameter) for parameter in parameters) or "nothing"


def _written(parameter: inspect.Parameter) -> str:
    if parameter.kind in _VARIADIC:
        return f"{'*' * (1 + _VARIADIC.index(parameter.kind))}{parameter.name}"
    return parameter.name if parameter.default is parameter.empty else f"{parameter.name}=..."


def _in_order(
    inputs: tuple[TensorSpec, ...], parameters: Sequence[inspect.Parameter], forward: str
) -> tuple[TensorSpec, ...]:
    """The inputs in the order of forward's parameters."""
    # Names beside **kwargs are checked too: there a typo would be swallowed without a word
    parameters = [parameter for parameter in parameters if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
    if not parameters or any(parameter.kind in _VARIADIC for parameter in parameters):
        return inputs
    order = {parameter.name: index for index, parameter in enumerate(parameters)}
    for spec in inputs:
        if spec.name not in order:
            hint = did_you_mean(spec.name, order)
            raise CheckpointError(f"{forward} takes {_listed(parameters)}, but no {spec.name!r}; {hint}")
    given = {spec.name for spec in inputs}
    lacking = [p.name for p in parameters if p.default is p.empty and p.name not in given]
    if lacking:
        raise CheckpointError(
            f"{forward} takes {_listed(parameters)}, and nothing describes {', '.join(lacking)}; "
            f"write --input {lacking[0]}=float32[batch,...]"
        )
    return tuple(sorted(inputs, key=lambda spec: order[spec.name]))


def _by_keyword(inputs: Sequence[TensorSpec], parameters: Sequence[inspect.Parameter]) -> tuple[str, ...]:
    """The inputs that forward takes by keyword only, or after a parameter that is left out."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    fronts = [parameter.name for parameter in parameters if parameter.kind in kinds]
    if any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters):
        return ()
    names = [spec.name for spec in inputs]
    matching = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(names, fronts, strict=False))
    return tuple(names[len(list(matching)) :])


def _adapted(module: torch.nn.Module, names: tuple[str, ...], keywords: tuple[str, ...]) -> torch.nn.Module:
    """A module that takes exactly these inputs, by position or by name, and returns a flat tuple of tensors."""
    import torch

    class Adapted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
            given = dict(zip(names, args, strict=False), **kwargs)
            output = _call(self.module, {name: given[name] for name in names}, keywords)
            return tuple(tensor for _, tensor in _tensors(output))

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature([inspect.Parameter(name, kind) for name in ("self", *names)])
    # Exporters name and match the inputs by the signature
    setattr(Adapted.forward, "__signature__", signature)  # noqa: B010
    adapted = Adapted()
    adapted.training = False  # eval() would reach into the module, and an exported one refuses it
    return adapted


def _tensors(output: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in what a forward returns, with names; caches and None are left out."""
    import torch

    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(output, torch.Tensor):
        yield name or "output", output
    elif isinstance(output, Mapping):
        items = output.items()
    elif dataclasses.is_dataclass(output):
        items = ((part.name, getattr(output, part.name)) for part in dataclasses.fields(output))
    elif isinstance(output, tuple) and hasattr(output, "_fields"):
        items = zip(output._fields, output, strict=True)
    elif isinstance(output, (tuple, list)):
        name = name or "output"
        items = enumerate(output)
    for key, value in items:
        yield from _tensors(value, f"{name}_{key}" if name else str(key))


def _is_plain(output: Any) -> bool:
    import torch

    values = list(output.values()) if type(output) is dict else output
    if type(values) not in (tuple, list):
        return isinstance(output, torch.Tensor)
    return all(isinstance(value, torch.Tensor) for value in values)


# Which output dimension follows which input dimension


@dataclass(frozen=True)
class _Run:
    """What one call of a module returned."""

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    plain: bool


def _probe(
    module: torch.nn.Module, keywords: Sequence[str], signature: Signature, where: str
) -> tuple[tuple[TensorSpec, ...], bool]:
    """Run the module at two sizes of every dynamic dimension and see which dimensions of the outputs follow.

    Returns:
        The outputs, and whether the module returns a flat structure of tensors as it is.
    """
    choices = {dim: _sizes_to_try(signature.range(dim)) for dim in signature.dynamic}
    picks = range(max(map(len, choices.values()), default=1))
    bases = [{dim: sizes[min(pick, len(sizes) - 1)] for dim, sizes in choices.items()} for pick in picks]
    with _unchanged(module):
        base, first = _first_that_runs(module, keywords, signature, bases, where)
        others = {}
        for dim, sizes in choices.items():
            changed = [{**base, dim: size} for size in sizes if size != base[dim]]
            others[dim] = _first_that_runs(module, keywords, signature, changed, f"{where}: at another {dim}")
    if not first.names:
        raise CheckpointError(f"{where}: forward returns no tensor; return tensors, or a tuple or dict of them")
    runs = [first, *(run for _, run in others.values())]
    if len({(run.names, run.dtypes, tuple(map(len, run.shapes))) for run in runs}) > 1:
        raise CheckpointError(f"{where}: names, dtypes or ranks of the outputs change with the size of the inputs")
    pairs = {dim: (base[dim], changed[dim]) for dim, (changed, _) in others.items()}
    names = _unique(first.names, {spec.name for spec in signature.inputs})
    shapes = _shapes(names, runs, pairs)
    return tuple(map(TensorSpec, names, first.dtypes, shapes)), first.plain


def _sizes_to_try(bounds: DimRange) -> list[int]:
    """Small sizes first, since two are enough; 1 last, since it hides broadcasting."""
    low = max(2, bounds.min)
    sizes = (low, low + 1, bounds.opt, bounds.max, bounds.min)
    kept = dict.fromkeys(size for size in sizes if bounds.min <= size <= bounds.max)
    return sorted(kept, key=lambda size: size == 1)


@contextlib.contextmanager
def _unchanged(module: torch.nn.Module) -> Iterator[None]:
    """Undo what a forward does to buffers, and to torch's random numbers."""
    import torch

    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        yield
        for name, buffer in module.named_buffers():
            if name in before and buffer.shape == before[name].shape:
                buffer.copy_(before[name])


def _first_that_runs(
    module: torch.nn.Module, keywords: Sequence[str], signature: Signature, sizes: list[dict[str, int]], where: str
) -> tuple[dict[str, int], _Run]:
    """Run at the first of these sizes that forward accepts."""
    failures: list[tuple[dict[str, int], Exception]] = []
    for chosen in sizes:
        feeds = signature.random_feeds(np.random.default_rng(0), **chosen)
        try:
            output = _call(module, {name: _tensor(value) for name, value in feeds.items()}, keywords)
        except Exception as error:
            failures.append((chosen, error))
            continue
        named = list(_tensors(output))
        dtypes = tuple(_dtype(tensor.dtype, f"{where}: output {name!r}") for name, tensor in named)
        shapes = tuple(tuple(tensor.shape) for _, tensor in named)
        return chosen, _Run(tuple(name for name, _ in named), dtypes, shapes, _is_plain(output))
    if not failures:
        raise CheckpointError(f"{where}: there is only one size to try; give it as a fixed size")
    chosen, failure = failures[0]
    tried = ", ".join(
        f"{spec.name} of {list(spec.sized(chosen))}" for spec in signature.inputs if set(spec.shape) & chosen.keys()
    )
    raise CheckpointError(
        f"{where}: forward does not accept the inputs {', '.join(f'{s.name}={s}' for s in signature.inputs)}"
        f"{f' (tried {tried})' if tried else ''}: {_reason(failure)}{_blame(failure)}; correct them with "
        "--input name=float32[batch,...], or their sizes with `dims` in the recipe"
    ) from failure


def _call(module: torch.nn.Module, values: Mapping[str, Any], keywords: Sequence[str]) -> Any:
    positional = [value for name, value in values.items() if name not in keywords]
    return module(*positional, **{name: values[name] for name in keywords})


def _tensor(array: np.ndarray[Any, Any]) -> torch.Tensor:
    import torch

    if array.dtype.name == "bfloat16":  # torch does not know NumPy's bfloat16, but it has the same bits
        return torch.from_numpy(np.asarray(array).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.asarray(array))


def _dtype(dtype: torch.dtype, where: str) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise CheckpointError(f"{where} is {name}; optkit has {', '.join(DTYPES)}: cast it in forward")
    return name


def _unique(names: Sequence[str], taken: Iterable[str]) -> tuple[str, ...]:
    """Names that differ from each other and from the inputs, as ONNX wants them."""
    used = set(taken)
    unique = []
    for name in names:
        tries = itertools.chain((name, f"{name}_output"), (f"{name}_output_{i}" for i in itertools.count(1)))
        unique.append(next(text for text in tries if text not in used))
        used.add(unique[-1])
    return tuple(unique)


def _shapes(
    names: Sequence[str], runs: Sequence[_Run], sizes: Mapping[str, tuple[int, int]]
) -> list[tuple[int | str, ...]]:
    """A dimension is a size if it never changed, an input's dimension if it equalled that, else a fresh name."""
    fresh: dict[tuple[int, ...], str] = {}

    def dim(output: int, axis: int) -> int | str:
        seen = tuple(run.shapes[output][axis] for run in runs)
        moved = [name for name, size in zip(sizes, seen[1:], strict=True) if size != seen[0]]
        if not moved:
            return seen[0]
        if len(moved) == 1 and (seen[0], seen[1 + list(sizes).index(moved[0])]) == sizes[moved[0]]:
            return moved[0]
        return fresh.setdefault(seen, f"{names[output]}_dim_{axis}")

    return [tuple(dim(i, axis) for axis in range(len(shape))) for i, shape in enumerate(runs[0].shapes)]


# Dimensions of a file that has its own


def _settle(
    declared: _Declared, recipe: Recipe, data_inputs: tuple[TensorSpec, ...], where: str
) -> dict[str, str | int]:
    """A name or a fixed size for every symbol of the file: the recipe's, the file's own, the data's, or a fresh one."""
    names: dict[str, str | int] = {}
    ours = {spec.name: spec for spec in declared.inputs}
    for wish in _wanted(recipe):
        if wish.name not in ours:
            raise CheckpointError(f"{where}: has no input {wish.name!r}; {did_you_mean(wish.name, ours)}")
        for symbol, want in _paired(ours[wish.name], wish, where):
            if names.setdefault(symbol, want) != want:
                raise CheckpointError(
                    f"{where}: {names[symbol]} and {want} are one dimension in this file; give them one name"
                )
    for symbol in declared.named:
        names.setdefault(symbol, symbol)
    for spec in data_inputs:
        for dim, theirs in zip(ours[spec.name].shape, spec.shape, strict=False) if spec.name in ours else ():
            if not isinstance(theirs, str):
                continue
            if isinstance(dim, str):
                names.setdefault(dim, theirs)
            elif spec.name not in recipe.inputs:
                log.warning(
                    "%s: input %r is fixed at %s, though the data gives %s; export it with dynamic_shapes for that",
                    where,
                    spec.name,
                    ours[spec.name],
                    spec,
                )
                break
    fronts = [spec.shape[0] if spec.shape else 0 for spec in declared.inputs]
    if all(isinstance(front, str) and front not in names for front in fronts) and "batch" not in names.values():
        names.update(dict.fromkeys(map(str, fronts), "batch"))
    spare = itertools.chain(
        (dim for dim in recipe.dims if dim not in names.values()), (f"dim_{i}" for i in itertools.count())
    )
    for dim in (dim for spec in declared.inputs for dim in spec.shape):
        if isinstance(dim, str) and dim not in names:
            names[dim] = next(name for name in spare if name not in names.values())
    return names


def _paired(ours: TensorSpec, wish: TensorSpec, where: str) -> Iterator[tuple[str, str | int]]:
    """The symbols of an input with what the recipe calls them."""
    fits = ours.dtype == wish.dtype and len(ours.shape) == len(wish.shape)
    if not fits or any(isinstance(dim, int) and dim != want for dim, want in zip(ours.shape, wish.shape, strict=True)):
        raise CheckpointError(
            f"{where}: input {ours.name!r} is {ours} in the file and cannot become {wish}; export it anew for that"
        )
    return ((dim, want) for dim, want in zip(ours.shape, wish.shape, strict=True) if isinstance(dim, str))


def _settled(
    declared: _Declared, names: Mapping[str, str | int], recipe: Recipe, where: str
) -> tuple[tuple[TensorSpec, ...], dict[str, DimRange]]:
    """The inputs under their final names, and the ranges; a range of one size makes a dimension static."""
    dynamic = {name for name in names.values() if isinstance(name, str)}
    for dim in recipe.dims:
        if dim not in dynamic:
            hint = did_you_mean(dim, dynamic) if dynamic else "all of them are fixed"
            raise CheckpointError(f"{where}: `dims` names {dim!r}, which is no dynamic dimension of the inputs; {hint}")
    dims = dict(recipe.dims)
    for symbol, (low, high) in declared.ranges.items():
        name = names.get(symbol)
        if name is None:
            continue
        if isinstance(name, str) and name not in recipe.dims:
            old = dims.get(name, DimRange(low, low, high or max(low, 32)))
            low, high = max(low, old.min), min(high or old.max, old.max)
            dims[name] = DimRange(low, low, high)
        asked = dims[name] if isinstance(name, str) else DimRange(name, name, name)
        if asked.min < low or (high is not None and asked.max > high):
            raise CheckpointError(
                f"{where}: {name} may be {low} to {high or 'any size'} in this file, not {asked.min} to {asked.max}; "
                "change `dims`, or export it anew with that range"
            )
    fixed = {dim: bounds.min for dim, bounds in dims.items() if bounds.min == bounds.max}

    def final(dim: int | str) -> int | str:
        name = names[dim] if isinstance(dim, str) else dim
        return fixed.get(name, name) if isinstance(name, str) else name

    inputs = tuple(replace(spec, shape=tuple(map(final, spec.shape))) for spec in declared.inputs)
    return inputs, {dim: bounds for dim, bounds in dims.items() if dim not in fixed}


# ONNX


def _read_onnx(path: Path, recipe: Recipe, data_inputs: tuple[TensorSpec, ...]) -> tuple[OnnxModel, dict[str, str]]:
    """The model, and the hashes of the files beside it that hold its weights."""
    import onnx
    import onnx_ir as ir

    try:
        model = ir.load(path)
    except Exception as error:
        raise _damaged(path, f"not a whole ONNX model ({_reason(error)})") from error
    files = {Path(tensor.path) for _, tensor in _initializers(model) if isinstance(tensor, ir.ExternalTensor)}
    for file in sorted(files):
        if not file.is_file():
            raise CheckpointError(f"{path}: its weights are in {file.name}, which is not beside it; copy both files")
    try:
        onnx.checker.check_model(str(path))
    except (onnx.checker.ValidationError, ValueError) as error:
        raise CheckpointError(f"{path}: not a valid ONNX model: {_reason(error)}; export it again") from error
    return _onnx_model(model, recipe, data_inputs, str(path)), {file.name: _sha256(file) for file in sorted(files)}


def _onnx_model(model: ir.Model, recipe: Recipe, data_inputs: tuple[TensorSpec, ...], where: str) -> OnnxModel:
    """Settle the signature of a model that is ours to change."""
    import onnx_ir as ir
    from onnx_ir.passes.common import ShapeInferencePass

    _refuse_nan(model, where)
    if not model.graph.inputs or not model.graph.outputs:
        raise CheckpointError(f"{where}: an ONNX graph without inputs or outputs; export it again")
    try:
        model = ShapeInferencePass()(model).model
    except Exception as error:
        raise CheckpointError(f"{where}: the shapes of this ONNX graph contradict: {_reason(error)}") from error
    declared = _onnx_inputs(model, where)
    names = _settle(declared, recipe, data_inputs, where)
    inputs, dims = _settled(declared, names, recipe, where)
    final = {
        symbol: new
        for spec, before in zip(inputs, declared.inputs, strict=True)
        for symbol, new in zip(before.shape, spec.shape, strict=True)
        if isinstance(symbol, str)
    }
    _rename_dims(model, {symbol: new for symbol, new in final.items() if symbol != new})
    for value, spec in zip(_true_inputs(model), inputs, strict=True):
        value.shape = ir.Shape(spec.shape)
    outputs = tuple(_value_spec(value, f"{where}: output", f"{value.name}_dim_") for value in model.graph.outputs)
    return OnnxModel(model, Signature(inputs, outputs, dims))


def _onnx_inputs(model: ir.Model, where: str) -> _Declared:
    symbols = itertools.count()
    inputs = []
    named: set[str] = set()
    for value in _true_inputs(model):
        spec = _value_spec(value, f"{where}: input", "")
        named.update(dim for dim in spec.shape if isinstance(dim, str) and dim)
        inputs.append(replace(spec, shape=tuple(f"?{next(symbols)}" if dim == "" else dim for dim in spec.shape)))
    return _Declared(tuple(inputs), {}, frozenset(named))


def _true_inputs(model: ir.Model) -> list[ir.Value]:
    """The inputs that a caller feeds: models of IR version 3 list the initializers among them."""
    return [value for value in model.graph.inputs if value.name not in model.graph.initializers]


_ONNX_DTYPES = {"FLOAT": "float32", "DOUBLE": "float64"}  # the others are called alike


def _value_spec(value: ir.Value, what: str, unnamed: str) -> TensorSpec:
    dtype = (
        "of an unknown type" if value.dtype is None else _ONNX_DTYPES.get(value.dtype.name, value.dtype.name.lower())
    )
    if dtype not in DTYPES:
        raise CheckpointError(f"{what} {value.name!r} is {dtype}; optkit has {', '.join(DTYPES)}")
    if value.shape is None:
        raise CheckpointError(f"{what} {value.name!r} has no known number of dimensions; export it with shapes")
    dims = (
        dim if isinstance(dim, int) else str(dim.value or (unnamed and f"{unnamed}{axis}"))
        for axis, dim in enumerate(value.shape)
    )
    return TensorSpec(str(value.name), dtype, tuple(dims))


def _rename_dims(model: ir.Model, names: Mapping[str, str | int]) -> None:
    import onnx_ir as ir

    for graph in model.graphs() if names else ():
        values = itertools.chain(graph.inputs, (value for node in graph for value in node.outputs))
        for value in values:
            if value.shape is not None:
                dims = (dim if isinstance(dim, int) else names.get(str(dim.value), dim) for dim in value.shape)
                value.shape = ir.Shape(dims)


def _initializers(model: ir.Model) -> Iterator[tuple[str, Any]]:
    for graph in model.graphs():
        for name, value in graph.initializers.items():
            if value.const_value is not None:
                yield name, value.const_value


def _refuse_nan(model: ir.Model, where: str) -> None:
    """Infinity passes: ONNX keeps the constants of attention masks among the weights."""
    bad = []
    for name, tensor in _initializers(model):
        if tensor.dtype.is_floating_point():
            try:
                array = tensor.numpy()
            except Exception as error:
                raise CheckpointError(f"{where}: the weight {name} cannot be read: {_reason(error)}") from error
            if np.isnan(array if array.dtype.itemsize > 1 else array.astype(np.float32)).any():
                bad.append(name)
    if bad:
        raise CheckpointError(f"{where}: NaN in {len(bad)} weight(s): {_few(bad)}; export a healthy checkpoint")


# The words of errors


def _reason(error: BaseException) -> str:
    """The error in one line; TorchScript says what happened last, everyone else first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    line = lines[-1] if "TorchScript" in lines[0] else lines[0]
    return f"{type(error).__name__}: {line.removeprefix(f'{type(error).__name__}: ')}"


def _blame(error: BaseException) -> str:
    """Where the last line of the user's own code in a traceback is, and what it says."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" at {error.filename}:{error.lineno}"
    torch = sys.modules.get("torch")
    theirs = [str(Path(package.__file__).parent) for package in (importlib, torch) if package and package.__file__]
    frames = traceback.extract_tb(error.__traceback__)
    users = [frame for frame in frames if not frame.filename.startswith((__file__, "<", *theirs))]
    return f" at {users[-1].filename}:{users[-1].lineno}: `{users[-1].line}`" if users else ""
