"""Fixtures of the training tests: a teacher that is right, a student that is not, and the points."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from training_nets import frozen, net, write_points

from optkit.context import Context
from optkit.data import Data, open_data
from optkit.models import TorchModel


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def student() -> TorchModel:
    torch.manual_seed(1)
    return frozen(net(8))


@pytest.fixture
def teacher() -> TorchModel:
    """Right everywhere: the signs of both coordinates, taken apart by weights that were not learnt."""
    module = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[8.0, 0], [-8, 0], [0, 8], [0, -8]]))
        module[0].bias.zero_()
        module[2].weight.copy_(torch.tensor([[0.0, 1, 0, 1], [1, 0, 0, 1], [0, 1, 1, 0], [1, 0, 1, 0]]))
    return frozen(module)


@pytest.fixture
def points(tmp_path: Path) -> Callable[..., Data]:
    """Open the points with changes of the spec."""
    return lambda count=400, **spec: open_data(write_points(tmp_path, count, **spec))


@pytest.fixture
def taught(context: Context, points: Callable[..., Data], teacher: TorchModel) -> Context:
    """A context with the points and with the teacher as the model that came in."""
    return replace(context, data=points(), original=teacher)
