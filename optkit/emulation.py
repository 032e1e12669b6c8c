"""FP16 and BF16 without their kernels: the same arithmetic in float32, each result rounded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optkit.models import OnnxModel

if TYPE_CHECKING:
    import onnx_ir as ir


def halves_in_float32(model: OnnxModel) -> OnnxModel:
    """A model that computes what FP16 or BF16 kernels would, where there are none.

    ONNX Runtime's CPU has no BF16 kernels, and it runs most FP16 ops in float32 without rounding in between, so that
    overflow does not show. Here every such value becomes a float32 one that a pair of Casts rounds. It differs from
    real kernels only where those round within an op. Inputs and outputs keep their types; a model without FP16 and BF16
    comes back as it is.
    """
    if not has_halves(model):
        return model
    after = model.clone()
    for value in _values(after.ir):
        if _is_half(value.dtype):
            _widen(after.ir.graph, value)
    return after


def has_halves(model: OnnxModel) -> bool:
    """Whether a value of the model is FP16 or BF16."""
    return any(_is_half(value.dtype) for value in _values(model.ir))


def _is_half(dtype: object) -> bool:
    import onnx_ir as ir

    return dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def _values(model: ir.Model) -> list[ir.Value]:
    graph = model.graph
    return [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]


def _widen(graph: ir.Graph, value: ir.Value) -> None:
    import onnx_ir as ir

    half = value.dtype
    assert half is not None  # the caller asked
    if value.const_value is not None:
        value.const_value = _widened(value.const_value, value.name)
        value.type = ir.TensorType(ir.DataType.FLOAT)  # a new type: clones share theirs with the original
        return
    users = [(use.node, use.idx) for use in value.uses()]
    producer = value.producer()
    if producer is None:
        exact, place = value, None
    else:
        _widen_attributes(producer)
        name = str(value.name)
        value.type, value.name = ir.TensorType(ir.DataType.FLOAT), f"{name}_exact"
        exact = _cast(value, half, name)
        place = exact.producer()
        graph.insert_after(producer, *([place] if place else []))
        if value.is_graph_output():
            ir.convenience.replace_all_uses_with(value, exact, replace_graph_outputs=True)
            assert place is not None  # a Cast was made just now
            place.replace_input_with(0, value)
    wide = _cast(exact, ir.DataType.FLOAT, f"{exact.name}_wide")
    cast = wide.producer()
    assert cast is not None  # a Cast was made just now
    if place is not None:
        graph.insert_after(place, cast)
    else:
        graph.insert_before(graph[0], cast)
    for node, index in users:
        node.replace_input_with(index, wide)


def _cast(value: ir.Value, to: ir.DataType, name: str) -> ir.Value:
    import onnx_ir as ir

    node = ir.node("Cast", [value], attributes={"to": int(to)}, name=f"{name}_emulated")
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = name, ir.TensorType(to), value.shape
    return node.outputs[0]


def _widen_attributes(node: ir.Node) -> None:
    """Types that an op reads from its attributes."""
    import onnx_ir as ir

    for name in ("to", "dtype", "output_dtype"):
        if _is_half(node.attributes.get_int(name, 0)):
            node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
    held = node.attributes.get("value")
    if held is not None and held.type == ir.AttributeType.TENSOR and _is_half(held.as_tensor().dtype):
        node.attributes["value"] = ir.AttrTensor("value", _widened(held.as_tensor(), None))


def _widened(tensor: ir.TensorProtocol, name: str | None) -> ir.TensorProtocol:
    import numpy as np
    import onnx_ir as ir

    return ir.tensor(tensor.numpy().astype(np.float32), name=name)
