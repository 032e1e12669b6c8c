"""Takes the float types out of a graph, for builders that choose precisions themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from optkit.context import Context
from optkit.models import OnnxModel
from optkit.passes.base import OnnxPass
from optkit.passes.graph_edit import constant, infer_types, sweep, tolerance_db
from optkit.targets.base import WEAK_TYPES

if TYPE_CHECKING:
    import onnx_ir as ir

_WITHOUT_ARITHMETIC = frozenset(
    {"Cast", "Constant", "DequantizeLinear", "Flatten", "Gather", "Identity", "QuantizeLinear", "Reshape", "Slice"}
    | {"Squeeze", "Transpose", "Unsqueeze"}
)


class WidenToFloat32(OnnxPass):
    """FP16 and BF16 become float32; the record ``weak_types`` says what the graph held.

    TensorRT before 10 chooses each layer's precision itself, among those that are allowed. So ``precisions`` are what
    the graph computes in beside float32, and ``float32`` names the nodes that compute in float32 although others do
    not. A node that reads INT8 is none of these: TensorRT 8.5.3 found no kernel for one that it marked as INT8 and was
    told to compute in float32.
    """

    use: Literal["widen_to_float32"] = "widen_to_float32"

    def run(self, model: OnnxModel, context: Context) -> OnnxModel:
        """The widened model with the record."""
        after = model.clone()
        infer_types(after.ir)
        precisions = _precisions(after.ir)
        halves = bool({"FP16", "BF16"} & set(precisions))
        exact = [str(node.name) for node in after.ir.graph if halves and _computes_float32(node)]
        if halves:
            _widen(after.ir)
        return after.with_record(WEAK_TYPES, {"precisions": precisions, "float32": exact})


def legal_tolerance_db(model: ir.Model) -> float:
    """The SQNR that a graph keeps when its rounding changes.

    Where it is quantized, a value that now rounds the other way moves by a whole step, and so does what follows from
    it: two such graphs differ by about as much as quantization itself costs.
    """
    quantized = any(node.op_type == "QuantizeLinear" for node in model.graph)
    return 10.0 if quantized else tolerance_db(model)


def _precisions(model: ir.Model) -> list[str]:
    import onnx_ir as ir

    kinds = {value.dtype for node in model.graph for value in node.outputs if node.op_type != "Cast"}
    names = {ir.DataType.FLOAT16: "FP16", ir.DataType.BFLOAT16: "BF16", ir.DataType.INT8: "INT8"}
    quantized = any(node.op_type == "DequantizeLinear" for node in model.graph)
    return [name for kind, name in names.items() if kind in kinds or (name == "INT8" and quantized)]


def _computes_float32(node: ir.Node) -> bool:
    import onnx_ir as ir

    if any(_reads_int8(value) for value in node.inputs):
        return False
    floats = [value for value in (*node.inputs, *node.outputs) if value is not None and value.dtype is not None]
    gives = any(value.dtype == ir.DataType.FLOAT for value in node.outputs)
    takes = any(value.dtype == ir.DataType.FLOAT and constant(value) is None for value in floats)
    return node.op_type not in _WITHOUT_ARITHMETIC and gives and takes


def _reads_int8(value: ir.Value | None) -> bool:
    """Whether a tensor comes out of a DequantizeLinear; Casts in between will be gone."""
    producer = None if value is None else value.producer()
    while producer is not None and producer.op_type == "Cast":
        producer = None if producer.inputs[0] is None else producer.inputs[0].producer()
    return producer is not None and producer.op_type == "DequantizeLinear"


def _widen(model: ir.Model) -> None:
    import onnx_ir as ir

    halves = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    graph = model.graph
    for value in graph.initializers.values():
        if value.const_value is not None and value.const_value.dtype in halves:
            array = value.const_value.numpy().astype(np.float32)
            value.const_value = ir.tensor(array, name=value.name)
            value.type = ir.TensorType(ir.DataType.FLOAT)
    for node in list(graph):
        for name, attribute in list(node.attributes.items()):
            _widen_attribute(node, name, attribute)
        for value in node.outputs:
            if value.dtype in halves:
                if value.is_graph_output():
                    value.meta["half"] = value.dtype
                value.type = ir.TensorType(ir.DataType.FLOAT)
    _keep_boundary(graph)
    for node in list(graph):
        source = node.inputs[0] if node.inputs else None
        if node.op_type == "Cast" and source is not None and source.dtype == node.outputs[0].dtype == ir.DataType.FLOAT:
            _bypass(graph, node, source)
    sweep(model)
    infer_types(model)


def _keep_boundary(graph: ir.Graph) -> None:
    """Inputs and outputs of the graph keep their types, behind Casts."""
    import onnx_ir as ir

    for value in graph.inputs:
        if value.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
            users = [(use.node, use.idx) for use in value.uses()]
            cast = _cast(value, ir.DataType.FLOAT, f"{value.name}_float32")
            graph.insert_before(graph[0], cast)
            for node, index in users:
                node.replace_input_with(index, cast.outputs[0])
    for index, value in enumerate(graph.outputs):
        kind = value.meta.get("half")
        if kind is not None:
            name, value.name = str(value.name), f"{value.name}_float32"
            cast = _cast(value, kind, name)
            graph.append(cast)
            graph.outputs[index] = cast.outputs[0]


def _cast(value: ir.Value, to: ir.DataType, name: str) -> ir.Node:
    import onnx_ir as ir

    node = ir.node("Cast", [value], attributes={"to": int(to)}, num_outputs=1, name=f"{name}_cast")
    node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = name, value.shape, ir.TensorType(to)
    return node


def _widen_attribute(node: ir.Node, name: str, attribute: Any) -> None:
    import onnx_ir as ir

    halves = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    if attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype in halves:
        node.attributes[name] = ir.AttrTensor(name, ir.tensor(attribute.value.numpy().astype(np.float32)))
    elif name in ("to", "output_dtype", "dtype") and attribute.value in halves:
        node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))


def _bypass(graph: ir.Graph, node: ir.Node, source: ir.Value) -> None:
    """Let users of a Cast that does nothing read its source; a graph output keeps its name."""
    import onnx_ir as ir

    result = node.outputs[0]
    if not result.is_graph_output():
        ir.convenience.replace_all_uses_with(result, source)
        graph.remove(node, safe=True)
    elif source.producer() is not None and not source.is_graph_output():
        name = result.name
        ir.convenience.replace_all_uses_with(result, source, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        source.name = name
