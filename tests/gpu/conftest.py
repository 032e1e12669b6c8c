"""GPU tests run only where the worker's Python has TensorRT and the machine a GPU; else they say why not."""

from __future__ import annotations

from pathlib import Path

import pytest

from optkit.targets.tensorrt import TensorRtTarget


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    if not here:
        return
    available = TensorRtTarget().can_run()
    for item in here:
        item.add_marker(pytest.mark.gpu)
        if not available.ok:
            item.add_marker(pytest.mark.skip(reason=available.reason))
