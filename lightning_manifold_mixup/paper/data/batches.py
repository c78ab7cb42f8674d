"""Data sets that hand out whole batches: uint8 images, in memory or on disk, augmented and normalised at once.

A ``DataLoader`` asks a data set that has ``__getitems__`` for all samples of a batch in one call. Cropping, flipping,
converting and normalising the whole batch at once is about ten times as fast as image by image. What is random is drawn
on the host, so that a batch is the same wherever its images are.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from lightning_manifold_mixup._step.devices import sent
from lightning_manifold_mixup.paper.data.image_files import ImageFiles

__all__ = [
    "ImageDataset",
    "LabelledDataset",
    "VectorDataset",
    "collate",
    "normalize",
    "random_crop",
    "random_flip",
]


def random_crop(images: Tensor, padding: int, offsets: Tensor | None = None) -> Tensor:
    """Pad with zeros (black) and crop back to the same size, each image at its own random place.

    The distribution is that of ``torchvision.transforms.v2.RandomCrop(size, padding=padding)`` for each image.

    Args:
        images: (n, channels, height, width), any dtype.
        padding: pixels added on each side.
        offsets: (n, 2) integers from 0 to 2 * padding, the row and column where each crop begins; drawn uniformly if
            not given.

    Returns:
        A new tensor of the same shape and dtype.

    Example:
        >>> image = torch.arange(1, 5).view(1, 1, 2, 2)
        >>> random_crop(image, 1, offsets=torch.tensor([[0, 1]])).squeeze()
        tensor([[0, 0],
                [1, 2]])
    """
    n, _, height, width = images.shape
    if offsets is None:
        offsets = torch.randint(2 * padding + 1, (n, 2))
    padded = F.pad(images, (padding, padding, padding, padding))
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: (n, channels, row, column, height, width)
    rows, columns = sent(offsets, images.device).unbind(1)
    return windows[torch.arange(n, device=images.device), :, rows, columns]


def random_flip(images: Tensor, flipped: Tensor | None = None) -> Tensor:
    """Mirror each image left to right with probability 1/2.

    The distribution is that of ``torchvision.transforms.v2.RandomHorizontalFlip()`` for each image.

    Args:
        images: (n, channels, height, width), any dtype.
        flipped: (n,) booleans; drawn if not given.

    Returns:
        A new tensor of the same shape and dtype.

    Example:
        >>> random_flip(torch.tensor([[[[1, 2]]], [[[1, 2]]]]), flipped=torch.tensor([True, False])).flatten(1)
        tensor([[2, 1],
                [1, 2]])
    """
    if flipped is None:
        flipped = torch.rand(len(images)) < 0.5
    return torch.where(sent(flipped, images.device).view(-1, 1, 1, 1), images.flip(-1), images)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float], max_value: float = 255.0) -> Tensor:
    """Map integer pixels to (pixel / max_value - mean) / std in float32, by one multiplication and one addition.

    Args:
        images: (n, channels, height, width), integers from 0 to ``max_value``.
        mean: one number for each channel, in units where the brightest pixel is 1.
        std: likewise.
        max_value: the brightest pixel.

    Example:
        >>> normalize(torch.tensor([[[[0, 255]]]]), [0.5], [0.5]).flatten()
        tensor([-1.,  1.])
    """
    scale, shift = _scale_and_shift(tuple(mean), tuple(std), max_value, images.device)
    return images.to(torch.float32).mul_(scale).add_(shift)


@lru_cache  # so that no batch on a GPU waits for them
def _scale_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], max_value: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    scale = torch.tensor([1.0 / (max_value * s) for s in std], device=device).view(-1, 1, 1)
    return scale, torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device).view(-1, 1, 1)


def collate(batch: Any) -> Any:
    """``default_collate``, for data sets that may already have returned a batch (from ``__getitems__``).

    Args:
        batch: a list of samples, or a batch, which is returned as it is.

    Example:
        >>> collate((torch.zeros(4, 2), torch.zeros(4)))[0].shape
        torch.Size([4, 2])
        >>> collate([(torch.zeros(2), 0), (torch.zeros(2), 1)])[0].shape
        torch.Size([2, 2])
    """
    return default_collate(batch) if isinstance(batch, list) else batch


class LabelledDataset(Dataset[tuple[Tensor, Tensor]], ABC):
    """Samples (input, label), by the sample or by the batch; ``labels`` has all labels at once.

    A label is a class (int64); for segmentation, a class for each pixel; for regression, a number. Subclasses define
    ``__getitems__``, which returns a batch for several indices: stacked inputs, and labels.

    Example:
        >>> class Squares(LabelledDataset):
        ...     labels = torch.arange(5) ** 2
        ...     def __getitems__(self, indices):
        ...         return torch.tensor(indices).float(), self.labels[indices]
        >>> Squares()[3], len(Squares())
        ((tensor(3.), tensor(9)), 5)
    """

    labels: Tensor

    @abstractmethod
    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]: ...

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, labels = self.__getitems__([index])
        return inputs[0], labels[0]

    def __len__(self) -> int:
        return len(self.labels)


class VectorDataset(LabelledDataset):
    """Tensors in memory, as they are.

    Args:
        inputs: (n, ...).
        labels: (n, ...).

    Example:
        >>> VectorDataset(torch.eye(3), torch.arange(3)).__getitems__([2, 0])
        (tensor([[0., 0., 1.],
                [1., 0., 0.]]), tensor([2, 0]))
    """

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs = inputs
        self.labels = labels

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        rows = torch.as_tensor(indices, dtype=torch.long)
        return self.inputs[rows], self.labels[rows]


class ImageDataset(LabelledDataset):
    """Labelled images with augmentation and normalisation, by the sample or by the batch.

    Args:
        images: (n, channels, height, width) uint8, or ``ImageFiles``.
        labels: (n,) int64.
        mean, std, max_value: for ``normalize``.
        padding: for ``random_crop``; 0 for none.
        flip: whether to apply ``random_flip``.
        transform: in place of crop and flip, any transform of one uint8 image (channels, height, width) that keeps
            its shape and dtype.
        flatten: give images as vectors.

    A sample is (float32 image (channels, height, width), int64 label); a batch, from ``__getitems__``, is both stacked.
    Draws come from torch's global generator, which a DataLoader seeds for each worker.

    Raises:
        ValueError: if there are not as many labels as images.

    Example:
        >>> data = ImageDataset(torch.zeros(6, 1, 4, 4, dtype=torch.uint8), torch.arange(6), [0.5], [0.5], padding=1)
        >>> image, label = data[2]
        >>> images, labels = data.__getitems__([2, 3])
        >>> image.shape, label, images.shape, labels
        (torch.Size([1, 4, 4]), tensor(2), torch.Size([2, 1, 4, 4]), tensor([2, 3]))
    """

    def __init__(
        self,
        images: Tensor | ImageFiles,
        labels: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        max_value: float = 255.0,
        padding: int = 0,
        flip: bool = False,
        transform: Callable[[Tensor], Tensor] | None = None,
        flatten: bool = False,
    ) -> None:
        if len(images) != len(labels):
            raise ValueError(f"ImageDataset: expected as many labels as images, got {len(labels)} and {len(images)}.")
        self.images = images
        self.labels = labels
        self.mean, self.std, self.max_value = tuple(mean), tuple(std), max_value
        self.padding, self.flip, self.transform, self.flatten = padding, flip, transform, flatten

    def to(self, device: torch.device) -> None:
        """Keep the images on a device, as uint8, and make batches there. Labels stay, and are sent by the batch.

        Args:
            device: where to.

        Raises:
            ValueError: if the images are files.
        """
        if isinstance(self.images, ImageFiles):
            raise ValueError("ImageDataset: expected images in memory to keep on a device, got files.")
        self.images = self.images.to(device)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        rows = torch.as_tensor(indices, dtype=torch.long)
        labels = self.labels[rows]
        if isinstance(self.images, ImageFiles):
            images = self.images.index_select(0, rows).decode()
        else:
            device = self.images.device
            images, labels = self.images.index_select(0, sent(rows, device)), sent(labels, device)
        if self.transform is not None:
            images = torch.stack([self.transform(image) for image in images])
        else:
            images = random_crop(images, self.padding) if self.padding else images
            images = random_flip(images) if self.flip else images
        images = normalize(images, self.mean, self.std, self.max_value)
        return images.flatten(1) if self.flatten else images, labels
