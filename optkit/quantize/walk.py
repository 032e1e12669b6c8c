"""Runs a graph once over all batches, a stretch at a time, so that what is found at a tensor changes what follows it.

Correcting layers one after the other would cost a forward pass each if every layer ran the graph from its beginning.
Here each node runs once: what a stretch leaves for the rest is kept, and dropped when nobody reads it any more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from optkit.models import OnnxModel, Signature, TensorSpec
from optkit.targets.onnxruntime import open_onnx

if TYPE_CHECKING:
    import onnx_ir as ir

    from optkit.data import Batch

Array = np.ndarray[Any, Any]


def walk(
    model: OnnxModel, stops: Sequence[str], batches: Sequence[Batch], threads: int = 1
) -> Iterator[tuple[str, list[Array]]]:
    """Run the graph up to each of the stops in turn, unfused, and show the tensor there, one array per batch.

    The arrays may be edited in place, and initializers that later nodes read may be replaced: the rest of the walk
    computes with the edited ones. Nothing behind the last stop is run.

    Args:
        model: a model whose graph is sorted.
        stops: names of tensors that nodes of the main graph write, each once.
        batches: the samples.
        threads: intra-op threads.
    """
    nodes = list(model.ir.graph)
    wanted = set(stops)
    ends = [i for i, node in enumerate(nodes) if any(value.name in wanted for value in node.outputs)]
    last_use = _last_uses(nodes)
    cached: dict[ir.Value, list[Array]] = {}
    for value in model.ir.graph.inputs:
        cached[value] = [np.asarray(batch.feeds[str(value.name)]) for batch in batches]
    start = 0
    for end in ends:
        stretch = nodes[start : end + 1]
        outputs = [
            value for node in stretch for value in node.outputs if value.name in wanted or last_use.get(value, -1) > end
        ]
        _run(model, stretch, outputs, cached, len(batches), threads)
        for value in nodes[end].outputs:
            if value.name in wanted:
                yield value.name, cached[value]
        cached = {value: arrays for value, arrays in cached.items() if last_use.get(value, -1) > end}
        start = end + 1


def _reads(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads, what the bodies of If and Loop take from outside of them included."""
    import onnx_ir as ir

    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for inner in ir.traversal.RecursiveGraphIterator(attribute.as_graph()):
                yield from (value for value in inner.inputs if value is not None)


def _last_uses(nodes: Sequence[ir.Node]) -> dict[ir.Value, int]:
    return {value: index for index, node in enumerate(nodes) for value in _reads(node)}


def _run(
    model: OnnxModel,
    stretch: Sequence[ir.Node],
    outputs: Sequence[ir.Value],
    cached: dict[ir.Value, list[Array]],
    count: int,
    threads: int,
) -> None:
    import onnx_ir as ir

    inputs = [value for value in dict.fromkeys(v for node in stretch for v in _reads(node)) if value in cached]
    graph = ir.convenience.extract(model.ir.graph, inputs, outputs)
    for own, value in zip(graph.inputs, inputs, strict=True):
        own.dtype = ir.DataType.from_numpy(cached[value][0].dtype)
    part = OnnxModel(ir.Model(graph, ir_version=model.ir.ir_version), _signature(inputs, cached))
    with open_onnx(part, threads, optimize=False) as runner:
        for value in outputs:
            cached[value] = []
        for index in range(count):
            found = runner.run({str(value.name): cached[value][index] for value in inputs})
            for value in outputs:
                cached[value].append(found[str(value.name)])


def _signature(values: Sequence[ir.Value], cached: dict[ir.Value, list[Array]]) -> Signature:
    def spec(index: int, value: ir.Value) -> TensorSpec:
        first = cached[value][0]
        # Batches may differ in any dimension, so none is promised to be the same as another
        return TensorSpec(str(value.name), first.dtype.name, tuple(f"d{index}_{axis}" for axis in range(first.ndim)))

    return Signature(tuple(spec(index, value) for index, value in enumerate(values)), ())
