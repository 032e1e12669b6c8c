"""What graph passes share: editing a clone in place, rules until nothing changes, and the check of the numbers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from optkit.context import Context
from optkit.errors import PostconditionError
from optkit.models import Feeds, OnnxModel, Signature
from optkit.numerics import Difference, compare
from optkit.passes.base import OnnxPass
from optkit.targets.onnxruntime import open_onnx

if TYPE_CHECKING:
    import onnx_ir as ir

log = logging.getLogger("optkit.passes")

ROUNDS = 16
"""After so many rounds of rules that still find something, two rules undo each other."""


class GraphEdit(OnnxPass):
    """A pass that edits in place, so that ``optimize_graph`` can run many of them on one clone."""

    touches: ClassVar[frozenset[str]] = frozenset()
    """Op types of which a graph must have one for this pass to find anything; empty: it looks at every graph."""

    def edit(self, model: ir.Model, context: Context) -> bool:
        """Edit the model; whether anything changed."""
        raise NotImplementedError

    def applies(self, model: ir.Model) -> bool:
        """Whether it is worth looking."""
        return not self.touches or any(node.op_type in self.touches for node in model.graph.all_nodes())

    def run(self, model: OnnxModel, context: Context) -> OnnxModel:
        """The edited clone, or the model itself if there is nothing to do."""
        if not self.applies(model.ir):
            return model
        after = model.clone()
        infer_missing_types(after.ir)
        return after if self.edit(after.ir, context) else model

    def ensures(self, before: OnnxModel, after: OnnxModel, context: Context) -> None:
        """The numbers are the same on ONNX Runtime without its own optimizations."""
        found = drift(before, after, context)
        if not is_same(found, tolerance_db(before.ir)):
            raise PostconditionError(f"changed the numbers: {found}; leave the pass out and report it")


class RuleEdit(GraphEdit):
    """A pass made of onnxscript rewrite rules."""

    def rules(self, context: Context) -> Sequence[tuple[str, Any]]:
        """The rules in the order in which they are tried, each with an op that its pattern has."""
        raise NotImplementedError

    def edit(self, model: ir.Model, context: Context) -> bool:
        """Apply the rules until none finds anything."""
        from onnxscript.rewriter import RewriteRuleSet

        # Every rule is tried on every node: those whose op is not there at all would take most of the time
        ops = {node.op_type for node in model.graph.all_nodes()}
        wanted = list(dict.fromkeys(rule for op, rule in self.rules(context) if op in ops))
        if not wanted:
            return False
        rules = RewriteRuleSet(wanted)
        for done in range(ROUNDS):
            if not rules.apply_to_model(model):
                return done > 0
            sweep(model)
        raise PostconditionError(f"its rules still change the graph after {ROUNDS} rounds: two of them undo each other")


CONTAINERS = ("Optional", "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert", "SplitToSequence")
"""Ops that give no tensor; ``onnx_ir`` infers a tensor's type for them nevertheless."""


def infer_missing_types(model: ir.Model) -> None:
    """Infer types and shapes if a value has no type; every pass may rely on them."""
    if any(value.dtype is None and node.op_type not in CONTAINERS for node in model.graph for value in node.outputs):
        infer_types(model)


def infer_types(model: ir.Model) -> None:
    """Infer types and shapes; what ``CONTAINERS`` give keeps the type that it has."""
    from onnx_ir.passes.common import ShapeInferencePass

    untyped = [value for node in model.graph if node.op_type in CONTAINERS for value in node.outputs]
    before = [(value, value.type) for value in untyped]
    ShapeInferencePass(strict_mode=False)(model)
    for value, kind in before:
        value.type = kind


def sweep(model: ir.Model) -> None:
    """Remove nodes and initializers that nothing uses, and the opset imports that they needed."""
    from onnx_ir.passes import common

    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedOpsetsPass()(model)


def label(node: ir.Node) -> str:
    """The node's name; the one of its first output if it has none."""
    return str(node.name or node.outputs[0].name)


def opset(model: ir.Model) -> int:
    """The version of ai.onnx that the model imports."""
    return model.graph.opset_imports.get("", 1)


def constant(value: ir.Value | None) -> Any:
    """The NumPy array of an initializer or of a Constant node's output, or None."""
    import onnx_ir as ir

    if value is None or value.is_graph_input():
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def scalar(value: ir.Value | None) -> float | None:
    """The value of a constant with one element, or None."""
    array = constant(value)
    return float(array.reshape(())) if array is not None and array.size == 1 and array.dtype.kind in "fiuV" else None


def rank(value: ir.Value | None) -> int | None:
    """How many dimensions the value has, if that is known."""
    return None if value is None or value.shape is None else len(value.shape)


def replace(model: ir.Model, old: ir.Value, new: ir.Node) -> None:
    """Put ``new`` where ``old`` was made: it takes over name, type, shape and uses; what it replaces is swept."""
    import onnx_ir as ir

    node = old.producer()
    assert node is not None  # a graph input is never replaced
    ir.convenience.replace_nodes_and_values(model.graph, node, [node], [new], [old], [new.outputs[0]])


def sample_feeds(signature: Signature, context: Context) -> Feeds:
    """Random feeds, the same at every call: two samples where the batch is dynamic and may be two."""
    batch = signature.batch
    chosen = {batch: min(max(2, signature.range(batch).min), signature.range(batch).max)} if batch else {}
    return signature.random_feeds(context.rng("graph passes"), **chosen)


def drift(before: OnnxModel, after: OnnxModel, context: Context) -> Difference:
    """How far the outputs of two graphs are apart on random feeds, without ONNX Runtime's own optimizations."""
    feeds = sample_feeds(before.signature, context)
    with open_onnx(before, context.threads, optimize=False) as runner:
        wanted = runner.run(feeds)
    with open_onnx(after, context.threads, optimize=False) as runner:
        return compare(wanted, runner.run(feeds))


def tolerance_db(model: ir.Model) -> float:
    """The SQNR that equal arithmetic in another order keeps: rounding to INT8 or FP16 makes the order visible."""
    import onnx_ir as ir

    if any(node.op_type == "QuantizeLinear" for node in model.graph):
        return 30.0
    half = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
    return 40.0 if any(output.dtype in half for node in model.graph for output in node.outputs) else 80.0


def is_same(found: Difference, sqnr_db: float) -> bool:
    """Whether the difference is no more than rounding; outputs of zero have no SQNR and are judged by their error."""
    return found.sqnr_db >= sqnr_db or found.max_abs <= 1e-7
