"""Spirals in the plane: the toy data of the paper's Figure 1."""

import math
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import Unpack, override

from lightning_manifold_mixup.paper.data.base import ClassificationDataModule, Split, check_val_size
from lightning_manifold_mixup.paper.data.batches import LabelledDataset, VectorDataset
from lightning_manifold_mixup.paper.data.options import LoaderOptions
from lightning_manifold_mixup.paper.data.splits import split_by_class

__all__ = ["SpiralsDataModule", "spirals"]


def spirals(
    samples_per_class: int, num_classes: int, turns: float, noise: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw points on interleaved spiral arms, one arm a class.

    At a position t in [0, 1] along its arm, a point of class c has the radius 0.1 + 0.9 t and the angle
    2 pi (turns t + c / num_classes). Positions are uniform; Gaussian noise is added to both coordinates.

    Args:
        samples_per_class: points on each arm.
        num_classes: arms.
        turns: how often an arm winds around the origin.
        noise: standard deviation of the noise; the outer radius is 1.
        generator: where the draws come from.

    Returns:
        Points (n, 2) float32 and labels (n,) int64, class after class.

    Example:
        >>> points, labels = spirals(3, 2, turns=1.5, noise=0.0, generator=torch.Generator().manual_seed(0))
        >>> points.shape, labels
        (torch.Size([6, 2]), tensor([0, 0, 0, 1, 1, 1]))
    """
    labels = torch.arange(num_classes).repeat_interleave(samples_per_class)
    position = torch.rand(len(labels), generator=generator)
    angle = 2 * math.pi * (turns * position + labels / num_classes)
    points = (0.1 + 0.9 * position).unsqueeze(1) * torch.stack([angle.cos(), angle.sin()], dim=1)
    return points + noise * torch.randn(points.shape, generator=generator), labels


class SpiralsDataModule(ClassificationDataModule):
    """Interleaved spirals in the plane: inputs (n, 2) float32, about within the unit circle.

    Args:
        samples_per_class: training points on each arm, validation included.
        test_samples_per_class: test points on each arm. They do not depend on the number of training points.
        num_arms: spiral arms, one class each.
        turns: how often an arm winds around the origin.
        noise: standard deviation of the noise on both coordinates; the outer radius is 1.
        val_size: validation points taken out of the training points: a number, a share, or ``"test"``.
        kwargs: the arguments of ``ClassificationDataModule``.

    Source: Verma et al. 2019, Figure 1, which does not state these numbers.

    Example:
        >>> data = SpiralsDataModule(samples_per_class=50, batch_size=20)
        >>> points, labels = next(iter(data.train_dataloader()))
        >>> points.shape, data.in_features, data.num_classes
        (torch.Size([20, 2]), 2, 2)
    """

    in_features = 2

    def __init__(
        self,
        samples_per_class: int = 500,
        test_samples_per_class: int = 500,
        num_arms: int = 2,
        turns: float = 1.5,
        noise: float = 0.03,
        val_size: int | float | Literal["test"] = 0,
        **kwargs: Unpack[LoaderOptions],
    ) -> None:
        super().__init__(**kwargs)
        check_val_size("SpiralsDataModule", val_size)
        self.samples_per_class, self.test_samples_per_class = samples_per_class, test_samples_per_class
        self.num_arms, self.turns, self.noise = num_arms, turns, noise
        self.val_size = val_size

    @property
    @override
    def class_names(self) -> tuple[str, ...]:
        return tuple(str(arm) for arm in range(self.num_arms))

    @override
    def make_dataset(self, split: Split) -> LabelledDataset | None:
        generator = self.generator()
        test = spirals(self.test_samples_per_class, self.num_arms, self.turns, self.noise, generator)
        if split == "test" or (split == "val" and self.val_size == "test"):
            return VectorDataset(*test)
        if split == "val" and self.val_size == 0:
            return None
        points, labels = spirals(self.samples_per_class, self.num_arms, self.turns, self.noise, generator)
        size = 0 if isinstance(self.val_size, str) else self.val_size
        kept, held_out = split_by_class(labels, size, generator)
        indices = kept if split == "train" else held_out
        return VectorDataset(points[indices], labels[indices])
