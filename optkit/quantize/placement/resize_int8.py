"""TensorRT: what is interpolated for INT8 is INT8 before."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optkit.quantize.placement.draft import Draft, Use
from optkit.quantize.placement.graph import constant, has_static_shapes, interpolates, is_read, moved, only_consumer

if TYPE_CHECKING:
    import onnx_ir as ir


def resize_int8(node: ir.Node, index: int, draft: Draft) -> None:
    """Where a node reads INT8 and a ``Resize`` interpolated that, the Resize reads INT8 of the same scale.

    TensorRT 8.5.3 moves the quantizer to before the Resize anyway, and what is larger before it would saturate; kept
    from that, a decoder took 2.2 times as long. Where shapes are dynamic it has no such kernel, and nothing is in INT8
    before (``benchmarks/gpu/results/quantizers-h200.txt``).

    Of several nodes that read a tensor, this does something for the last, when all of them are known to read INT8.
    """
    value = node.inputs[index]
    if value is None or not all(Use(str(use.node.name), use.idx) in draft.inputs for use in value.uses()):
        return
    for resize in _resizes_above(value):
        source = resize.inputs[0]
        # A Resize in float is one that the recipe excludes; a constant is not calibrated
        if source is None or constant(source) is not None or resize.name in draft.kept_float:
            continue
        draft.quantize_input(resize, 0)
        draft.one_scale.append(frozenset(str(each.name) for each in (source, value)))
        resize_int8(resize, 0, draft)


def _resizes_above(value: ir.Value) -> list[ir.Node]:
    """The interpolations behind which TensorRT would not leave a quantizer of a tensor."""
    found, ahead = [], [value]
    while ahead:
        tensor = ahead.pop()
        node = tensor.producer()
        if node is None or tensor.is_graph_output():
            continue
        if interpolates(node) and has_static_shapes(node):
            found.append(node)
        elif not any(is_read(other) for other in node.outputs if other is not tensor):
            ahead += [source for source in moved(node) if only_consumer(source) is node]
    return found
