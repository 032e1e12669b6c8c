"""An ONNX graph as a PyTorch module: it computes what the graph says, and its weights and scales have gradients.

Every node is a module of its own, so that hooks and features can name it. Q/DQ pairs become fake quantization with the
scales of the graph, so training starts at what the graph computes and ends at what is written back into it. This file
imports torch: it is imported when a graph is trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
from torch import Tensor, nn

from optkit.errors import PreconditionError
from optkit.models import OnnxModel
from optkit.quantize.placement.draft import WEIGHTED
from optkit.quantize.placement.graph import attribute, constant, only_consumer
from optkit.quantize.ranges import digest
from optkit.quantize.saturation import neighbours
from optkit.targets.pytorch import to_torch
from optkit.training.fake_quantize import STEPS, Activation, Bias, Float, Scale, Weight, to_array
from optkit.training.operators import ON_CPU, OPERATORS, unsupported

Array: TypeAlias = "np.ndarray[Any, Any]"

_LEARNS = {
    "BatchNormalization": (1, 2),
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "Gemm": (1, 2),
    "InstanceNormalization": (1, 2),
    "LayerNormalization": (1, 2),
    "MatMul": (0, 1),
    "PRelu": (1,),
}
"""Which inputs of an operator are trained if they are constants; and so is what an Add adds to a product."""


class GraphModule(nn.Module):
    """Takes the inputs and gives the outputs of an ONNX graph, in its order.

    Dropout and batch norms do what they do in inference. Weights of products, convolutions and norms and their biases
    are parameters, in float also where the graph stores integers; every other constant stays as it is.
    """

    def __init__(self, model: OnnxModel, *, learned: bool = False, sums_in_16_bits: bool = False) -> None:
        """Read a graph.

        Args:
            model: FP32, or with Q/DQ pairs; it is not changed.
            learned: whether the scales of Q/DQ pairs are trained too. Pairs that have the same scale keep the same.
            sums_in_16_bits: keep neighbours among INT8 weights within what ``quantize.saturation`` says.

        Raises:
            PreconditionError: the graph has a node that cannot be trained; the message names it.
        """
        super().__init__()
        graph = model.ir.graph
        self.nodes = nn.ModuleDict()
        self.trained = nn.ModuleDict()
        self.constants = nn.Module()
        self._digest = digest(model)
        self._floats: dict[str, str] = {}
        self._keys: dict[str, str] = {}
        self._on_cpu: dict[str, Tensor] = {}
        self._inputs = tuple(_name(value) for value in graph.inputs)
        self._outputs = tuple(_name(value) for value in graph.outputs)
        reader = _Reader(graph, learned, sums_in_16_bits)
        self._steps = tuple(self._step(node, reader, last_used) for node, last_used in _with_last_uses(graph))
        self._integers, self._scales = reader.integers, reader.scales
        for value in graph.outputs:
            self._hold(value)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the graph."""
        values: dict[str, Any] = {"": None, **self._on_cpu}
        values.update({name: getattr(self.constants, key) for name, key in self._keys.items()})
        values.update({name: self.trained[key]() for name, key in self._floats.items()})
        values.update(zip(self._inputs, inputs, strict=True))
        for step in self._steps:
            made = self.nodes[step.key](*(values[name] for name in step.inputs))
            values.update(zip(step.outputs, made if isinstance(made, tuple) else (made,), strict=False))
            for name in step.last_used:
                del values[name]
        return tuple(values[name] for name in self._outputs)

    def arrays(self) -> dict[str, Array]:
        """What training may have changed, as the graph stores it, by the name of the initializer."""
        modules: dict[str, Any] = dict(self.nodes)
        arrays = {name: modules[key].array() for name, key in self._integers.items()}
        arrays.update({name: to_array(modules[key].scale()) for name, key in self._scales.items()})
        floats: dict[str, Any] = dict(self.trained)
        return arrays | {name: floats[key].array() for name, key in self._floats.items()}

    def extra_repr(self) -> str:
        """What tells this graph from others."""
        return self._digest

    def _step(self, node: ir.Node, reader: _Reader, last_used: tuple[str, ...]) -> _Step:
        key = _free_key(self.nodes, node.name or node.op_type)
        self.nodes[key], inputs = reader.module(node, key)
        for value in inputs:
            self._hold(value)
        return _Step(key, tuple(map(_name, inputs)), tuple(map(_name, node.outputs)), last_used)

    def _hold(self, value: ir.Value | None) -> None:
        """Keep the data of an initializer that is read."""
        name = _name(value)
        if value is None or value.const_value is None or value.producer() is not None:
            return
        if name in self._floats or name in self._keys or name in self._on_cpu:
            return
        array = value.const_value.numpy()
        if array.dtype.kind == "f" and _learns(value):
            self._floats[name] = key = _free_key(self.trained, name)
            self.trained[key] = Float(array, _bias_step(value))
        elif array.dtype.kind in "iub" and array.ndim < 2:
            self._on_cpu[name] = to_torch(array.copy())  # shapes, axes and the like
        else:
            self._keys[name] = key = _free_key(self.constants, name)
            self.constants.register_buffer(key, to_torch(array.copy()), persistent=False)


@dataclass(frozen=True)
class _Step:
    """A node: the key of its module, the values that it reads and makes, and those that nobody reads after it."""

    key: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    last_used: tuple[str, ...]


class _Operator(nn.Module):
    """A node that computes in float."""

    def __init__(self, op_type: str, attributes: dict[str, Any]) -> None:
        super().__init__()
        self._op_type, self._attributes = op_type, attributes

    def forward(self, *inputs: Tensor | None) -> Any:
        """As ONNX defines it."""
        return OPERATORS[self._op_type](self._attributes, *_on_one_device(self._op_type, inputs))

    def extra_repr(self) -> str:
        """Its operator."""
        return self._op_type


class _Reader:
    """Makes the modules of nodes.

    Attributes:
        integers: the key of the module that holds what an initializer stores.
        scales: the key of the module whose learned scale an initializer stores; empty if none is learned.
    """

    def __init__(self, graph: ir.Graph, learned: bool, sums_in_16_bits: bool) -> None:
        self.integers: dict[str, str] = {}
        self.scales: dict[str, str] = {}
        self._learned, self._sums_in_16_bits = learned, sums_in_16_bits
        self._modules: dict[object, Scale] = {}
        self._clipped = {_parameters(node) for node in graph if node.op_type == "QuantizeLinear" and _is_clipped(node)}

    def module(self, node: ir.Node, key: str) -> tuple[nn.Module, Sequence[ir.Value | None]]:
        """A node's module, and the inputs that it takes."""
        if node.op_type == "QuantizeLinear":
            return self._quantize(node, key), node.inputs[:1]
        if node.op_type == "DequantizeLinear":
            return self._dequantize(node, key)
        why = unsupported(node)
        if why is not None:
            raise _refusal(node, why)
        attributes = {name: _plain(found) for name, found in node.attributes.items()}
        if node.op_type == "Split":
            attributes.setdefault("num_outputs", len(node.outputs))
        return _Operator(node.op_type, attributes), node.inputs

    def _quantize(self, node: ir.Node, key: str) -> nn.Module:
        if any(use.node.op_type != "DequantizeLinear" for use in node.outputs[0].uses()):
            raise _refusal(node, "what it writes is read as integers")
        _, zero_point, dtype = _parameters(node)
        self._note_scale(node, key)
        return Activation(self._activation_scale(node), zero_point, np.iinfo(dtype))

    def _dequantize(self, node: ir.Node, key: str) -> tuple[nn.Module, Sequence[ir.Value | None]]:
        stored = constant(node.inputs[0])
        if stored is None:
            quantize = _producer(node, 0)
            if quantize is None or quantize.op_type != "QuantizeLinear" or _parameters(quantize) != _parameters(node):
                raise _refusal(node, "it is not the other half of a QuantizeLinear")
            return nn.Identity(), node.inputs[:1]
        values, reader = stored.numpy(), only_consumer(node.outputs[0])
        if reader is None or values.dtype not in (np.int8, np.int32):
            raise _refusal(node, "it holds no INT8 weight or INT32 bias of one node")
        self.integers[_name(node.inputs[0])] = key
        self._note_scale(node, key)
        if values.dtype == np.int32:
            return self._bias(node, reader, values), ()
        pairs = neighbours(reader, values.shape) if self._sums_in_16_bits else None
        return Weight(values, self._weight_scale(node), attribute(node, "axis", 1), pairs), ()

    def _bias(self, node: ir.Node, reader: ir.Node, values: Array) -> nn.Module:
        of_input, of_weight = _producer(reader, 0), _producer(reader, 1)
        if of_input is None or of_weight is None or {of_input.op_type, of_weight.op_type} != {"DequantizeLinear"}:
            raise _refusal(node, "its scale is not that of an INT8 product")
        return Bias(values, self._activation_scale(of_input), self._weight_scale(of_weight))

    def _activation_scale(self, node: ir.Node) -> Scale:
        """One for all pairs with the same parameters: engines rely on some of them being the same."""
        parameters = _parameters(node)
        if parameters not in self._modules:
            # A Clip behind which INT8 saturates sooner is no work for the engine; a wider scale would bring it back
            widens = parameters not in self._clipped
            self._modules[parameters] = Scale(np.float32(parameters[0]), learned=self._learned, widens=widens)
        return self._modules[parameters]

    def _weight_scale(self, node: ir.Node) -> Scale:
        name = _name(node.inputs[1])
        if name not in self._modules:
            self._modules[name] = Scale(_array(node, 1), learned=self._learned)
        return self._modules[name]

    def _note_scale(self, node: ir.Node, key: str) -> None:
        if self._learned:
            self.scales[_name(node.inputs[1])] = key


def _with_last_uses(graph: ir.Graph) -> Iterator[tuple[ir.Node, tuple[str, ...]]]:
    """Every node, with the values that no node after it reads."""
    last = {value: node for node in graph for value in node.inputs if value is not None}
    kept = {value for value in last if value in set(graph.outputs) or constant(value) is not None}
    by_node: dict[ir.Node, list[str]] = {}
    for value, node in last.items():
        if value not in kept:
            by_node.setdefault(node, []).append(_name(value))
    yield from ((node, tuple(by_node.get(node, ()))) for node in graph)


def _learns(value: ir.Value) -> bool:
    """Whether a constant is a weight or a bias to every node that reads it."""
    return all(_is_weight(node, index) for node, index in value.uses())


def _is_weight(node: ir.Node, index: int) -> bool:
    if node.op_type == "Add":
        other = _producer(node, 1 - index)
        return other is not None and other.op_type == "MatMul"
    return index in _LEARNS.get(node.op_type, ())


def _bias_step(value: ir.Value) -> Array | None:
    """For what is added to an INT8 product: what a step of the product's weight does to it."""
    node, index = next(iter(value.uses()))
    product = _producer(node, 1 - index) if node.op_type == "Add" else node if index == 2 else None
    if product is None or product.op_type not in WEIGHTED:
        return None
    pairs = [_producer(product, i) for i in (0, 1)]
    if any(pair is None or pair.op_type != "DequantizeLinear" for pair in pairs):
        return None
    of_input, of_weight = (_array(pair, 1) for pair in pairs if pair is not None)
    return STEPS * of_input * of_weight


def _is_clipped(quantize: ir.Node) -> bool:
    source = _producer(quantize, 0)
    return source is not None and source.op_type == "Clip"


def _producer(node: ir.Node, index: int) -> ir.Node | None:
    value = node.inputs[index]
    return None if value is None else value.producer()


def _parameters(node: ir.Node) -> tuple[float, int, str]:
    """Scale, zero point and dtype of an activation's Q or DQ."""
    scale, zero_point = _array(node, 1), _array(node, 2) if len(node.inputs) > 2 else np.zeros((), np.uint8)
    if scale.size > 1 or zero_point.dtype.name not in ("uint8", "int8"):
        raise _refusal(node, "an activation needs one scale and a zero point in INT8 or UINT8")
    return scale.item(), zero_point.item(), zero_point.dtype.name


def _array(node: ir.Node, index: int) -> Array:
    tensor = constant(node.inputs[index])
    if tensor is None:
        raise _refusal(node, "its scale or zero point is no constant")
    return tensor.numpy()


def _plain(found: ir.Attr) -> Any:
    """An attribute's value; a tensor as PyTorch's."""
    return to_torch(found.as_tensor().numpy().copy()) if found.type == ir.AttributeType.TENSOR else found.value


def _refusal(node: ir.Node, why: str) -> PreconditionError:
    return PreconditionError(
        f"node {node.name!r} ({node.op_type}) cannot be trained: {why}; leave finetune_int8 out of the recipe"
    )


def _on_one_device(op_type: str, inputs: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Inputs that are computed with others go where those are; shapes and the like stay on the CPU."""
    device = next((x.device for x in inputs if x is not None and x.device.type != "cpu"), None)
    if device is None:
        return inputs
    stay = ON_CPU.get(op_type, frozenset())
    return [x if x is None or i in stay else x.to(device) for i, x in enumerate(inputs)]


def _free_key(container: nn.Module, name: str) -> str:
    """A name that a module may have there: without dots, and no method's."""
    key = name.replace(".", "_")
    while hasattr(container, key) or (isinstance(container, nn.ModuleDict) and key in container):
        key += "_"
    return key


def _name(value: ir.Value | None) -> str:
    return "" if value is None or value.name is None else value.name
