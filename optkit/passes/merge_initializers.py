"""Keeps one copy of equal initializers."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from typing import TYPE_CHECKING, Literal

from optkit.context import Context
from optkit.passes.graph_edit import GraphEdit

if TYPE_CHECKING:
    import onnx_ir as ir


class MergeInitializers(GraphEdit):
    """Initializers of the same type, shape and bytes become one; those that are graph inputs or outputs stay."""

    use: Literal["merge_initializers"] = "merge_initializers"

    def edit(self, model: ir.Model, context: Context) -> bool:
        """Let the first of each group serve all."""
        groups: dict[tuple[object, ...], list[ir.Value]] = defaultdict(list)
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and not (
                value.is_graph_input() or value.is_graph_output() or tensor.dtype.is_string()
            ):
                groups[tensor.dtype, tuple(tensor.shape)].append(value)
        changed = False
        for group in groups.values():
            # Bytes are read only where another tensor of that type and shape exists
            first: dict[bytes, ir.Value] = {}
            for value in group if len(group) > 1 else ():
                assert value.const_value is not None and value.name is not None
                keep = first.setdefault(hashlib.sha256(value.const_value.tobytes()).digest(), value)
                if keep is not value:
                    value.replace_all_uses_with(keep)
                    model.graph.initializers.pop(value.name)
                    changed = True
        return changed
