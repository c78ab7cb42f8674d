"""Theorem 1 in numbers: how many dimensions Manifold Mixup needs for a loss of zero, and what it then does to classes.

Everything before the mixed layer is free, so the hidden states h_i of dimension m may be anything; f(h) = A h + b is
linear; the loss is the squared distance to the one-hot label e_(y_i) among d classes. Let r_i = A h_i + b - e_(y_i).
The residual of a mixed pair is lam r_i + (1 - lam) r_j, because f is affine and the weights sum to 1. So, over
independent uniform i, j and lam ~ Beta(alpha, alpha),

    J = 2 E[lam^2] mean |r_i|^2 + 2 E[lam (1 - lam)] |mean r_i|^2.

J = 0 means that all r_i vanish: A h_i + b = e_(y_i), or A'H + b1' = I in the paper's letters.

- The one-hot labels span d - 1 directions, and A h can span no more than m: J = 0 needs m >= d - 1, and with free
  states that is enough. Below it, the best A h + b is the projection of the labels on their m leading principal
  directions. With balanced classes their covariance has d - 1 eigenvalues 1/d, and mean r = 0 there, hence
  min J = 2 E[lam^2] (d - 1 - m) / d.
- The states of one class solve A h = e_c - b: a subspace of dimension m - rank(A), where rank(A) >= d - 1. That is at
  most m - d + 1 (Corollary 1), and a single point at m = d - 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["fit_free_states", "least_risk", "linear_mixup_risk"]


def linear_mixup_risk(states: Tensor, target: Tensor, weight: Tensor, bias: Tensor, alpha: float = 1.0) -> Tensor:
    """Give the Manifold Mixup loss J of a linear f, expected over all pairs and lam ~ Beta(alpha, alpha), exactly.

    Args:
        states: (n, m) hidden states h_i.
        target: (n,) class indices.
        weight: (d, m), A.
        bias: (d,), b.
        alpha: of the Beta distribution, above 0; 1 is uniform.

    Returns:
        0-d tensor, differentiable in all but the target.

    Example:
        >>> one_hot, target = torch.eye(3), torch.arange(3)
        >>> linear_mixup_risk(one_hot, target, torch.eye(3), torch.zeros(3))
        tensor(0.)
    """
    residual = states @ weight.T + bias - F.one_hot(target, len(weight))
    square = (alpha + 1) / (4 * alpha + 2)  # E[lam^2]
    product = alpha / (4 * alpha + 2)  # E[lam (1 - lam)]
    return 2 * square * residual.square().sum(1).mean() + 2 * product * residual.mean(0).square().sum()


def least_risk(num_classes: int, dim: int, alpha: float = 1.0) -> float:
    """Give the smallest possible ``linear_mixup_risk`` with balanced classes: 0 from dim = num_classes - 1 on.

    Args:
        num_classes: number of classes, d in the paper.
        dim: of the hidden space.
        alpha: of Beta(alpha, alpha), which lam is drawn from.

    Example:
        >>> [round(least_risk(4, dim), 4) for dim in (1, 2, 3, 4)]
        [0.3333, 0.1667, 0.0, 0.0]
    """
    return 2 * (alpha + 1) / (4 * alpha + 2) * max(num_classes - 1 - dim, 0) / num_classes


def fit_free_states(
    num_classes: int,
    dim: int,
    points_per_class: int = 20,
    alpha: float = 1.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Minimise the Manifold Mixup loss over free hidden states and a linear f, by L-BFGS in float64.

    The columns of A and b - 1/d start with sum 0, and the gradient keeps them so: A has rank min(dim, d - 1), and
    Corollary 1 holds with equality. States start small, because from large ones the minimisation can diverge.

    Args:
        num_classes: d.
        dim: m, dimension of the hidden states.
        points_per_class: free states per class.
        alpha: lam ~ Beta(alpha, alpha).
        generator: draws the start; the global one if None.

    Returns:
        The loss reached (0-d), the states (num_classes * points_per_class, dim) and their classes.

    Example:
        >>> risk, states, target = fit_free_states(num_classes=3, dim=2, generator=torch.Generator().manual_seed(0))
        >>> bool(risk < 1e-6), [round(states[target == c].std(0).max().item(), 3) for c in range(3)]
        (True, [0.0, 0.0, 0.0])
    """
    target = torch.arange(num_classes).repeat_interleave(points_per_class)
    states = 0.1 * torch.randn(len(target), dim, dtype=torch.float64, generator=generator)
    weight = torch.randn(num_classes, dim, dtype=torch.float64, generator=generator)
    weight -= weight.mean(0)
    bias = torch.full((num_classes,), 1 / num_classes, dtype=torch.float64)
    parameters = [p.requires_grad_() for p in (states, weight, bias)]
    optimiser = torch.optim.LBFGS(
        parameters,
        max_iter=2000,
        tolerance_grad=1e-12,
        tolerance_change=0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        risk = linear_mixup_risk(states, target, weight, bias, alpha)
        risk.backward()  # type: ignore[no-untyped-call]
        return risk

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    return closure().detach(), states.detach(), target
