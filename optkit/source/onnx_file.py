"""ONNX, from a file or from memory, with its signature settled."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from optkit.errors import CheckpointError
from optkit.failures import few, reason
from optkit.models import DTYPES, OnnxModel, Signature, TensorSpec
from optkit.quantize.placement import name_nodes
from optkit.source.dimensions import Declared, settle
from optkit.source.reading import damaged

if TYPE_CHECKING:
    import onnx_ir as ir

    from optkit.recipe import Recipe


def read_onnx(path: Path, recipe: Recipe, data_inputs: tuple[TensorSpec, ...]) -> tuple[OnnxModel, list[Path]]:
    """The model, and the files beside it that hold its weights."""
    import onnx
    import onnx_ir as ir

    try:
        model = ir.load(path)
    except Exception as error:
        raise damaged(path, f"not a whole ONNX model ({reason(error)})") from error
    files = sorted({Path(tensor.path) for _, tensor in _initializers(model) if isinstance(tensor, ir.ExternalTensor)})
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{path}: its weights are in {file.name}, which is not beside it; copy both files")
    try:
        onnx.checker.check_model(str(path))
    except (onnx.checker.ValidationError, ValueError) as error:
        raise CheckpointError(f"{path}: not a valid ONNX model: {reason(error)}; export it again") from error
    return onnx_model(model, recipe, data_inputs, str(path)), files


def onnx_model(model: ir.Model, recipe: Recipe, data_inputs: tuple[TensorSpec, ...], where: str) -> OnnxModel:
    """Settle the signature of a model that is ours to change, and name its nodes, by which reports tell of them."""
    import onnx_ir as ir
    from onnx_ir.passes.common import ShapeInferencePass

    refuse_nan(model, where)
    if not model.graph.inputs or not model.graph.outputs:
        raise CheckpointError(f"{where}: an ONNX graph without inputs or outputs; export it again")
    try:
        model = ShapeInferencePass()(model).model
    except Exception as error:
        raise CheckpointError(f"{where}: the shapes of this ONNX graph contradict: {reason(error)}") from error
    declared = _onnx_inputs(model, where)
    inputs, dims = settle(declared, recipe, data_inputs, where)
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
    settled = OnnxModel(model, Signature(inputs, outputs, dims))
    name_nodes(settled)
    return settled


def _onnx_inputs(model: ir.Model, where: str) -> Declared:
    symbols = itertools.count()
    inputs = []
    named: set[str] = set()
    for value in _true_inputs(model):
        spec = _value_spec(value, f"{where}: input", "")
        named.update(dim for dim in spec.shape if isinstance(dim, str) and dim)
        inputs.append(replace(spec, shape=tuple(f"?{next(symbols)}" if dim == "" else dim for dim in spec.shape)))
    return Declared(tuple(inputs), {}, frozenset(named))


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


def refuse_nan(model: ir.Model, where: str) -> None:
    """No weight may be NaN; infinity passes: ONNX keeps the constants of attention masks among the weights."""
    bad = []
    for name, tensor in _initializers(model):
        if tensor.dtype.is_floating_point():
            try:
                array = tensor.numpy()
            except Exception as error:
                raise CheckpointError(f"{where}: the weight {name} cannot be read: {reason(error)}") from error
            if np.isnan(array if array.dtype.itemsize > 1 else array.astype(np.float32)).any():
                bad.append(name)
    if bad:
        raise CheckpointError(f"{where}: NaN in {len(bad)} weight(s): {few(bad)}; export a healthy checkpoint")
