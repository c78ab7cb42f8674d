"""Class-balanced splits and subsets."""

import pytest
import torch

from lightning_manifold_mixup.paper.data.splits import draw_per_class, split_by_class
from tests.paper.data.samples import seeded


class TestSplits:
    @pytest.mark.parametrize("size", [0, 1, 37, 100, 0.25, 0.1])
    def test_keeps_shares(self, size):
        labels = torch.cat([torch.full((count,), label) for label, count in enumerate((50, 100, 7, 200))])
        labels = labels[torch.randperm(len(labels), generator=seeded())]
        first, second = split_by_class(labels, size, seeded(1))
        assert sorted(first.tolist() + second.tolist()) == list(range(len(labels)))
        wanted = round(size * 357) if isinstance(size, float) else size
        assert len(second) == wanted
        for label, count in enumerate((50, 100, 7, 200)):
            assert abs((labels[second] == label).sum().item() - count * wanted / 357) < 1

    def test_follows_the_generator(self):
        labels = torch.arange(100) % 4
        draws = [split_by_class(labels, 20, seeded(seed))[1].tolist() for seed in (0, 0, 1)]
        assert draws[0] == draws[1] != draws[2]

    def test_is_uniform_within_a_class(self):
        labels = torch.arange(20) % 2
        generator = seeded()
        counts = torch.zeros(20)
        for _ in range(2000):
            counts[split_by_class(labels, 6, generator)[1]] += 1
        assert (counts / 2000 - 0.3).abs().max() < 4 * (0.3 * 0.7 / 2000) ** 0.5

    @pytest.mark.parametrize("size", [-1, 100, 101, 1.0, 1.5, 3.7])
    def test_sizes_that_are_refused(self, size):
        if size == 1.0:  # a whole number: one sample
            assert len(split_by_class(torch.zeros(100), size, seeded())[1]) == 1
            return
        with pytest.raises(ValueError, match=r"from 0 to 99 or a share from 0 to below 1, got"):
            split_by_class(torch.zeros(100), size, seeded())

    def test_labels_per_class(self):
        labels = torch.cat([torch.arange(5).repeat(10), torch.arange(2).repeat(50)])
        drawn = draw_per_class(labels, 7, seeded())
        assert labels[drawn].bincount().tolist() == [7] * 5
        assert len(set(drawn.tolist())) == 35
        assert set(draw_per_class(labels, 3, seeded()).tolist()) < set(drawn.tolist())
        with pytest.raises(ValueError, match="at most 10, the training samples of class 2, got 11"):
            draw_per_class(labels, 11, seeded())
        with pytest.raises(ValueError, match="at least 1, got 0"):
            draw_per_class(labels, 0, seeded())
