"""The handwritten digits that scikit-learn ships: real 8x8 scans, no download."""

import torch
from torch import Tensor
from typing_extensions import Unpack, override

from lightning_manifold_mixup._step.extras import require
from lightning_manifold_mixup.paper.data.base import Split
from lightning_manifold_mixup.paper.data.image_base import ImageDataModule, ImageSpec
from lightning_manifold_mixup.paper.data.image_files import ImageFiles
from lightning_manifold_mixup.paper.data.options import ImageOptions
from lightning_manifold_mixup.paper.data.splits import split_by_class

__all__ = ["DigitsDataModule"]

_SPEC = ImageSpec(
    class_names=tuple("0123456789"),
    image_size=8,
    mean=(0.3053,),
    std=(0.3760,),
    padding=0,
    flip=False,
    max_value=16.0,
)


class DigitsDataModule(ImageDataModule):
    """1,797 grey 8x8 digits, by default 1,000 to train and 797 to test, class-balanced, drawn by ``seed``.

    Args:
        test_size: test samples, a number or a share.
        flatten: give vectors of 64, for fully connected networks, instead of images (1, 8, 8).
        kwargs: the arguments of ``ImageDataModule``; ``seed`` also draws the split into training and test.

    Source of the data: the test half of UCI "Optical Recognition of Handwritten Digits", 16 grey levels.

    Example:
        >>> data = DigitsDataModule(flatten=True, batch_size=50)
        >>> images, labels = next(iter(data.train_dataloader()))
        >>> images.shape, labels.shape, len(data.train_set), len(data.test_set)
        (torch.Size([50, 64]), torch.Size([50]), 1000, 797)
    """

    def __init__(self, test_size: int | float = 797, flatten: bool = False, **kwargs: Unpack[ImageOptions]) -> None:
        super().__init__(**kwargs)
        self.test_size = test_size
        self.flatten = flatten

    @property
    @override
    def spec(self) -> ImageSpec:
        return _SPEC

    @override
    def load(self, split: Split) -> tuple[Tensor | ImageFiles, Tensor] | None:
        if split == "val":
            return None
        digits = require("sklearn.datasets", "cli").load_digits()
        images = torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(1)
        labels = torch.from_numpy(digits.target).long()
        train, test = split_by_class(labels, self.test_size, self.generator())
        indices = train if split == "train" else test
        return images[indices], labels[indices]
