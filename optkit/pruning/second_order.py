"""Second-order pruning without training (SparseGPT, Frantar and Alistarh 2023).

A layer computes :math:`Y = W X` for inputs :math:`X`. To set the weight :math:`w_c` of a row to zero costs
:math:`w_c^2 / [U_{cc}]^2` if the weights behind it make up for it as well as they can, where :math:`U` is the upper
Cholesky factor of the inverse of :math:`H = X X^T`. Going through the columns in order, each row loses the cheapest,
and what that costs is moved to the columns behind: :math:`w_{c:} \\leftarrow w_{c:} - (w_c / U_{cc}) U_{c,c:}`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_DAMPING = 0.01
"""Of the mean of the diagonal, added to it: keeps the factors finite where inputs hardly vary."""

_BLOCK = 128
"""Columns that are chosen together where the pattern is free."""


def most_worth(costs: torch.Tensor, density: float | None) -> torch.Tensor:
    """Which weights to keep, bool[rows, columns]: two of any four neighbours, or the share ``density`` of all."""
    import torch

    if density is None:
        fours = costs.reshape(-1, 4)
        keep = torch.zeros_like(fours, dtype=torch.bool)
        return keep.scatter_(1, fours.topk(2, dim=1).indices, True).reshape(costs.shape)
    keep = torch.zeros(costs.numel(), dtype=torch.bool)
    keep[costs.flatten().topk(round(density * costs.numel())).indices] = True
    return keep.reshape(costs.shape)


def inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the damped inverse, float64[columns, columns]."""
    import torch

    damped = hessian.double().clone()
    diagonal = damped.diagonal()
    diagonal += _DAMPING * diagonal.mean() + 1e-12
    factor: torch.Tensor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    return factor


def costs(weight: torch.Tensor, upper: torch.Tensor) -> torch.Tensor:
    """What it costs to lose each weight, float64[rows, columns]."""
    cost: torch.Tensor = weight.double().square() / upper.diagonal().square()
    return cost


def prune_rows(weight: torch.Tensor, upper: torch.Tensor, density: float | None) -> torch.Tensor:
    """Prune a layer and let what is left make up for what is gone.

    Args:
        weight: float[rows, columns]; with 2:4, each four neighbouring columns are a group.
        upper: the layer's ``inverse_factor``.
        density: the share of the weights to keep; None for 2:4.

    Returns:
        The pruned weight, float64[rows, columns].
    """
    rest = weight.double().clone()
    block = 4 if density is None else _BLOCK
    for start in range(0, rest.shape[1], block):
        end = min(start + block, rest.shape[1])
        keep = most_worth(costs(rest[:, start:end], upper[start:end, start:end]), density)
        for column in range(start, end):
            kept = keep[:, column - start]
            gone = rest[:, column] * ~kept / upper[column, column]
            rest[:, column:] -= gone[:, None] * upper[column, column:]
            rest[:, column] *= kept
    return rest
