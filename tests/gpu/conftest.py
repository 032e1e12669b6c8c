"""GPU tests run only where there is a GPU and the worker's Python has TensorRT, which ``cuda`` ones do not need."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from optkit.targets.tensorrt import TensorRtTarget


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    if not here:
        return
    available = TensorRtTarget().can_run()
    for item in here:
        item.add_marker(pytest.mark.gpu)
        if item.get_closest_marker("cuda"):
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="PyTorch sees no GPU"))
        elif not available.ok:
            item.add_marker(pytest.mark.skip(reason=available.reason))
