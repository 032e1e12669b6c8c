"""What the casts to FP16 and BF16 share: which nodes may go, which stay in float32 and why, the Casts between them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import numpy as np
from pydantic import Field

from optkit.context import Context
from optkit.emulation import halves_in_float32
from optkit.errors import PostconditionError, PreconditionError, did_you_mean
from optkit.models import Feeds, OnnxModel
from optkit.numerics import compare
from optkit.passes.base import OnnxPass
from optkit.passes.graph_edit import constant, infer_missing_types, label, opset, sample_feeds
from optkit.quantize.linter import is_quantized
from optkit.quantize.placement.graph import is_int8_product, is_read
from optkit.targets.onnxruntime import open_onnx

if TYPE_CHECKING:
    import onnx_ir as ir

log = logging.getLogger("optkit.passes")

REDUCTIONS = (
    "CumSum",
    "Exp",
    "GlobalLpPool",
    "LpNormalization",
    "LpPool",
    "MeanVarianceNormalization",
    "Pow",
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSum",
    "ReduceLogSumExp",
    "ReduceMean",
    "ReduceProd",
    "ReduceSum",
    "ReduceSumSquare",
)
"""Ops that overflow or lose digits. Softmax and the normalizations that runtimes have kernels for (Layer, Group, RMS,
Instance, Batch) are not among them: they accumulate in float32 whatever their type, and attention kernels want the
products around Softmax in one type."""

INT8_SQNR = 15.0
"""The SQNR in dB that a cast of an INT8 graph must keep: as much as the validator wants of INT8 itself."""

MASK = -1e9
"""A constant below this stands for minus infinity in an attention mask: any large negative number does as well."""

SMALL_STEPS = (
    "Abs",
    "Add",
    "Ceil",
    "Div",
    "Floor",
    "Identity",
    "Max",
    "Min",
    "Mul",
    "Neg",
    "Reciprocal",
    "Reshape",
    "Round",
    "Sqrt",
    "Squeeze",
    "Sub",
    "Unsqueeze",
)
"""Cheap ops: between float32 nodes they stay in float32 too, rather than being wrapped in Casts."""

TYPED_BY_ATTRIBUTE = (
    "Bernoulli",
    "BlackmanWindow",
    "EyeLike",
    "HammingWindow",
    "HannWindow",
    "MelWeightMatrix",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
)
"""Ops that say their result's type in an attribute of their own; none of them is worth a cast."""


class FloatCast(OnnxPass):
    """Float32 becomes a smaller float type inside the graph; inputs and outputs keep theirs, behind Casts."""

    to: ClassVar[Literal["float16", "bfloat16"]]

    keep: tuple[str, ...] = ()
    """Further nodes that stay in float32: names of nodes or of ops."""
    keep_ops: tuple[str, ...] = REDUCTIONS
    """Ops that stay in float32 because they overflow or lose digits."""
    min_sqnr: float = Field(default=30.0, ge=0)
    """The least signal to noise ratio against float32 that is accepted on each output, in dB; of an INT8 graph 15 at
    most, since a value that the cast rounds may fall into the next INT8 step."""

    def requires(self, model: OnnxModel, context: Context) -> None:
        """Refuse names in ``keep`` that the graph does not have."""
        known = {name for node in model.ir.graph for name in (label(node), node.op_type)}
        for name in self.keep:
            if name not in known:
                raise PreconditionError(
                    f"`keep` names {name!r}, which is no node and no op: {did_you_mean(name, known)}"
                )

    def run(self, model: OnnxModel, context: Context) -> OnnxModel:
        """The cast model, with what stayed in float32 and why in the record ``kept_float32``."""
        from onnx_ir.passes import common

        after = model.clone()
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(after.ir)
        infer_missing_types(after.ir)
        kept = self._kept(after, context)
        if not _Rewrite(after.ir, self.to, kept).run():
            return model
        for name, reason in kept.items():
            log.debug("%s: %s stays in float32: %s", self.use, name, reason)
        return after.with_record("kept_float32", kept)

    def _kept(self, model: OnnxModel, context: Context) -> dict[str, str]:
        """Why each node that could be cast, or computes in float32 alone, stays as it is."""
        kept: dict[str, str] = {}
        largest = self.largest_values(model, context)
        lacks = {op for op, kind in context.target.dialect.lacks_in if kind == self.to}
        for node in model.ir.graph:
            reason = self._why_float32(node, opset(model.ir), largest)
            if reason is None and node.op_type in lacks:
                reason = f"{context.target.name} has no {node.op_type} in {self.to}"
            if reason is not None:
                kept[label(node)] = reason
        _spread(model.ir, kept)
        _spread_over_products(model.ir, kept)
        return kept

    def _why_float32(self, node: ir.Node, version: int, largest: Mapping[str, float]) -> str | None:
        ports = Ports.of(node, version, self.to)
        if not ports.floats:
            return None
        if {label(node), node.op_type} & {*self.keep}:
            return "the recipe keeps it"
        if node.op_type in self.keep_ops:
            return f"{node.op_type} would overflow or lose digits"
        if not ports.inputs and not ports.outputs:
            return f"{node.domain or 'ai.onnx'}.{node.op_type} takes no {self.to} at opset {version}"
        return self.why_not(node, largest)

    def why_not(self, node: ir.Node, largest: Mapping[str, float]) -> str | None:
        """Why the type cannot hold what this node takes or gives."""
        return None

    def largest_values(self, model: OnnxModel, context: Context) -> Mapping[str, float]:
        """The largest magnitude of each value on calibration data, by name; empty where that does not matter."""
        return {}

    def ensures(self, before: OnnxModel, after: OnnxModel, context: Context) -> None:
        """The outputs are finite, and close to float32, with every value rounded as the smaller type's kernels do."""
        feeds = sample_feeds(before.signature, context)
        with open_onnx(before, context.threads, optimize=False) as runner:
            wanted = runner.run(feeds)
        emulated = halves_in_float32(after)
        with open_onnx(emulated, context.threads, optimize=False) as runner:
            found = compare(wanted, runner.run(feeds))
        if found.nonfinite:
            culprit = first_not_finite(emulated, feeds, context)
            raise PostconditionError(f"{found.nonfinite} outputs are not finite, first at {culprit}: add it to `keep`")
        least = min(self.min_sqnr, INT8_SQNR) if is_quantized(before) else self.min_sqnr
        if found.sqnr_db < least and found.max_abs > 1e-7:
            raise PostconditionError(
                f"the output {found.worst!r} moves too far from float32: {found}; {least:g} dB are wanted: "
                "add nodes to `keep`, or lower `min_sqnr`"
            )


def first_not_finite(model: OnnxModel, feeds: Feeds, context: Context) -> str:
    """The first node in topological order whose result is not finite."""
    with probing(model, context) as probe:
        for name, array in probe(feeds):
            if not np.isfinite(array.astype(np.float32)).all():
                return f"the node that gives {name!r}"
    return "an output"


Values: TypeAlias = Iterator[tuple[str, np.ndarray[Any, Any]]]


@contextlib.contextmanager
def probing(model: OnnxModel, context: Context) -> Iterator[Callable[[Feeds], Values]]:
    """A function from feeds to every floating point value inside the graph, by name and in topological order."""
    probed = model.clone()
    outputs = probed.ir.graph.outputs
    names = [
        str(value.name)
        for node in probed.ir.graph
        for value in node.outputs
        if value.name and value.dtype is not None and value.dtype.is_floating_point() and is_read(value)
    ]
    outputs.extend(
        value
        for node in probed.ir.graph
        for value in node.outputs
        if value.name in names and not value.is_graph_output()
    )
    with open_onnx(probed, context.threads, optimize=False) as runner:

        def probe(feeds: Feeds) -> Values:
            found = runner.run(feeds)
            return ((name, found[name]) for name in names)

        yield probe


@dataclass(frozen=True)
class Ports:
    """The inputs and outputs of a node, by index, that are float32 and that its ONNX schema also allows in ``to``.

    ``floats`` is how many are float32 at all.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    floats: int

    @classmethod
    def of(cls, node: ir.Node, version: int, to: str) -> Ports:
        """Read the schema of the node's op."""
        import onnx
        import onnx_ir as ir

        inputs = [i for i, value in enumerate(node.inputs) if _is_float(value)]
        outputs = [i for i, value in enumerate(node.outputs) if _is_float(value)]
        nothing = cls((), (), len(inputs) + len(outputs))
        halves = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
        if node.op_type in ("Cast", "CastLike") and any(v.dtype in halves for v in (*node.inputs, *node.outputs) if v):
            return cls((), (), 0)  # a boundary between types that is there already
        controls = any(
            attr.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attr in node.attributes.values()
        )
        container = "Sequence" in node.op_type or "Optional" in node.op_type
        if controls or container or node.op_type in TYPED_BY_ATTRIBUTE:
            return nothing
        try:
            schema = onnx.defs.get_schema(node.op_type, version, node.domain)
        except onnx.defs.SchemaError:
            return nothing
        allowed = {c.type_param_str for c in schema.type_constraints if f"tensor({to})" in c.allowed_type_strs}
        return cls(
            tuple(i for i in inputs if _formal(schema.inputs, i) in allowed),
            tuple(i for i in outputs if _formal(schema.outputs, i) in allowed),
            nothing.floats,
        )

    @property
    def takes_either(self) -> bool:
        """Whether the node only looks at one float value and gives none, as Shape does: then no Cast is worth it."""
        return len(self.inputs) == 1 and not self.outputs


def _formal(parameters: Any, index: int) -> str:
    """The type of an input or output in a schema, whose last parameter may stand for many."""
    return str(parameters[min(index, len(parameters) - 1)].type_str)


def _is_float(value: ir.Value | None) -> bool:
    import onnx_ir as ir

    return value is not None and value.dtype == ir.DataType.FLOAT


def _spread(model: ir.Model, kept: dict[str, str]) -> None:
    """Keep the cheap nodes between float32 nodes, and those that compute indices, in float32 as well."""
    nodes = list(model.graph)
    for node in nodes:
        made = [value.producer() for value in node.inputs if _is_float(value) and constant(value) is None and value]
        if node.op_type in SMALL_STEPS and made and all(p is not None and label(p) in kept for p in made):
            kept.setdefault(label(node), "its inputs are float32")
    exact: set[str] = set()
    for node in reversed(nodes):
        uses = [use for value in node.outputs if _is_float(value) for use in value.uses()]
        cheap = node.op_type in SMALL_STEPS or node.op_type in ("Cast", "Range", "Clip")
        if cheap and uses and all(_is_exact(use.node, use.idx, exact) for use in uses):
            exact.add(label(node))
            kept.setdefault(label(node), "it computes sizes or indices")


def _spread_over_products(model: ir.Model, kept: dict[str, str]) -> None:
    """Keep both scales of a MatMul in float32 if one stays so: TensorRT-RTX 1.7 builds none with two types."""
    products = [node for node in model.graph if node.op_type == "MatMul" and is_int8_product(node)]
    groups = [[label for value in node.inputs[:2] for label in _labels_of_scale(value)] for node in products]
    known = -1
    while known < len(kept):
        known = len(kept)
        for labels in groups:
            if not kept.keys().isdisjoint(labels):
                for label in labels:
                    kept.setdefault(label, "the scale of a product's other operand is float32")


def _labels_of_scale(value: ir.Value | None) -> list[str]:
    """A value's DequantizeLinear, the QuantizeLinear that it reads, and what else reads that: they share a scale."""
    dequantizer = None if value is None else value.producer()
    source = None if dequantizer is None else dequantizer.inputs[0]
    if dequantizer is None or source is None:
        return []
    quantizer = source.producer()
    return [label(node) for node in ([dequantizer] if quantizer is None else [quantizer, *source.consumers()])]


def _is_exact(node: ir.Node, index: int, exact: Iterable[str]) -> bool:
    """Whether an input is a size or an index: it becomes an integer, or the op takes it in float32 only."""
    becomes_integer = node.op_type == "Cast" and not any(_is_float(value) for value in node.outputs)
    return becomes_integer or (node.op_type == "Resize" and index > 0) or label(node) in exact


class _Rewrite:
    """Casts every node that is not kept, and puts Casts where the types meet."""

    def __init__(self, model: ir.Model, to: str, kept: Mapping[str, str]) -> None:
        import onnx_ir as ir

        self.graph = model.graph
        self.to = to
        self.low = ir.DataType[to.upper()]
        version = opset(model)
        self.ports = {
            node: ports
            for node in model.graph
            if label(node) not in kept and ((ports := Ports.of(node, version, to)).inputs or ports.outputs)
        }

    def run(self) -> bool:
        """Rewrite the graph; whether any node was cast."""
        import onnx_ir as ir

        if not any(ports.outputs or not ports.takes_either for ports in self.ports.values()):
            return False
        made = {node.outputs[i] for node, ports in self.ports.items() for i in ports.outputs}
        boundary = [*self.graph.inputs, *self.graph.initializers.values()]
        inner = [value for node in self.graph for value in node.outputs]
        for value in dict.fromkeys((*boundary, *inner)):
            if _is_float(value):
                self._connect(value, made)
        for node in self.ports:
            self._set_type_attribute(node)
        for value in made:
            value.type = ir.TensorType(self.low)  # a new type: clones share theirs with the original
        return True

    def _connect(self, value: ir.Value, made: set[ir.Value]) -> None:
        """Give every user of ``value`` the type it wants."""
        is_low = value in made
        wanting_low = [(use.node, use.idx) for use in value.uses() if self._wants_low(use.node, use.idx)]
        wanting_float = [
            (use.node, use.idx)
            for use in value.uses()
            if (use.node, use.idx) not in wanting_low and not self._takes_either(use.node)
        ]
        if is_low and value.is_graph_output():
            self._restore_output(value, wanting_float)
        elif is_low and wanting_float:
            self._redirect(self._cast(value, float32=True), wanting_float)
        elif not is_low and wanting_low:
            lowered = self._lowered(value) if value.const_value is not None else self._cast(value, float32=False)
            self._redirect(lowered, wanting_low)
            if value.is_initializer() and not value.uses() and not value.is_graph_output():
                self.graph.initializers.pop(str(value.name))

    def _wants_low(self, node: ir.Node, index: int) -> bool:
        ports = self.ports.get(node)
        return ports is not None and index in ports.inputs and not ports.takes_either

    def _takes_either(self, node: ir.Node) -> bool:
        ports = self.ports.get(node)
        return ports is not None and ports.takes_either

    @staticmethod
    def _redirect(value: ir.Value, uses: Iterable[tuple[ir.Node, int]]) -> None:
        for node, index in uses:
            node.replace_input_with(index, value)

    def _cast(self, value: ir.Value, float32: bool) -> ir.Value:
        """A Cast right behind ``value``."""
        import onnx_ir as ir

        kind = ir.DataType.FLOAT if float32 else self.low
        name = f"{value.name}_{'float32' if float32 else self.to}"
        node = ir.node("Cast", [value], attributes={"to": int(kind)}, name=f"{name}_cast")
        node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = name, value.shape, ir.TensorType(kind)
        producer = value.producer()
        if producer is not None:
            self.graph.insert_after(producer, node)
        else:
            self.graph.insert_before(self.graph[0], node)
        return node.outputs[0]

    def _restore_output(self, value: ir.Value, others: list[tuple[ir.Node, int]]) -> None:
        """A Cast takes over the name and the place of a graph output."""
        import onnx_ir as ir

        name, users = value.name, [(use.node, use.idx) for use in value.uses()]
        value.name = f"{name}_{self.to}"
        restored = self._cast(value, float32=True)
        restored.name = name
        ir.convenience.replace_all_uses_with(value, restored, replace_graph_outputs=True)
        cast = restored.producer()
        assert cast is not None
        cast.replace_input_with(0, value)
        self._redirect(value, [use for use in users if use not in others])

    def _lowered(self, value: ir.Value) -> ir.Value:
        """The constant in the smaller type."""
        import onnx_ir as ir

        assert value.const_value is not None  # the caller asked
        name = f"{value.name}_{self.to}"
        tensor = ir.tensor(rounded(value.const_value.numpy(), self.to), dtype=self.low, name=name)
        lowered = ir.Value(name=name, shape=value.shape, type=ir.TensorType(self.low), const_value=tensor)
        self.graph.register_initializer(lowered)
        return lowered

    def _set_type_attribute(self, node: ir.Node) -> None:
        """Cast and ConstantOfShape say their result's type in an attribute."""
        import onnx_ir as ir

        if not self.ports[node].outputs:
            return
        if node.op_type == "Cast":
            node.attributes["to"] = ir.AttrInt64("to", int(self.low))
        elif node.op_type == "ConstantOfShape":
            old = node.attributes.get("value")
            array = old.as_tensor().numpy() if old is not None else np.zeros(1, np.float32)
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(rounded(array, self.to), dtype=self.low))
        elif "output_dtype" in node.attributes and node.op_type == "DequantizeLinear":
            node.attributes["output_dtype"] = ir.AttrInt64("output_dtype", int(self.low))


def rounded(array: np.ndarray[Any, Any], to: str) -> np.ndarray[Any, Any]:
    """The array in the smaller type: to nearest, finite values stay finite."""
    import ml_dtypes

    dtype = np.dtype(np.float16) if to == "float16" else np.dtype(ml_dtypes.bfloat16)
    most = float(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]  # ml_dtypes has no types
    return np.where(np.isfinite(array), np.clip(array, -most, most), array).astype(dtype)
