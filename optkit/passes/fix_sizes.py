"""Writes sizes that cannot vary into the graph, so that a builder knows every shape."""

from __future__ import annotations

from optkit.context import Context
from optkit.models import OnnxModel, Signature
from optkit.passes.graph_edit import infer_types
from optkit.passes.optimize_graph import OptimizeGraph


def fix_sizes(model: OnnxModel, context: Context) -> OnnxModel:
    """A dynamic dimension whose range holds a single size becomes that size, and what follows from it is folded.

    TensorRT before 10 does not build some graphs of dynamic shape at all (a class token that is expanded to the batch),
    and any version has fewer kernels to choose from. The signature stays: it says which sizes the engine takes.
    """
    fixed = _fixed(model.signature)
    if not fixed:
        return model
    import onnx_ir as ir

    after = model.clone()
    for value in (*after.ir.graph.inputs, *after.ir.graph.outputs):
        if value.shape is not None:
            value.shape = ir.Shape([dim if isinstance(dim, int) else fixed.get(dim.value, dim) for dim in value.shape])
    for node in after.ir.graph.all_nodes():
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None
    infer_types(after.ir)
    return OptimizeGraph().run(after, context)


def _fixed(signature: Signature) -> dict[str | None, int]:
    ranges = {dim: signature.range(dim) for dim in signature.dynamic}
    return {dim: limits.min for dim, limits in ranges.items() if limits.min == limits.max}
