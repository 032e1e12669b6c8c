"""OptimizeGraph."""

from __future__ import annotations

from typing import Literal

from optkit.passes.base import OnnxPass


class OptimizeGraph(OnnxPass):
    """OptimizeGraph."""

    use: Literal["optimize_graph"] = "optimize_graph"
