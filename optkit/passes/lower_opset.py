"""Rewrites a graph for an older version of ai.onnx."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from optkit.context import Context
from optkit.errors import PassError
from optkit.passes.graph_edit import GraphEdit, constant, opset, rank

if TYPE_CHECKING:
    import onnx_ir as ir

IR_VERSIONS = {13: 7, 14: 7, 15: 8, 16: 8, 17: 8, 18: 8, 19: 9, 20: 9}
"""The file format that came with each opset; older parsers want no newer one."""


class LowerOpset(GraphEdit):
    """The graph is expressed in an older opset. A node that the older one cannot express is an error that names it."""

    use: Literal["lower_opset"] = "lower_opset"
    to: int = Field(default=17, ge=13, le=20)
    """Version of ai.onnx."""

    def edit(self, model: ir.Model, context: Context) -> bool:
        """Rewrite what changed since, and check every node against its older schema."""
        if opset(model) <= self.to:
            return False
        for node in model.graph:
            if node.domain == "":
                node.version = None
                _lower(node, self.to)
                problem = _problem(node, self.to)
                if problem:
                    raise PassError(
                        f"node {node.name!r} ({node.op_type}) {problem} at opset {self.to}, and the builder reads no "
                        "newer one: express it with other operators, or build with a newer TensorRT"
                    )
        model.graph.opset_imports[""] = self.to
        model.ir_version = min(model.ir_version, IR_VERSIONS[self.to])
        return True


def _lower(node: ir.Node, version: int) -> None:
    for name, default in _NEW_ATTRIBUTES.get(node.op_type, {}).items():
        if name in node.attributes and node.attributes[name].value in default:
            del node.attributes[name]
    last, rewrite = _REWRITES.get(node.op_type, (0, None))
    if rewrite and version <= last:
        rewrite(node)


def _axes_to_attribute(node: ir.Node) -> None:
    """Up to opset 17 the axes of most reductions are an attribute."""
    import onnx_ir as ir

    axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if axes is not None:
        node.attributes["axes"] = ir.AttrInt64s("axes", [int(axis) for axis in axes.reshape(-1)])
        node.resize_inputs(1)


def _sizes_to_input(node: ir.Node) -> None:
    """Up to opset 17 a Split into equal parts has no ``num_outputs``: the number of its outputs says it."""
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    parts = len(node.outputs)
    size = shape[node.attributes.get_int("axis", 0)] if shape is not None else None
    if "num_outputs" in node.attributes and isinstance(size, int) and size % parts == 0:
        del node.attributes["num_outputs"]


def _mode_of_images(node: ir.Node) -> None:
    """Up to opset 19 GridSample's modes have the names that they have for images."""
    import onnx_ir as ir

    mode = node.attributes.get_string("mode", "linear")
    node.attributes["mode"] = ir.AttrString("mode", {"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode))


# The last version that has it so, and how it is written there
_REWRITES: Mapping[str, tuple[int, Callable[[Any], None]]] = {
    **dict.fromkeys(
        (
            "ReduceL1",
            "ReduceL2",
            "ReduceLogSum",
            "ReduceLogSumExp",
            "ReduceMax",
            "ReduceMean",
            "ReduceMin",
            "ReduceProd",
            "ReduceSumSquare",
        ),
        (17, _axes_to_attribute),
    ),
    "Split": (17, _sizes_to_input),
    "GridSample": (19, _mode_of_images),
}

# Attributes that came after opset 17, and the values at which they say what was meant before
_NEW_ATTRIBUTES: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    **{op: {"noop_with_empty_axes": (0,)} for op in _REWRITES if op.startswith("Reduce")},
    "Resize": {"antialias": (0,), "keep_aspect_ratio_policy": ("stretch",)},
    "Cast": {"saturate": (0, 1)},
    "QuantizeLinear": {"saturate": (0, 1), "block_size": (0,), "output_dtype": (0,), "precision": (0,)},
    "DequantizeLinear": {"block_size": (0,), "output_dtype": (0, 1)},
    "AveragePool": {"dilations": ((1,), (1, 1), (1, 1, 1))},
}


def _problem(node: ir.Node, version: int) -> str:
    """Why the schema of that version does not take the node, or nothing."""
    import onnx

    try:
        schema = onnx.defs.get_schema(node.op_type, version, "")
    except onnx.defs.SchemaError:
        return "does not exist"
    unknown = [name for name in node.attributes if name not in schema.attributes]
    if unknown:
        return f"has no attribute {unknown[0]!r}"
    if len(node.inputs) > schema.max_input:
        return f"takes only {schema.max_input} inputs"
    if node.op_type == "GridSample" and version < 20 and rank(node.inputs[0]) not in (None, 4):
        return "takes only images"
    return ""
