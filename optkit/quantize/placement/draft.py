"""What placement decides, and the draft that the rules write it into."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import onnx_ir as ir

WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
"""The ops that INT8 is for: everything else is quantized, if at all, to stay between them."""

RECURRENT = frozenset({"GRU", "LSTM", "RNN"})
"""Ops with weights that only dynamic quantization may take."""

# ONNX: which input is the weight of these ops, and which the bias
_WEIGHT, _BIAS = 1, 2


class Use(NamedTuple):
    """One input of one node."""

    node: str
    position: int


@dataclass(frozen=True)
class Placement:
    """What is quantized. Names are those of the float graph.

    Attributes:
        inputs: activations that are quantized for one use only; the tensor stays float elsewhere.
        outputs: activations that are quantized for all of their uses, by name.
        dynamic: names of the nodes that find the range of their activation at each call; no Q/DQ pair, no calibration.
        weights: constant operands with the axis of their scales.
        biases: constant operands that are stored as INT32, with scale(input 0) * scale(input 1).
        apart: names of Adds that must not be merged with the product before them: their vector gets a 1 before it.
        same_scale: tensor -> the tensor whose scale it takes over, because the op between them changes no value.
        one_scale: groups of tensors that share the scale of all of them together.
        int8: names of the nodes that compute in INT8.
        kept_float: names of the weighted nodes that do not, and why.
    """

    inputs: frozenset[Use]
    outputs: frozenset[str]
    dynamic: frozenset[str]
    weights: dict[Use, int]
    biases: frozenset[Use]
    apart: frozenset[str]
    same_scale: dict[str, str]
    one_scale: tuple[frozenset[str], ...]
    int8: tuple[str, ...]
    kept_float: dict[str, str]
    tensors: frozenset[str]
    """Every activation that gets a Q/DQ pair."""

    @property
    def observed(self) -> frozenset[str]:
        """The tensors that calibration must see."""
        return self.tensors - self.same_scale.keys()


@dataclass
class Draft:
    """What the rules have decided so far, in the order of the graph."""

    int32_bias: bool = False
    opset: int = 20
    inputs: dict[Use, ir.Value] = field(default_factory=dict)
    outputs: dict[str, ir.Value] = field(default_factory=dict)
    dynamic: set[str] = field(default_factory=set)
    weights: dict[Use, int] = field(default_factory=dict)
    biases: set[Use] = field(default_factory=set)
    apart: set[str] = field(default_factory=set)
    same_scale: dict[str, str] = field(default_factory=dict)
    one_scale: list[frozenset[str]] = field(default_factory=list)
    int8: dict[str, None] = field(default_factory=dict)
    kept_float: dict[str, str] = field(default_factory=dict)

    def quantize_input(self, node: ir.Node, index: int) -> None:
        """Quantize an activation for this use of it."""
        value = node.inputs[index]
        assert value is not None and node.name is not None  # rules ask for inputs that exist; placement names nodes
        self.inputs[Use(node.name, index)] = value
        self.int8[node.name] = None

    def quantize_at_run_time(self, node: ir.Node) -> None:
        """Let a node quantize what it reads by the range that each call has."""
        assert node.name is not None
        self.dynamic.add(node.name)
        self.int8[node.name] = None

    def quantize_output(self, value: ir.Value, same_scale_as: ir.Value | None = None) -> None:
        """Quantize a tensor for all of its uses."""
        assert value.name is not None
        self.outputs[value.name] = value
        producer = value.producer()
        if producer is not None and producer.name is not None:
            self.int8[producer.name] = None
        if same_scale_as is not None and same_scale_as.name is not None:
            self.same_scale[value.name] = self.same_scale.get(same_scale_as.name, same_scale_as.name)

    def quantize_weight(self, node: ir.Node, axis: int, position: int = _WEIGHT) -> None:
        """Quantize a constant operand, and the bias after the second one if the policy has it as INT32."""
        assert node.name is not None
        self.weights[Use(node.name, position)] = axis
        if node.name in self.dynamic:
            return  # without a scale of the activation there is none for an INT32 bias
        if self.int32_bias and len(node.inputs) > _BIAS and node.inputs[_BIAS] is not None:
            self.biases.add(Use(node.name, _BIAS))

    def keep_apart(self, add: ir.Node) -> None:
        """Do not let the runtime merge an Add with the product before it."""
        assert add.name is not None
        self.apart.add(add.name)

    def keep_float(self, node: ir.Node, reason: str) -> None:
        """Leave a node in float, and say why."""
        assert node.name is not None
        self.kept_float[node.name] = reason

    def is_int8(self, value: ir.Value | None) -> bool:
        """Whether every use of a tensor reads its quantized form."""
        return value is not None and value.name in self.outputs

    def finished(self) -> Placement:
        """The decisions, frozen."""
        tensors = {value.name for value in self.inputs.values() if value.name} | self.outputs.keys()
        groups = _united(group & tensors for group in self.one_scale)
        return Placement(
            inputs=frozenset(self.inputs),
            outputs=frozenset(self.outputs),
            dynamic=frozenset(self.dynamic),
            weights=dict(self.weights),
            biases=frozenset(self.biases),
            apart=frozenset(self.apart),
            same_scale={name: source for name, source in self.same_scale.items() if name in tensors},
            one_scale=tuple(group for group in groups if len(group) > 1),
            int8=tuple(self.int8),
            kept_float=dict(self.kept_float),
            tensors=frozenset(tensors),
        )


def _united(groups: Iterable[frozenset[str]]) -> list[frozenset[str]]:
    """Groups that have a tensor in common become one."""
    united: list[frozenset[str]] = []
    for group in groups:
        joined = [other for other in united if other & group]
        united = [*(other for other in united if other not in joined), group.union(*joined)]
    return united
