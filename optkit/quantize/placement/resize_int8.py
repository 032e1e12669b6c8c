"""TensorRT: what is interpolated for INT8 is INT8 before."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optkit.quantize.placement.draft import Draft, Use
from optkit.quantize.placement.graph import ACTIVATIONS, COMMUTES, has_static_shape, interpolates, only_consumer

if TYPE_CHECKING:
    import onnx_ir as ir


def resize_int8(node: ir.Node, index: int, draft: Draft) -> None:
    """Where a node reads INT8 and a ``Resize`` interpolated that, the Resize reads INT8 of the same scale.

    TensorRT 8.5.3 moves the quantizer to before the Resize anyway, and what is larger before it would saturate; kept
    from that, a decoder took 2.2 times as long. Where shapes are dynamic it has no such kernel, and nothing is in INT8
    before (``benchmarks/gpu/results/quantizers-h200.txt``).
    """
    value = node.inputs[index]
    if value is None or not all(Use(str(use.node.name), use.idx) in draft.inputs for use in value.uses()):
        return
    for resize in _resizes_above(value):
        if resize.name in draft.kept_float:  # the recipe excludes it
            continue
        draft.quantize_input(resize, 0)
        source = resize.inputs[0]
        draft.one_scale.append(frozenset(each.name for each in (source, value) if each is not None and each.name))


def _resizes_above(value: ir.Value) -> list[ir.Node]:
    """The interpolations whose result a quantizer of a tensor would be moved across."""
    producer = value.producer()
    if producer is None or value.is_graph_output():
        return []
    found = [producer] if interpolates(producer) and has_static_shape(value) else []
    crosses = bool(found) or producer.op_type in COMMUTES | ACTIVATIONS
    sources = producer.inputs if producer.op_type == "Concat" else producer.inputs[:1]
    for source in sources if crosses else ():
        if source is not None and only_consumer(source) is producer:
            found += _resizes_above(source)
    return found
