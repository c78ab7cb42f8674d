"""Strategies against the published formulas: the weights exactly, the draws by statistics."""

import json
import math

import numpy as np
import pytest
import scipy.stats
import torch
from jsonargparse import auto_cli

from lightning_manifold_mixup import Mix, draw_mix
from lightning_manifold_mixup.partners import ClassBalancedPartners, LabelDistancePartners, Partners, UniformPartners

DRAWS = 2000


def drawn(strategy, y, seed=0):
    """(DRAWS, n): the partners of each of many batches."""
    generator = np.random.default_rng(seed)
    return torch.stack([strategy(y, len(y), generator) for _ in range(DRAWS)])


def assert_drawn_by(partners, probabilities):
    """Sample by sample, by the chi-squared test where each partner is expected often enough for it."""
    for i, row in enumerate(probabilities):
        counts = torch.bincount(partners[:, i], minlength=len(row)).double()
        often = row * DRAWS > 5
        assert (counts[row == 0] == 0).all()
        observed = torch.cat([counts[often], counts[~often].sum()[None]])
        expected = torch.cat([row[often], row[~often].sum()[None]]) * DRAWS
        kept = expected > 0.5
        if kept.sum() == 1:  # all but certain
            assert observed[kept] > DRAWS - 3
            continue
        assert scipy.stats.chisquare(observed[kept], expected[kept], sum_check=False).pvalue > 1e-4, i


def c_mixup(y, bandwidth):
    """P(j | i) of Yao et al., sample by sample and number by number."""
    rows = [[float(v) for v in row.reshape(-1)] for row in y]
    weights = [
        [math.exp(-sum((a - b) ** 2 for a, b in zip(u, v, strict=True)) / (2 * bandwidth**2)) for v in rows]
        for u in rows
    ]
    return torch.tensor([[w / sum(row) for w in row] for row in weights], dtype=torch.double)


class TestUniform:
    def test_permutations_equally_likely(self):
        partners = drawn(UniformPartners(), torch.zeros(3))
        found, counts = partners.unique(dim=0, return_counts=True)
        assert found.sort(1).values.tolist() == [[0, 1, 2]] * 6
        assert scipy.stats.chisquare(counts).pvalue > 1e-4


class TestLabelDistance:
    @pytest.mark.parametrize(
        "y",
        [
            pytest.param(torch.tensor([0.0, 0.5, 2.0, -1.0, 0.5]), id="numbers"),
            pytest.param(torch.tensor([1, 4, 2, 2]), id="integers"),
            pytest.param(torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0)), id="vectors"),
            pytest.param(torch.tensor([1e6, 1e6 + 1, 1e6 + 2], dtype=torch.double), id="far from zero"),
        ],
    )
    @pytest.mark.parametrize("bandwidth", [0.3, 1.0, 5.0])
    def test_is_the_formula(self, y, bandwidth):
        strategy, expected = LabelDistancePartners(bandwidth), c_mixup(y, bandwidth)
        torch.testing.assert_close(strategy.log_weights(y, len(y)).softmax(1), expected)
        assert_drawn_by(drawn(strategy, y), expected)

    def test_far_labels_and_small_bandwidths_neither_overflow_nor_vanish(self):
        """exp(-d**2) is 0 for all but the sample itself and its equal, or no number at all."""
        for y, bandwidth in (([0.0, 1e300, 0.0], 1.0), ([0.0, 1.0, 0.0], 1e-300), ([-1e308, 1e308, -1e308], 1e-3)):
            partners = drawn(LabelDistancePartners(bandwidth), torch.tensor(y, dtype=torch.double))
            assert_drawn_by(partners, torch.tensor([[0.5, 0, 0.5], [0, 1, 0], [0.5, 0, 0.5]], dtype=torch.double))

    @pytest.mark.parametrize("bandwidth", [0.0, -1.0, math.nan, math.inf])
    def test_wrong_bandwidth(self, bandwidth):
        with pytest.raises(ValueError, match="finite bandwidth > 0"):
            LabelDistancePartners(bandwidth)

    def test_labels_without_a_distance_are_refused(self):
        with pytest.raises(ValueError, match="finite numbers, got 2 others"):
            LabelDistancePartners(1.0)(torch.tensor([0.0, math.nan, math.inf]), 3, np.random.default_rng(0))


class TestClassBalanced:
    @pytest.mark.parametrize(
        "y",
        [
            pytest.param(torch.tensor([0, 0, 0, 0, 7, 7, -1]), id="indices"),
            pytest.param(torch.tensor([[True], [False], [False]]), id="bool, one column"),
            pytest.param(torch.tensor([3, 3]), id="one class"),
        ],
    )
    def test_class_first_then_sample(self, y):
        labels = y.reshape(-1).tolist()
        row = [1 / len(set(labels)) / labels.count(label) for label in labels]
        assert_drawn_by(drawn(ClassBalancedPartners(), y), torch.tensor([row] * len(y), dtype=torch.double))

    @pytest.mark.parametrize("y", [torch.rand(3), torch.eye(3).long()])
    def test_what_is_no_class_is_refused(self, y):
        with pytest.raises(ValueError, match=r"one class index for each of the 3 samples, got torch\.(float32|int64)"):
            ClassBalancedPartners()(y, 3, np.random.default_rng(0))


ALL = [UniformPartners(), LabelDistancePartners(1.0), ClassBalancedPartners()]


@pytest.mark.parametrize("strategy", ALL)
def test_all_make_what_a_mix_takes_from_their_generator_alone(strategy):
    y = torch.randint(3, (16,))
    first, second = (strategy(y, 16, np.random.default_rng(5)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(draw_mix(16, 1.0, np.random.default_rng(0), partners=first).partners, first)
    assert Mix(torch.rand(16), first)(torch.randn(16, 2)).shape == (16, 2)
    assert strategy(y[:1], 1, np.random.default_rng(5)).tolist() == [0]


@pytest.mark.parametrize("strategy", ALL[1:])
def test_the_one_tensor_of_a_structure(strategy):
    y = torch.randint(3, (16,))
    bare = strategy(y, 16, np.random.default_rng(5))
    assert torch.equal(strategy({"label": [y], "name": "x"}, 16, np.random.default_rng(5)), bare)
    for targets, got in (((y, y), r"int64 of shape \(16,\), torch"), ("x", "no tensor"), (y[:3], r"shape \(3,\)")):
        with pytest.raises(ValueError, match=rf"{type(strategy).__name__} expects one target tensor.*16.*{got}"):
            strategy(targets, 16, np.random.default_rng(5))


@pytest.mark.parametrize("strategy", ALL)
def test_yaml(strategy):
    """As a command line takes it that has an option of this type."""

    def take(partners: Partners | None = None):
        return partners

    path = f"lightning_manifold_mixup.partners.{type(strategy).__name__}"
    made = auto_cli(take, args=["--partners", json.dumps({"class_path": path, "init_args": vars(strategy)})])
    assert type(made) is type(strategy)
    assert vars(made) == vars(strategy)
