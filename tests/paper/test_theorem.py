"""Theorem 1 and Corollary 1 of the paper, by optimisation of free hidden states."""

import numpy as np
import pytest
import torch
from numpy.polynomial.legendre import leggauss

from lightning_manifold_mixup.evaluation import ClassSpectrum
from lightning_manifold_mixup.paper.theorem import fit_free_states, least_risk, linear_mixup_risk


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(42)


def fit(num_classes, dim, **kwargs):
    return fit_free_states(num_classes, dim, generator=torch.Generator().manual_seed(dim), **kwargs)


def test_risk_is_the_loss_over_all_pairs_and_lams():
    """The definition, with the mean over lam ~ U(0, 1) by Gauss quadrature, exact for a polynomial of degree 2."""
    h, a, b = (torch.randn(shape, dtype=torch.float64) for shape in ((12, 3), (4, 3), (4,)))
    y = torch.randint(4, (12,))
    one_hot = torch.eye(4, dtype=torch.float64)[y]
    expected = 0.0
    for x, w in zip(*leggauss(3), strict=True):
        lam = (x + 1) / 2
        mixed = lam * h[:, None] + (1 - lam) * h[None]
        label = lam * one_hot[:, None] + (1 - lam) * one_hot[None]
        expected += w / 2 * (mixed @ a.T + b - label).square().sum(-1).mean()
    torch.testing.assert_close(linear_mixup_risk(h, y, a, b), expected)


@pytest.mark.parametrize("alpha", [0.2, 2.0])
def test_risk_of_other_alphas_by_sampling(alpha):
    h, a, b = (torch.randn(shape, dtype=torch.float64) for shape in ((6, 3), (4, 3), (4,)))
    y = torch.arange(6) % 4
    residual = h @ a.T + b - torch.eye(4, dtype=torch.float64)[y]
    lam = torch.from_numpy(np.random.default_rng(0).beta(alpha, alpha, 4000)).view(-1, 1, 1, 1)
    expected = (lam * residual[:, None] + (1 - lam) * residual[None]).square().sum(-1).mean()
    torch.testing.assert_close(linear_mixup_risk(h, y, a, b, alpha), expected, rtol=0.03, atol=0)


@pytest.mark.parametrize(("num_classes", "dim"), [(2, 1), (3, 2), (3, 4), (5, 4), (5, 7), (10, 9), (10, 12)])
def test_loss_vanishes_with_enough_dimensions(num_classes, dim):
    assert fit(num_classes, dim)[0] < 1e-6


@pytest.mark.parametrize(("num_classes", "dim"), [(3, 1), (5, 1), (5, 3), (10, 2), (10, 8)])
def test_loss_stays_away_from_zero_with_fewer(num_classes, dim):
    risk = fit(num_classes, dim)[0].item()
    assert risk > 0.06
    assert risk == pytest.approx(2 / 3 * (num_classes - 1 - dim) / num_classes, abs=1e-8)
    assert risk == pytest.approx(least_risk(num_classes, dim), abs=1e-8)


def test_other_alphas_have_the_same_threshold():
    assert fit(4, 3, alpha=2.0)[0] < 1e-6
    assert fit(4, 2, alpha=2.0)[0].item() == pytest.approx(least_risk(4, 2, alpha=2.0), abs=1e-8)


@pytest.mark.parametrize("num_classes", [2, 3, 5, 10])
def test_each_class_collapses_to_a_point_at_the_threshold(num_classes):
    _, states, target = fit(num_classes, num_classes - 1)
    means = torch.stack([states[target == c].mean(0) for c in range(num_classes)])
    spread = max((states[target == c] - means[c]).abs().max() for c in range(num_classes))
    assert spread < 1e-4 * torch.pdist(means).min()


@pytest.mark.parametrize(("num_classes", "dim"), [(2, 3), (3, 3), (3, 5), (5, 6), (10, 12)])
def test_each_class_lies_on_a_subspace_of_the_corollarys_dimension(num_classes, dim):
    _, states, target = fit(num_classes, dim)
    metric = ClassSpectrum(num_classes, dim)
    metric.update(states, target)
    values = metric.compute()["singular_values"]
    free = dim - num_classes + 1
    assert values[:, :free].min() > 0.05
    assert values[:, free:].max() < 1e-4
    for c in range(num_classes):  # and by NumPy, without the metric
        assert np.linalg.matrix_rank(np.cov(states[target == c].T.numpy()), tol=1e-9) == free
