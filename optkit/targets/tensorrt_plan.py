"""Builds TensorRT plans in the worker: what the targets ``tensorrt-rtx`` and ``tensorrt`` share."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from optkit.context import Progress
from optkit.errors import BuildError, OptkitError, UnavailableError, UsageError, did_you_mean
from optkit.models import DimRange, OnnxModel, Signature
from optkit.targets.base import Availability
from optkit.targets.worker_client import PYTHON_VARIABLE, Limits, Worker, probe, worker_python

PLAN_FILE = "engine.plan"

LACKS_IN = frozenset(
    {(op, "bfloat16") for op in ("GRU", "HardSwish", "LpNormalization", "MeanVarianceNormalization", "Mish")}
    | {("MeanVarianceNormalization", "float16")}
)
"""What the importer of TensorRT-RTX 1.7 takes in float32 and not in these types. That of TensorRT 10 and 11 is of
the same family, and was not run."""

_SHOWN_NODES = 5


def find(module: str, install: str) -> Availability:
    """Whether the worker's Python has ``module``; ``install`` is the command that would put it there."""
    try:
        found = probe(module)
    except UnavailableError as error:
        reason, _, mend = str(error).rpartition(": ")
        return Availability(False, reason, mend)
    except OptkitError as error:  # it starts, and does not behave as a Python does
        return Availability(False, str(error), f"unset {PYTHON_VARIABLE}, or set it to a Python that has {module}")
    if "error" not in found:
        return Availability(True)
    python = worker_python()
    return Availability(
        False,
        f"{module} cannot be imported by {python} ({found['error']})",
        f"{install}, or set {PYTHON_VARIABLE} to a Python that has it",
    )


def version(module: str) -> str | None:
    """The version of ``module`` in the worker's Python, if it has it."""
    found: str | None = probe(module).get("version")
    return found


def profile(signature: Signature, every: bool = False) -> dict[str, list[list[int]]]:
    """One optimization profile: the shape at the min, opt and max of its dimensions, of dynamic or ``every`` input."""

    def shape(dims: tuple[int | str, ...], bound: str) -> list[int]:
        return [dim if isinstance(dim, int) else _bound(signature.range(dim), bound) for dim in dims]

    return {
        spec.name: [shape(spec.shape, bound) for bound in ("min", "opt", "max")]
        for spec in signature.inputs
        if every or any(isinstance(dim, str) for dim in spec.shape)
    }


def profiles(
    signature: Signature, wanted: Sequence[Mapping[str, tuple[int, int, int]]] = ()
) -> list[dict[str, list[list[int]]]]:
    """The optimization profiles: one from the signature's dims, or those that are wanted; none for static shapes.

    Raises:
        UsageError: a wanted profile names a dimension that the inputs do not have.
    """
    made = []
    for sizes in wanted or ({},):
        for dim in sizes:
            if dim not in signature.dynamic:
                raise UsageError(f"`profiles` names the dimension {dim!r}: {did_you_mean(dim, signature.dynamic)}")
        dims = {**signature.dims, **{dim: DimRange(*limits) for dim, limits in sizes.items()}}
        shapes = profile(replace(signature, dims=dims), every=_decides_shapes(signature))
        if shapes:
            made.append(shapes)
    return made


def _decides_shapes(signature: Signature) -> bool:
    """Whether the data decide the shape of an output; TensorRT 8 wants a profile then, if of fixed shapes."""
    dims = {dim for spec in signature.outputs for dim in spec.shape if isinstance(dim, str)}
    return not dims <= set(signature.dynamic)


def _bound(limits: DimRange, bound: str) -> int:
    return {"min": limits.min, "opt": limits.opt, "max": limits.max}[bound]


def build(
    model: OnnxModel, folder: Path, options: Mapping[str, Any], limits: Limits, progress: Progress
) -> dict[str, Any]:
    """Build ``folder/engine.plan``; it appears complete or not at all.

    Args:
        model: the model, in the precision that it is to run in.
        folder: where the plan goes.
        options: the rest of the worker's request: ``module`` and how to build.
        limits: what the worker may take.
        progress: shows how far TensorRT is.

    Returns:
        What the worker says of the plan.

    Raises:
        BuildError: TensorRT refused the model, crashed, took too long or too much memory.
    """
    import onnx_ir as ir

    with tempfile.TemporaryDirectory(dir=folder, prefix="tensorrt-") as aside:
        onnx, plan = Path(aside) / "model.onnx", Path(aside) / PLAN_FILE
        ir.save(model.ir, onnx, external_data=f"{onnx.name}.data")  # no 2 GB limit, and no copy in memory
        request = {"do": "build", "onnx": str(onnx), "plan": str(plan), "profiles": profiles(model.signature)}
        with Worker(limits) as worker:
            reply = worker.call({**request, **options}, progress, "building the TensorRT engine")
            if "error" in reply:
                raise _refusal(model, reply, worker.log())
        if plan.stat().st_size != reply["bytes"]:
            raise BuildError(f"the plan has {plan.stat().st_size} bytes on disk and {reply['bytes']} in TensorRT")
        plan.replace(folder / PLAN_FILE)
    return {key: value for key, value in reply.items() if key != "kind"}


def inspect(plan: Path, module: str, limits: Limits) -> dict[str, Any]:
    """The layers of a plan as TensorRT's inspector tells them, or ``{"not_inspected": why}``."""
    with Worker(limits) as worker:
        reply = worker.call({"do": "inspect", "module": module, "plan": str(plan)})
    return {"not_inspected": reply["text"]} if "error" in reply else dict(reply["information"])


def _refusal(model: OnnxModel, reply: Mapping[str, Any], log: str) -> BuildError:
    log = f"\n{log}" if log else ""
    if reply["error"] != "refused":
        return BuildError(f"the TensorRT worker failed: {reply['text']}{log}")
    if reply["nodes"]:
        told = [_told(model, node) for node in reply["nodes"][:_SHOWN_NODES]]
        more = len(reply["nodes"]) - len(told)
        return BuildError("TensorRT refuses " + "; ".join(told) + (f"; and {more} more nodes" if more else ""))
    if any(word in reply["text"] for word in ("OutOfMemory", "bad_alloc")):
        return BuildError(
            f"TensorRT ran out of memory: {reply['text']}: free some, lower `workspace_mb` of the target, or build on "
            f"a larger machine{log}"
        )
    return BuildError(f"TensorRT did not build the engine: {reply['text']}{log}")


def _told(model: OnnxModel, node: Mapping[str, Any]) -> str:
    """One refused node: which it is, why, and what to do about it."""
    nodes = list(model.ir.graph)
    here = nodes[node["index"]] if 0 <= node["index"] < len(nodes) else None
    op = node["op"] or (here.op_type if here else "?")
    name = node["name"] or (here.name if here else None) or f"number {node['index']}"
    domain = here.domain if here and here.op_type == op else ""
    reason, mend = _reason_and_mend(node["reason"], f"{domain}.{op}" if domain else op)
    return f"node {name!r} ({domain + '.' if domain else ''}{op}): {reason}: {mend}"


def _reason_and_mend(told: str, op: str) -> tuple[str, str]:
    """TensorRT's words made readable, and the way out. Facts: what each refusal comes from was provoked on purpose."""
    symmetric = "let quantize_int8 run for this target, which quantizes symmetrically and leaves biases alone"
    known = {
        "zero point is not supported": ("its zero point is not 0", symmetric),
        "Scale coefficients must all be positive": ("a scale is not positive", "quantize the model again"),
        "has type Int32 but must have": ("it dequantizes INT32", symmetric),
        "Plugin not found": ("TensorRT has no such operator", ""),
    }
    for phrase, (reason, mend) in known.items():
        if phrase in told:
            return reason, mend or _way_out(op)
    # "false" is all that the parser says of an operator that it has not
    reason = "TensorRT does not support it" if told in ("", "false") else told.split("failed: ", 1)[-1]
    return reason, _way_out(op)


def _way_out(op: str) -> str:
    if op.startswith("com.microsoft."):
        return "build from a model that ONNX Runtime's optimizer has not rewritten"
    return "express it with other operators in the model, or choose the target onnxruntime"
