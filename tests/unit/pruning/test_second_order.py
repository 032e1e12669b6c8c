from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from optkit.pruning.second_order import inverse_factor, most_worth, prune_rows
from optkit.pruning.sparsity import is_two_of_four
from optkit.pruning.unrolled import hessian, rows_of, weight_of


@pytest.fixture
def correlated() -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [6, 16] and inputs [16, 200] of which neighbours say nearly the same."""
    generator = torch.Generator().manual_seed(0)
    causes = torch.randn(8, 200, generator=generator, dtype=torch.float64)
    inputs = causes.repeat_interleave(2, 0) + 0.3 * torch.randn(16, 200, generator=generator, dtype=torch.float64)
    return torch.randn(6, 16, generator=generator, dtype=torch.float64), inputs


@pytest.mark.parametrize(("density", "share"), [(None, 0.5), (0.625, 0.625)])
def test_it_loses_less_than_magnitude_and_than_its_own_mask_alone(correlated, density, share):
    weight, inputs = correlated
    pruned = prune_rows(weight, inverse_factor(inputs @ inputs.T), density)
    assert float((pruned != 0).double().mean()) == share
    if density is None:
        assert is_two_of_four(pruned.numpy())

    def error(candidate: torch.Tensor) -> float:
        return float(((candidate - weight) @ inputs).square().sum())

    assert error(pruned) < 0.85 * error(weight * most_worth(weight.abs(), density))
    assert error(pruned) < 0.7 * error(weight * (pruned != 0))


def test_inputs_that_are_independent_leave_nothing_to_make_up_for():
    weight = torch.tensor([[4.0, -1, 2, 3, 1, 5, -6, 2]])
    pruned = prune_rows(weight, inverse_factor(torch.eye(8)), None)
    np.testing.assert_allclose(pruned, [[4, 0, 0, 3, 0, 5, -6, 0]], atol=1e-12)


def test_what_is_left_is_the_best_that_the_columns_behind_can_do():
    """Losing the first column of two: least squares of the second, by hand."""
    inputs = torch.tensor([[1.0, 2, 3], [2.0, 1, 2]], dtype=torch.float64)
    weight = torch.tensor([[0.1, 5.0]], dtype=torch.float64)
    pruned = prune_rows(weight, inverse_factor(inputs @ inputs.T), 0.5)
    best = (weight @ inputs) @ inputs[1] / (inputs[1] @ inputs[1])
    np.testing.assert_allclose(pruned, [[0, float(best)]], rtol=0.02)  # the damping is 1 %


def test_columns_that_are_always_zero_do_no_harm():
    inputs = torch.zeros(8, 20, dtype=torch.float64)
    inputs[::2] = torch.randn(4, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pruned = prune_rows(torch.ones(2, 8), inverse_factor(inputs @ inputs.T), None)
    assert pruned.isfinite().all() and (pruned[:, ::2] != 0).all() and (pruned[:, 1::2] == 0).all()


LAYERS = {
    "linear": (lambda: nn.Linear(8, 5, bias=False), (4, 3, 8)),
    "conv": (lambda: nn.Conv2d(4, 5, 3, bias=False), (2, 4, 6, 6)),
    "strided": (lambda: nn.Conv2d(4, 5, (3, 2), stride=(2, 1), padding=(1, 0), bias=False), (2, 4, 7, 6)),
    "dilated": (lambda: nn.Conv2d(4, 5, 3, dilation=2, padding="same", bias=False), (2, 4, 6, 6)),
    "reflected": (lambda: nn.Conv2d(4, 5, 3, padding=1, padding_mode="reflect", bias=False), (2, 4, 5, 5)),
    "signal": (lambda: nn.Conv1d(4, 5, 3, stride=2, padding=2, bias=False), (2, 4, 9)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layers_energy_is_that_of_its_rows_on_its_hessian(name: str):
    """tr(W H W^T) is the sum of squares of what the layer gives: columns and inputs are in the same order."""
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer, given = make(), torch.randn(shape)
    rows = rows_of(layer.weight.detach()).double()
    found = hessian(nn.Sequential(layer), "0", [(given,), (given,)])
    with torch.no_grad():
        wanted = 2 * layer(given).double().square().sum()
    np.testing.assert_allclose((rows @ found @ rows.T).trace(), wanted, rtol=1e-5)
    assert torch.equal(weight_of(layer, rows), layer.weight)


def test_four_neighbouring_columns_are_four_input_channels():
    weight = torch.zeros(1, 8, 2, 2)
    weight[0, 4:, 1, 0] = 1
    columns = rows_of(weight)[0].nonzero().flatten().tolist()
    assert columns[0] % 4 == 0 and all(b - a == 1 for a, b in itertools.pairwise(columns))


def test_a_layer_that_is_called_twice_is_seen_twice_and_forward_ends_there():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.layer(x)
            self.layer(3 * x)
            raise AssertionError("forward must not get here")

    x = torch.tensor([[1.0, 2.0]])
    np.testing.assert_allclose(hessian(Twice(), "layer", [(x,)], calls=2), 10 * (x.T @ x))
