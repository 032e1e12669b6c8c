"""Which parts of a network INT8 makes faster: regions between Quantize and Dequantize, timed beside their float twins.

A region is a maximal connected set of nodes that compute in INT8, with the Q/DQ pairs (and whatever else quantization
added) inside it and at its border. Its time is that of all layers which compute something of it; a layer that the
runtime fused across the border draws its other nodes in, for both engines alike, so that the same work is compared.
A copy into another format before or behind a node next to a region counts as well: TensorRT's INT8 kernels read and
write formats of their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from optkit.models import OnnxModel
from optkit.quantize.placement.graph import constant
from optkit.targets.profiling import LayerTime
from optkit.validation.statistics import Interval, ratio_of_rounds

if TYPE_CHECKING:
    import onnx_ir as ir

FUSED = frozenset({"Add", "Clip", "Relu"})
"""Ops that join the INT8 kernel before them if all that they write is quantized."""

Layers = Sequence[LayerTime]


@dataclass(frozen=True)
class Region:
    """Connected INT8 nodes.

    Attributes:
        nodes: names of the float graph's nodes, in its order.
        added: names of the nodes that quantization added.
        beside: names of the nodes that give what it reads or read what it gives.
    """

    nodes: tuple[str, ...]
    added: tuple[str, ...]
    beside: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Its first and last node."""
        return self.nodes[0] if len(self.nodes) == 1 else f"{self.nodes[0]} to {self.nodes[-1]}"


@dataclass(frozen=True)
class PartTime:
    """What the least part of a region takes that has layers of its own in both engines.

    Attributes:
        nodes: what is computed, added nodes included.
        int8: seconds in the INT8 engine.
        twin: seconds in the twin; 0 for what only INT8 needs.
    """

    nodes: tuple[str, ...]
    int8: float
    twin: float


@dataclass(frozen=True)
class RegionTime:
    """What a region takes in INT8 and in its twin.

    Attributes:
        region: which one.
        parts: its layers, those together that share nodes.
        speedup: how many times as fast as in the twin it is in INT8.
    """

    region: Region
    parts: tuple[PartTime, ...]
    speedup: Interval

    @property
    def int8(self) -> float:
        """Seconds in the INT8 engine."""
        return sum(part.int8 for part in self.parts)

    @property
    def twin(self) -> float:
        """Seconds in the twin."""
        return sum(part.twin for part in self.parts)

    @property
    def losing(self) -> tuple[str, ...]:
        """The region's nodes that are better off in float.

        Those are all but the run of parts, in the order of the graph, that gains the most, if it gains more than what
        INT8 needs beside them: one run is entered and left once, so it needs no more Q/DQ pairs than the region does.
        """
        place = {name: index for index, name in enumerate(self.region.nodes)}
        computing = [part for part in self.parts if any(name in place for name in part.nodes)]
        needed = sum(part.int8 - part.twin for part in self.parts if part not in computing)
        computing.sort(key=lambda part: min(place[name] for name in part.nodes if name in place))
        start, stop = _best_run([part.twin - part.int8 for part in computing])
        gained = sum(part.twin - part.int8 for part in computing[start:stop])
        if gained <= needed:
            return self.region.nodes
        lost = {name for part in (*computing[:start], *computing[stop:]) for name in part.nodes}
        return tuple(name for name in self.region.nodes if name in lost)


def _best_run(gains: Sequence[float]) -> tuple[int, int]:
    """Where the run with the largest sum begins and ends; an empty one if nothing is positive."""
    best, best_sum, start, current = (0, 0), 0.0, 0, 0.0
    for index, gain in enumerate(gains):
        if current <= 0:
            start, current = index, 0.0
        current += gain
        if current > best_sum:
            best, best_sum = (start, index + 1), current
    return best


def find_regions(floats: OnnxModel, quantized: OnnxModel) -> tuple[Region, ...]:
    """The INT8 regions of a graph that ``quantize_int8`` made, in the order of the graph.

    Args:
        floats: what was quantized, its nodes named.
        quantized: what came out, with its record of the nodes that compute in INT8.
    """
    known = {node.name for node in floats.ir.graph}
    int8 = set(quantized.records["quantization"]["int8"])
    inside = {node for node in quantized.ir.graph if node.name not in known or node.name in int8}
    inside |= _between(quantized.ir.graph, inside)
    regions = []
    for members in _connected([node for node in quantized.ir.graph if node in inside]):
        names = [str(node.name) for node in members]
        nodes = tuple(name for name in names if name in known)
        if nodes:
            regions.append(Region(nodes, tuple(name for name in names if name not in known), _beside(members)))
    return tuple(regions)


def _between(graph: ir.Graph, inside: set[ir.Node]) -> set[ir.Node]:
    """Nodes that only read what INT8 nodes give and only give what is quantized."""
    fed: set[ir.Node] = set()
    for node in graph:
        read = [value for value in node.inputs if value is not None and constant(value) is None]
        if node.op_type in FUSED and all(value.producer() in inside | fed for value in read):
            fed.add(node)
    kept: set[ir.Node] = set()
    for node in reversed(graph):
        uses = [use.node for value in node.outputs for use in value.uses()]
        given_away = any(value.is_graph_output() for value in node.outputs)
        if node in fed and uses and not given_away and all(user in inside | kept for user in uses):
            kept.add(node)
    return kept - inside


def _connected(nodes: Sequence[ir.Node]) -> list[list[ir.Node]]:
    """Groups of nodes that read each other's values."""
    group: dict[ir.Node, list[ir.Node]] = {}
    for node in nodes:
        mine = group[node] = [node]
        for value in node.inputs:
            producer = value.producer() if value is not None else None
            if producer in group and group[producer] is not mine:
                mine.extend(group[producer])
                for member in group[producer]:
                    group[member] = mine
    place = {node: index for index, node in enumerate(nodes)}
    distinct = {id(members): sorted(members, key=place.__getitem__) for members in group.values()}
    return sorted(distinct.values(), key=lambda members: place[members[0]])


def _beside(members: Sequence[ir.Node]) -> tuple[str, ...]:
    read = [value.producer() for node in members for value in node.inputs if value is not None]
    given = [use.node for node in members for value in node.outputs for use in value.uses()]
    inside = set(members)
    return tuple(dict.fromkeys(str(node.name) for node in (*read, *given) if node is not None and node not in inside))


def time_regions(
    regions: Sequence[Region],
    int8: Sequence[Layers],
    twin: Sequence[Layers],
    confidence: float,
    rng: np.random.Generator,
) -> tuple[RegionTime, ...]:
    """Compare regions by profiles of both engines; a region that no layer of one of them tells of is left out.

    Args:
        regions: those of the INT8 graph.
        int8: the layers of the INT8 engine, round by round.
        twin: those of the twin; the rounds correspond.
        confidence: of the intervals.
        rng: draws the resamples.
    """
    owner = _owners(regions, [layer.nodes for layer in (*int8[0], *twin[0])])
    beside = {name: index for index, region in enumerate(regions) for name in region.beside}
    mine = [[_owned(layers, owner, beside) for layers in rounds] for rounds in (int8, twin)]
    times = []
    for index, region in enumerate(regions):
        quantized, plain = ([layers.get(index, ()) for layers in rounds] for rounds in mine)
        if not all(map(_seconds, (*quantized, *plain))):
            continue
        ours, theirs = ([np.array([_seconds(layers)]) for layers in rounds] for rounds in (quantized, plain))
        speedup = ratio_of_rounds(theirs, ours, confidence, rng)
        times.append(RegionTime(region, _parts(_typical(quantized), _typical(plain)), speedup))
    return tuple(times)


def _owners(regions: Sequence[Region], fused: Iterable[Sequence[str]]) -> Mapping[str, int]:
    """Which region every node is compared in."""
    owner = {name: index for index, region in enumerate(regions) for name in (*region.nodes, *region.added)}
    waiting = list(fused)
    while True:
        touching = [names for names in waiting if any(name in owner for name in names)]
        drawn = {name: _majority(names, owner) for names in touching for name in names if name not in owner}
        if not drawn:
            return owner
        owner.update(drawn)


def _majority(names: Sequence[str], owner: Mapping[str, int]) -> int:
    return Counter(owner[name] for name in names if name in owner).most_common(1)[0][0]


def _owned(layers: Layers, owner: Mapping[str, int], beside: Mapping[str, int]) -> dict[int, list[LayerTime]]:
    """The layers of each region, with the copies beside it."""
    found: dict[int, list[LayerTime]] = {}
    for layer in layers:
        owners = owner if any(name in owner for name in layer.nodes) else beside if layer.copies else {}
        if any(name in owners for name in layer.nodes):
            found.setdefault(_majority(layer.nodes, owners), []).append(layer)
    return found


def _parts(int8: Layers, twin: Layers) -> tuple[PartTime, ...]:
    """Layers of both engines, those together that share nodes."""
    parts: list[PartTime] = []
    for layer, ours in [*((layer, True) for layer in int8), *((layer, False) for layer in twin)]:
        joined = [part for part in parts if set(part.nodes) & set(layer.nodes)]
        nodes = dict.fromkeys(name for names in (*(part.nodes for part in joined), layer.nodes) for name in names)
        seconds = [sum(part.int8 for part in joined), sum(part.twin for part in joined)]
        seconds[0 if ours else 1] += layer.seconds
        place = parts.index(joined[0]) if joined else len(parts)
        parts = [part for part in parts if part not in joined]
        parts.insert(place, PartTime(tuple(nodes), *seconds))
    return tuple(parts)


def _seconds(layers: Iterable[LayerTime]) -> float:
    return sum(layer.seconds for layer in layers)


def _typical(rounds: Sequence[Sequence[LayerTime]]) -> tuple[LayerTime, ...]:
    """The layers, with the median of their rounds."""
    seconds: dict[str, list[float]] = {}
    for layers in rounds:
        for layer in layers:
            seconds.setdefault(layer.name, []).append(layer.seconds)
    return tuple(replace(layer, seconds=float(np.median(seconds[layer.name]))) for layer in rounds[0])
