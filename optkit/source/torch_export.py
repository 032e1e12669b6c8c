"""Programs of ``torch.export``, which fix their inputs and the ranges of their dimensions."""

from __future__ import annotations

import inspect
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optkit.errors import CheckpointError
from optkit.failures import reason
from optkit.models import TensorSpec
from optkit.source.dimensions import Declared
from optkit.source.export_safety import danger_in
from optkit.source.forward import dtype_name
from optkit.source.reading import Read

if TYPE_CHECKING:
    from optkit.recipe import ModelSource


def read_export(path: Path, source: ModelSource) -> Read:
    """Read a ``.pt2``, if that cannot run code or the user trusts it."""
    import torch

    danger = danger_in(path)
    if danger and not source.trust_pickle:
        raise CheckpointError(
            f"{path}: {danger}, so reading this .pt2 could run code; write it again with torch.export.save, "
            "or give --trust-pickle if you know who wrote it"
        )
    try:
        program = torch.export.load(path)
    except Exception as error:
        raise CheckpointError(
            f"{path}: torch {torch.__version__} cannot read this .pt2: {reason(error)}; "
            "it is damaged, or another version of torch wrote it: export it again"
        ) from error
    inputs, parameters = _exported_inputs(program, path)
    if any(_is_training(node) for node in program.graph.nodes):
        raise CheckpointError(f"{path}: exported in training mode; call model.eval() before torch.export.export")
    module = program.module()
    for part in module.modules():
        part.training = False  # eval() is not supported on exported modules, and the graph is fixed anyway
    ranges = {str(symbol): _bounds(bounds) for symbol, bounds in program.range_constraints.items()}
    return Read(module, "torch.export", bool(danger), Declared(inputs, ranges), parameters=parameters)


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
        TensorSpec(name, dtype_name(value.dtype, f"{path}: input {name!r}"), tuple(map(_dim, value.shape)))
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
