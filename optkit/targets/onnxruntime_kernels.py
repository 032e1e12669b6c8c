"""Which ONNX nodes the kernels of a model that ONNX Runtime has optimized compute, as far as names tell.

ONNX Runtime fuses nodes and renames what it makes of them, but it leaves traces. A kernel carries the name of a node
that it computes, maybe with an ending (``conv_token_3``, ``product/MatMulScaleFusion/``), or in its blocked layout that
of the value which such a node gave (``relu_1_nchwc``), or it writes a value of the original graph. A kernel without any
of these only moves data into another layout, and counts as part of the one that reads it. A node that no kernel is
named after was fused: where it has weights or dequantizes, into the kernel that reads it, else into the one it reads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from optkit.models import OnnxModel

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

_ENDING = re.compile(r"(_token_\d+|/\w+/?)$")
_BLOCKED = "_nchwc"

_READ_BY_ITS_KERNEL = frozenset(
    {"Conv", "ConvTranspose", "DequantizeLinear", "DynamicQuantizeLinear", "Gemm", "MatMul"}
)


def kernel_nodes(model: OnnxModel, kernels: Sequence[onnx.NodeProto]) -> list[tuple[str, ...]]:
    """The names of the nodes of ``model`` that each kernel computes; none for a kernel that nothing leads to.

    Args:
        model: what was optimized, its nodes named.
        kernels: the nodes of what came out, in topological order.
    """
    return _Traces(model, kernels).nodes()


class _Traces:
    def __init__(self, model: OnnxModel, kernels: Sequence[onnx.NodeProto]) -> None:
        self._kernels = kernels
        self._graph = [node for node in model.ir.graph if node.name]
        self._nodes: Mapping[str, ir.Node] = {str(node.name): node for node in self._graph}
        self._makers = {str(value.name): str(node.name) for node in self._graph for value in node.outputs}

    def nodes(self) -> list[tuple[str, ...]]:
        found: list[list[str]] = [[] for _ in self._kernels]
        for node in self._graph:
            kernel = self._kernel_of(node)
            if kernel is not None:
                found[kernel].append(str(node.name))
        for index, names in enumerate(found):
            if not names and (main := self._mains[index]) is not None:
                names.append(main)
        return [tuple(names) for names in found]

    @cached_property
    def _mains(self) -> list[str | None]:
        """The node that each kernel is named after, or that the kernel is which it moves data for."""
        mains = [self._named_after(kernel) for kernel in self._kernels]
        readers: dict[str, int] = {}
        for index in reversed(range(len(self._kernels))):
            reader = next((readers[name] for name in self._kernels[index].output if name in readers), None)
            if mains[index] is None and reader is not None:
                mains[index] = mains[reader]
            readers.update((name, index) for name in self._kernels[index].input)
        return mains

    def _named_after(self, kernel: onnx.NodeProto) -> str | None:
        return next((name for name in self._traces(kernel) if name in self._nodes), None)

    def _traces(self, kernel: onnx.NodeProto) -> Iterator[str]:
        yield kernel.name
        if kernel.name.endswith(_BLOCKED):
            yield self._makers.get(kernel.name.removesuffix(_BLOCKED), "")
        yield from (self._makers.get(name, "") for name in kernel.output)
        yield _ENDING.sub("", kernel.name)

    @cached_property
    def _own(self) -> dict[str, int]:
        """The kernel that is named after a node; of several the last, for those before it prepare its input."""
        return {name: index for index, name in enumerate(self._mains) if name is not None}

    def _kernel_of(self, node: ir.Node) -> int | None:
        """The kernel that computes a node: the nearest one, first in the direction that such nodes are fused in."""
        seen: set[str] = set()
        waiting = [node]
        while waiting:
            near = waiting.pop()
            name = str(near.name)
            if name in self._own:
                return self._own[name]
            if name not in seen:
                seen.add(name)
                waiting.extend(_neighbours(near))
        return None


def _neighbours(node: ir.Node) -> list[ir.Node]:
    """What a node reads and what reads it; the likeliest to be in its kernel is last."""
    makers = [producer for value in node.inputs if value is not None and (producer := value.producer()) is not None]
    readers = [use.node for value in node.outputs for use in value.uses()]
    first, then = (readers, makers) if node.op_type in _READ_BY_ITS_KERNEL else (makers, readers)
    return [*reversed(then), *reversed(first)]
