"""Names every node."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from optkit.context import Context
from optkit.models import OnnxModel, Signature
from optkit.passes.graph_edit import GraphEdit
from optkit.quantize.placement import name_nodes

if TYPE_CHECKING:
    import onnx_ir as ir


class SpellOutNames(GraphEdit):
    """Nodes without a name of their own get one: by names a builder is told precisions, and tells what it made."""

    use: Literal["spell_out_names"] = "spell_out_names"

    def applies(self, model: ir.Model) -> bool:
        """Whether a node has no name, or one that another has."""
        names = [node.name for node in model.graph]
        return not all(names) or len({*names}) < len(names)

    def edit(self, model: ir.Model, context: Context) -> bool:
        """Name what has no name, and number the names that are there twice."""
        name_nodes(OnnxModel(model, Signature((), ())))
        return True
