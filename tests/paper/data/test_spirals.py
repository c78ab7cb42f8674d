"""Spirals in the plane."""

import pytest
import torch

from lightning_manifold_mixup.paper.data import (
    SpiralsDataModule,
)
from lightning_manifold_mixup.paper.data.spirals import spirals
from tests.paper.data.samples import seeded


class TestSpirals:
    def test_points_lie_on_their_arm(self):
        points, labels = spirals(200, 3, turns=1.25, noise=0.0, generator=seeded())
        radius = points.norm(dim=1)
        position = (radius - 0.1) / 0.9
        assert 0 <= position.min() < 0.02
        assert 0.98 < position.max() <= 1
        angle = torch.atan2(points[:, 1], points[:, 0])
        expected = 2 * torch.pi * (1.25 * position + labels / 3)
        assert torch.cos(angle - expected).min() > 1 - 1e-5
        assert labels.bincount().tolist() == [200] * 3

    def test_noise(self):
        clean, noisy = (spirals(5000, 2, 1.5, noise, seeded())[0] for noise in (0.0, 0.1))
        assert (noisy - clean).std().item() == pytest.approx(0.1, rel=0.02)

    def test_splits(self):
        data = SpiralsDataModule(samples_per_class=100, test_samples_per_class=40, num_arms=3, val_size=0.2)
        assert (len(data.train_set), len(data.val_set), len(data.test_set)) == (240, 60, 120)
        assert data.val_set.labels.bincount().tolist() == [20] * 3
        assert (data.num_classes, data.class_names, data.in_features) == (3, ("0", "1", "2"), 2)
        longer = SpiralsDataModule(samples_per_class=200, test_samples_per_class=40, num_arms=3, val_size="test")
        assert torch.equal(longer.test_set.inputs, data.test_set.inputs)
        assert torch.equal(longer.val_set.inputs, data.test_set.inputs)
        assert SpiralsDataModule().val_set is None
        assert not torch.equal(SpiralsDataModule(seed=1).train_set.inputs, SpiralsDataModule().train_set.inputs)
