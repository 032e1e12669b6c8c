from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from optkit.models import Signature, TorchModel
from optkit.pruning.sparsity import apply_masks, is_two_of_four, masks


@pytest.mark.parametrize(
    ("rows", "axis", "answer"),
    [
        ([[1, 0, 0, 2], [0, 3, 4, 0]], 1, True),
        ([[1, 0, 0, 0], [0, 0, 0, 0]], 1, True),
        ([[1, 2, 0, 3], [0, 3, 4, 0]], 1, False),
        ([[1, 0, 0, 2, 5], [0, 3, 4, 0, 0]], 1, False),
        ([[1, 0], [0, 3], [0, 4], [2, 0]], 0, True),
        ([[1, 0], [0, 3], [2, 4], [2, 0]], 0, False),
    ],
)
def test_two_of_four_holds_along_one_axis(rows, axis, answer):
    assert is_two_of_four(np.array(rows, np.float32), axis) is answer


def test_two_of_four_of_a_convolution_runs_along_its_input_channels():
    weight = np.ones((2, 4, 3, 3), np.float32)
    weight[:, ::2] = 0
    assert is_two_of_four(weight)
    assert not is_two_of_four(weight.transpose(0, 2, 3, 1), axis=0)


def test_masks_keep_what_was_pruned_at_zero_and_leave_the_rest_alone():
    module = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.Linear(2, 2))
    with torch.no_grad():
        module[0].weight[:, :2] = 0
        module[1].weight[0, 0] = 0  # a zero that pruning did not make
    record = {"pattern": "2:4", "parameters": {"0.weight": 0.5}}
    model = TorchModel(module, Signature((), ()), json.loads(json.dumps({"sparsity": record})))
    found = masks(model)
    assert set(found) == {"0.weight"} and found["0.weight"].tolist() == [[False, False, True, True]] * 2
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    apply_masks(module, found)
    assert (module[0].weight[:, :2] == 0).all() and (module[0].weight[:, 2:] != 0).all()
    assert module[1].weight[0, 0] == 1


def test_a_dense_model_has_no_masks():
    assert masks(TorchModel(torch.nn.Linear(2, 2), Signature((), ()))) == {}
