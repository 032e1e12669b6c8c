"""Where Q/DQ pairs go: a target's policy names its rules, and each rule is one file.

A rule looks at one node at a time, in the order of the graph, and writes into the draft what it decides. The first
rule that decides (returns True) has the last word on that node.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from optkit.errors import PreconditionError, did_you_mean
from optkit.models import OnnxModel
from optkit.quantize.placement.add_both_sides import add_both_sides
from optkit.quantize.placement.concat_one_scale import concat_one_scale
from optkit.quantize.placement.conv_in_out import conv_in_out
from optkit.quantize.placement.depthwise_float import depthwise_float
from optkit.quantize.placement.draft import RECURRENT, WEIGHTED, Draft, Placement, Use
from optkit.quantize.placement.dynamic_inputs import dynamic_inputs
from optkit.quantize.placement.dynamic_recurrent import dynamic_recurrent
from optkit.quantize.placement.head_float import head_float
from optkit.quantize.placement.linear_inputs import linear_inputs
from optkit.quantize.placement.pass_through import pass_through
from optkit.quantize.placement.pool_in_out import pool_in_out
from optkit.quantize.placement.skip_branch import skip_branch
from optkit.quantize.placement.small_kernels_float import small_kernels_float
from optkit.quantize.placement.weighted_inputs import weighted_inputs
from optkit.targets.base import Int8Policy

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["RULES", "Placement", "Use", "name_nodes", "place"]

RULES: Mapping[str, Callable[[ir.Node, Draft], bool]] = {
    rule.__name__: rule
    for rule in (
        add_both_sides,
        concat_one_scale,
        conv_in_out,
        depthwise_float,
        dynamic_inputs,
        dynamic_recurrent,
        head_float,
        linear_inputs,
        pass_through,
        pool_in_out,
        skip_branch,
        small_kernels_float,
        weighted_inputs,
    )
}


def place(model: OnnxModel, policy: Int8Policy, exclude: Sequence[str] = ()) -> Placement:
    """Decide what is quantized.

    Args:
        model: a float model whose nodes have unique names (``name_nodes``).
        policy: what the target wants.
        exclude: names of nodes that stay in float, or patterns of them (``encoder.0/*``).

    Raises:
        PreconditionError: a name or pattern of ``exclude`` matches no node.
    """
    excluded = _matching(model, exclude)
    # Rules look at what comes further down, too: they must know of it what the recipe says
    kept_float = {str(node.name): "excluded by the recipe" for node in model.ir.graph if node.name in excluded}
    draft = Draft(int32_bias=policy.bias == "int32", kept_float=kept_float)
    for node in model.ir.graph:
        if node.name in excluded:
            continue
        if node.domain in ("", "ai.onnx"):
            any(RULES[name](node, draft) for name in policy.rules)
        if node.op_type in WEIGHTED | RECURRENT and node.name not in draft.int8 and node.name not in draft.kept_float:
            draft.keep_float(node, f"the target has no rule for {node.op_type}")
    return draft.finished()


def name_nodes(model: OnnxModel) -> None:
    """Give every node of the main graph that lacks one a name, and every repeated name a number. Edits the model."""
    given = {node.name for node in model.ir.graph}
    taken: set[str] = set()
    for index, node in enumerate(model.ir.graph):
        if not node.name or node.name in taken:
            node.name = f"{node.name or node.op_type}_{index}"
            while node.name in taken or node.name in given:
                node.name += "_"
        taken.add(node.name)


def _matching(model: OnnxModel, patterns: Sequence[str]) -> set[str]:
    names = [node.name for node in model.ir.graph if node.name]
    matching: set[str] = set()
    for pattern in patterns:
        found = [name for name in names if name == pattern] or fnmatch.filter(names, pattern)
        if not found:
            raise PreconditionError(f"exclude: no node is named {pattern!r}; {did_you_mean(pattern, names)}")
        matching.update(found)
    return matching
