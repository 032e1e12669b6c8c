"""Exports a PyTorch model to ONNX, and proves on fresh inputs that both compute the same."""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import os
import re
import sysconfig
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from optkit.context import Context
from optkit.errors import OptkitError, PostconditionError, PreconditionError
from optkit.models import DimRange, Feeds, OnnxModel, Signature, TensorSpec, TorchModel
from optkit.numerics import compare
from optkit.passes.base import Kind, Pass
from optkit.passes.graph_edit import infer_types
from optkit.targets.onnxruntime import open_onnx
from optkit.targets.pytorch import open_torch

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

log = logging.getLogger("optkit.passes")

TORCHSCRIPT_OPSET = 20
"""The newest opset that the TorchScript exporter writes."""


class ExportOnnx(Pass[TorchModel, OnnxModel]):
    """The module becomes an ONNX graph with the signature's names and dynamic dimensions.

    The exporter is ``torch.export``'s; what it cannot export goes through TorchScript tracing, with a warning. Models
    that are TorchScript already are traced at once.
    """

    takes: ClassVar[Kind] = "torch"
    gives: ClassVar[Kind] = "onnx"

    use: Literal["export_onnx"] = "export_onnx"
    opset: int = Field(default=20, ge=18, le=23)
    """Version of ai.onnx."""
    tolerance: float = Field(default=1e-3, gt=0)
    """The largest error against PyTorch that is accepted, relative to the largest value of the output."""

    def requires(self, model: TorchModel, context: Context) -> None:
        """Refuse an opset that the target does not read, and weights that are not finite."""
        import torch

        low, high = context.target.dialect.opsets
        if not low <= self.opset <= high:
            raise PreconditionError(
                f"the target {context.target.name!r} reads opsets {low} to {high}, not {self.opset}: set `opset`"
            )
        for name, weight in model.module.named_parameters():
            if weight.is_floating_point() and weight.numel() and not torch.stack(weight.aminmax()).isfinite().all():
                raise PreconditionError(
                    f"the weight {name!r} holds NaN or infinity: the checkpoint is broken, use an earlier one"
                )

    def run(self, model: TorchModel, context: Context) -> OnnxModel:
        """The exported model."""
        import torch

        scripted = isinstance(model.module, torch.jit.ScriptModule)
        exported = self._trace(model, None) if scripted else self._export(model)
        _match_signature(exported, model.signature)
        _refresh_shapes(exported)
        return OnnxModel(exported, model.signature, model.records)

    def _export(self, model: TorchModel) -> ir.Model:
        """Through torch.export; through tracing if that fails on anything but data-dependent control flow."""
        import torch

        examples = _examples(model.signature)
        shapes = tuple(_named_dims(spec) for spec in model.signature.inputs)
        try:
            with _quiet(), torch.no_grad():
                program = torch.onnx.export(
                    model.module,
                    examples,
                    dynamo=True,
                    optimize=False,
                    verbose=False,
                    opset_version=self.opset,
                    dynamic_shapes=shapes,
                    input_names=[spec.name for spec in model.signature.inputs],
                    output_names=[spec.name for spec in model.signature.outputs],
                )
        except Exception as error:  # whatever a user's forward and the exporter raise
            if _is_inherent(error):
                raise PreconditionError(_diagnosis(error)) from error
            return self._trace(model, error)
        assert program is not None  # torch.onnx.export gives a program unless it writes a file
        return program.model

    def _trace(self, model: TorchModel, reason: Exception | None) -> ir.Model:
        """Through TorchScript, because the module is TorchScript or because of ``reason``."""
        import onnx
        import onnx_ir as ir
        import torch

        if self.opset > TORCHSCRIPT_OPSET:
            why = f"torch.export failed: {_diagnosis(reason)}; and " if reason else ""
            raise PreconditionError(f"{why}TorchScript exports up to opset {TORCHSCRIPT_OPSET}: set `opset: 20`")
        boundary = (*model.signature.inputs, *model.signature.outputs)
        buffer = io.BytesIO()
        try:
            with _quiet(), _without_native_output(), torch.no_grad():
                torch.onnx.export(
                    model.module,
                    _examples(model.signature),
                    buffer,  # type: ignore[arg-type]  # its annotation lacks the files that it writes to
                    dynamo=False,
                    opset_version=self.opset,
                    dynamic_axes={spec.name: _named_dims(spec) for spec in boundary if _named_dims(spec)},
                    input_names=[spec.name for spec in model.signature.inputs],
                    output_names=[spec.name for spec in model.signature.outputs],
                )
        except Exception as error:
            raise PreconditionError(_diagnosis(reason, error) if reason else _diagnosis(error)) from (reason or error)
        if reason is not None:
            log.warning(
                "export_onnx: torch.export could not export the model, TorchScript tracing did: %s. Tracing keeps the "
                "path that one example took: the comparison with PyTorch on other inputs guards it.",
                _diagnosis(reason),
            )
        return ir.from_proto(onnx.load_from_string(buffer.getvalue()))

    def ensures(self, before: TorchModel, after: OnnxModel, context: Context) -> None:
        """PyTorch and ONNX agree at two other sizes of every dynamic dimension, and on real data if there is any."""
        compared = 0
        with (
            open_torch(before, context.threads) as pytorch,
            open_onnx(after, context.threads, optimize=False) as onnx,
        ):
            for what, feeds in _verification_feeds(before.signature, context):
                try:
                    wanted = pytorch.run(feeds)
                except OptkitError:
                    raise
                except Exception as error:  # the user's forward
                    log.warning("export_onnx: the model itself fails on %s: %s", what, _first_line(error))
                    continue
                _name_nan(wanted, what, real=what.startswith("real"))
                try:
                    actual = onnx.run(feeds)
                except Exception as error:
                    raise PostconditionError(
                        f"the exported model fails on {what}, on which PyTorch runs: {_first_line(error)}; "
                        "fix that dimension to one size with `dims`"
                    ) from error
                try:
                    found = compare(wanted, actual)
                except PostconditionError as error:
                    raise PostconditionError(f"on {what}, the exported model differs from PyTorch: {error}") from error
                if found.max_rel > self.tolerance:
                    raise PostconditionError(
                        f"the exported model differs from PyTorch on {what}, worst in the output {found.worst!r}: "
                        f"{found}; the tolerance is {self.tolerance:g}"
                    )
                compared += 1
        if not compared:
            raise PostconditionError(
                "the model runs on none of the sizes that its dynamic dimensions allow: set their ranges with `dims`"
            )


def _named_dims(spec: TensorSpec) -> dict[int, str]:
    return {axis: dim for axis, dim in enumerate(spec.shape) if isinstance(dim, str)}


def _example_size(limits: DimRange) -> int:
    """A size of at least 2: torch.export takes a dimension of 1 for a constant."""
    return max(2, limits.min, min(limits.opt, limits.max))


def _examples(signature: Signature) -> tuple[torch.Tensor, ...]:
    """One tensor of its own for each input: the exporter wires inputs that share a tensor together."""
    import torch

    # A small batch is as good as a large one, other dimensions may have sizes that do not work
    sizes = {dim: _example_size(signature.range(dim)) for dim in signature.dynamic}
    if signature.batch:
        sizes[signature.batch] = max(2, signature.range(signature.batch).min)
    feeds = signature.random_feeds(np.random.default_rng(0), **sizes)
    tensors = (torch.tensor(feeds[spec.name].astype(_carrier(spec.dtype))) for spec in signature.inputs)
    return tuple(tensor.to(getattr(torch, spec.dtype)) for tensor, spec in zip(tensors, signature.inputs, strict=True))


def _carrier(dtype: str) -> str:
    """The NumPy dtype that PyTorch reads: it does not know NumPy's bfloat16."""
    return "float32" if dtype == "bfloat16" else dtype


def _match_signature(model: ir.Model, signature: Signature) -> None:
    """Give the graph's boundary the signature's names and dimensions; refuse a boundary that is another one."""
    import onnx_ir as ir

    for what, values, specs in (
        ("inputs", model.graph.inputs, signature.inputs),
        ("outputs", model.graph.outputs, signature.outputs),
    ):
        if len(values) != len(specs):
            names = ", ".join(str(value.name) for value in values) or "none"
            raise PreconditionError(
                f"the model has {len(specs)} {what} by its signature, the exported graph has {len(values)} ({names}): "
                "an input that the model does not use must leave the signature"
            )
    _clear_names(model, {spec.name for spec in (*signature.inputs, *signature.outputs)})
    for values, specs in ((model.graph.inputs, signature.inputs), (model.graph.outputs, signature.outputs)):
        for value, spec in zip(values, specs, strict=True):
            _check_dims(value, spec)
            value.name = spec.name
            value.shape = ir.Shape(spec.shape)


def _clear_names(model: ir.Model, reserved: set[str]) -> None:
    """Rename what is inside the graph and bears a name of the boundary: exporters name values after modules."""
    graph = model.graph
    inner = [*graph.initializers.values(), *(value for node in graph.all_nodes() for value in node.outputs)]
    taken = reserved | {value.name for value in inner if value.name}
    for value in inner:
        if value.name not in reserved or value.is_graph_input() or value in graph.outputs:
            continue
        value.name = next(name for i in itertools.count(1) if (name := f"{value.name}_{i}") not in taken)
        taken.add(value.name)


def _check_dims(value: ir.Value, spec: TensorSpec) -> None:
    dims = tuple(value.shape) if value.shape is not None else spec.shape
    if len(dims) != len(spec.shape):
        raise PreconditionError(f"{spec.name!r} has {len(dims)} dimensions in the exported graph, not {spec}")
    for axis, (dim, wanted) in enumerate(zip(dims, spec.shape, strict=True)):
        if isinstance(wanted, str) and isinstance(dim, int):
            raise PreconditionError(
                f"the model fixes the dimension {wanted!r} of {spec.name!r} (axis {axis}) to {dim}: "
                f"declare it as {dim}, or write the model without that size"
            )


def _refresh_shapes(model: ir.Model) -> None:
    """Correct the shapes inside the graph where the operators say otherwise: exporters leave stale ones behind."""
    fresh = model.clone()
    for value in _inner_values(fresh):
        value.shape = None
    with _quiet():
        infer_types(fresh)
    for value, inferred in zip(_inner_values(model), _inner_values(fresh), strict=True):
        if inferred.shape is not None and (value.shape is None or _contradict(value.shape, inferred.shape)):
            value.shape = inferred.shape
        if value.type is None:
            value.type = inferred.type
        if value.type is None:
            value.shape = None  # a sequence: PyTorch notes the shape of what it was split from


def _inner_values(model: ir.Model) -> list[ir.Value]:
    return [value for node in model.graph for value in node.outputs if not value.is_graph_output()]


def _contradict(a: ir.Shape, b: ir.Shape) -> bool:
    sizes = ((x, y) for x, y in zip(a, b, strict=False) if isinstance(x, int) and isinstance(y, int))
    return len(a) != len(b) or any(x != y for x, y in sizes)


def _verification_feeds(signature: Signature, context: Context) -> Iterator[tuple[str, Feeds]]:
    """Inputs that the exporter has not seen, with what to call them."""
    rng = context.rng("export_onnx")
    others = {dim: _other_sizes(signature.range(dim)) for dim in signature.dynamic}
    for turn in range(2):
        sizes = {dim: choice[turn % len(choice)] for dim, choice in others.items()}
        shown = ", ".join(f"{dim}={size}" for dim, size in sizes.items())
        yield f"random inputs{f' with {shown}' if shown else ''}", signature.random_feeds(rng, **sizes)
    if context.data is None:
        return
    front = signature.inputs[0].shape[0] if signature.inputs[0].shape else 1
    wanted = front if isinstance(front, int) else min(4, signature.range(front).max)
    for batch in context.data.batches("calibration", wanted, wanted):
        if len(batch) == wanted or isinstance(front, str):
            yield "real data", batch.feeds


def _other_sizes(limits: DimRange) -> list[int]:
    """Up to two sizes that the exporter did not see, small ones first; the only one where there is no other."""
    seen = _example_size(limits)
    candidates = (limits.min, limits.opt, limits.min + 2, limits.max)
    sizes = dict.fromkeys(size for size in candidates if limits.min <= size <= limits.max and size != seen)
    return list(sizes)[:2] or [min(seen, limits.max)]


def _name_nan(outputs: Feeds, what: str, real: bool) -> None:
    """NaN that PyTorch itself gives: an error on real data, a warning on random inputs, which may make no sense."""
    for name, array in outputs.items():
        count = int(np.count_nonzero(np.isnan(array.astype(np.float64))))
        if count and real:
            raise PreconditionError(
                f"PyTorch itself gives {count} NaN in the output {name!r} on {what}: mend the model"
            )
        if count:
            log.warning("export_onnx: PyTorch itself gives %d NaN in the output %r on %s", count, name, what)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Send what third parties print, warn and log to the debug log."""
    printed = io.StringIO()
    loggers = [logging.getLogger(name) for name in ("torch", *logging.root.manager.loggerDict)]
    noisy = [(one, one.level) for one in loggers if one.name.split(".")[0] in ("torch", "onnxscript", "onnx_ir")]
    for one, _ in noisy:
        one.setLevel(logging.CRITICAL)
    try:
        with (
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
            warnings.catch_warnings(record=True) as caught,
        ):
            warnings.simplefilter("always")
            yield
    finally:
        for one, level in noisy:
            one.setLevel(level)
        for warning in caught:
            log.debug("%s:%d: %s", warning.filename, warning.lineno, warning.message)
        if printed.getvalue().strip():
            log.debug("the exporter printed: %s", printed.getvalue().strip())


@contextlib.contextmanager
def _without_native_output() -> Iterator[None]:
    """Keep what C++ writes to the standard output and error from the terminal."""
    with tempfile.TemporaryFile() as sink:
        saved = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
        for descriptor in saved:
            os.dup2(sink.fileno(), descriptor)
        try:
            yield
        finally:
            for descriptor, copy in saved.items():
                os.dup2(copy, descriptor)
                os.close(copy)


def _chain(error: BaseException) -> list[BaseException]:
    """The error and what it came from, innermost last."""
    found: list[BaseException] = []
    step: BaseException | None = error
    while step is not None and step not in found:
        found.append(step)
        step = step.__cause__ or step.__context__
    return found


def _is_inherent(error: Exception) -> bool:
    """Whether tracing could only hide the problem: it keeps the branch and the size that its example took."""
    text = "\n".join(str(one) for one in _chain(error))
    return "data-dependent" in text.lower() or "inferred a static shape" in text


def _diagnosis(*errors: Exception) -> str:
    """What could not be exported, where in the user's code, and how to mend it."""
    chain = [one for error in errors for one in _chain(error)]
    text = "\n".join(str(one) for one in chain)
    where = _where(chain, text)
    missing = re.search(r"op='([\w.:]+)'|[Oo]perator '([\w.:]+)'", text)
    fixed = re.search(r"inferred a static shape of (\d+) for dimension inputs\['(\w+)'\]\.shape\[(\d+)\]", text)
    if "data-dependent" in text.lower():
        return (
            f"the control flow of the model depends on the values of a tensor{where}: use torch.where or torch.cond, "
            "or move the decision out of the model"
        )
    if fixed:
        return (
            f"the model fixes axis {fixed[3]} of {fixed[2]!r} to {fixed[1]}{where}: declare that dimension as "
            f"{fixed[1]}, or write the model without that size"
        )
    if missing:
        return f"the operator {missing[1] or missing[2]} has no ONNX form{where}: replace it in the model's forward"
    return f"the model cannot be exported{where}: {_first_line(chain[-1])}"


def _where(chain: Sequence[BaseException], text: str) -> str:
    """`` (model.py:12)``: the innermost place that is not the exporter's own."""
    spots = [(frame.filename, frame.lineno) for one in chain for frame in traceback.extract_tb(one.__traceback__)]
    text += "".join(_node_trace(one) for one in chain)
    spots += [(file, int(line)) for file, line in re.findall(r'File "([^"]+)", line (\d+)', text)]
    foreign = [(file, line) for file, line in spots if not _is_machinery(file)]
    return f" ({foreign[-1][0]}:{foreign[-1][1]})" if foreign else ""


def _node_trace(error: BaseException) -> str:
    """The user's stack at the node that the exporter could not translate: its message lacks it, its frame has it."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        meta = getattr(frame.f_locals.get("node"), "meta", {})
        if "stack_trace" in meta:
            return str(meta["stack_trace"])
    return ""


def _is_machinery(file: str) -> bool:
    """Whether this is code of optkit, PyTorch, its exporter or Python itself."""
    import onnxscript
    import torch

    if file.startswith("<"):
        return True
    stdlib = Path(sysconfig.get_path("stdlib"))
    folders = [Path(path).parent for path in (torch.__file__, onnxscript.__file__, Path(__file__).parent)]
    parents = Path(file).parents
    in_stdlib = stdlib in parents and "site-packages" not in file
    return in_stdlib or any(folder in parents for folder in folders)


def _first_line(error: BaseException) -> str:
    """The error's type and the first line of its message."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
