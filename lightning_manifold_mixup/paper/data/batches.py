"""Data sets that hand out whole batches: uint8 images, in memory or on disk, augmented and normalised at once.

A ``DataLoader`` asks a data set that has ``__getitems__`` for all samples of a batch in one call. Cropping, flipping,
converting and normalising the whole batch at once is about ten times as fast as image by image. What is random is drawn
on the host, so that a batch is the same wherever its images are.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from lightning_manifold_mixup._step.devices import sent
from lightning_manifold_mixup._step.extras import require

__all__ = [
    "ImageDataset",
    "ImageFiles",
    "LabelledDataset",
    "VectorDataset",
    "collate",
    "normalize",
    "random_crop",
    "random_flip",
    "read_image",
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


class ImageFiles:
    """Images on disk, decoded on request to RGB uint8 of one size.

    Args:
        paths: the files.
        size: side in pixels.
        resize: an image of another size is resized (shorter side, antialiased) and cropped in the centre; without
            ``resize`` it is an error.

    ``index_select`` chooses files as ``Tensor.index_select`` chooses images in memory; ``decode`` reads them.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("RGB", (9, 6), color=(1, 2, 3)).save(f"{folder}/a.png")
        ...     images = ImageFiles([f"{folder}/a.png"], size=4).decode()
        >>> images.shape, images[0, :, 0, 0]
        (torch.Size([1, 3, 4, 4]), tensor([1, 2, 3], dtype=torch.uint8))
    """

    def __init__(self, paths: Sequence[str], size: int, resize: bool = True) -> None:
        self.paths = tuple(paths)
        self.size = size
        self.resize = resize

    def __len__(self) -> int:
        return len(self.paths)

    def index_select(self, dim: int, indices: Tensor) -> "ImageFiles":
        """Choose some of the files; ``dim`` is 0."""
        assert dim == 0
        return ImageFiles([self.paths[index] for index in indices.tolist()], self.size, self.resize)

    def decode(self) -> Tensor:
        """Decode all images to (n, 3, size, size) uint8; several threads share many images.

        Raises:
            ValueError: if an image has another size and ``resize`` is off; the message names the file.
        """
        images = torch.empty(len(self), 3, self.size, self.size, dtype=torch.uint8)

        def decode(index: int) -> None:
            images[index] = self._decode(self.paths[index])

        _for_all(decode, len(self))
        return images

    def check(self) -> None:
        """Read all images, and keep none of them: what cannot be used is found before training.

        Raises:
            ValueError: for what ``decode`` refuses; the message names the file.
        """
        _for_all(lambda index: self._read(self.paths[index]), len(self))

    def readable(self) -> list[bool]:
        """Tell for each file whether it can be read."""
        found = [True] * len(self)

        def read(index: int) -> None:
            try:
                read_image(self.paths[index])
            except ValueError:
                found[index] = False

        _for_all(read, len(self))
        return found

    def _read(self, path: str) -> Tensor:
        pixels = read_image(path)
        if not self.resize and pixels.shape[1:] != (self.size, self.size):
            raise ValueError(
                f"expected square images of {self.size}x{self.size} pixels, got {pixels.shape[2]}x{pixels.shape[1]} in "
                f"{path}; image_size={self.size} resizes the shorter side and crops, for all images."
            )
        return pixels

    def _decode(self, path: str) -> Tensor:
        pixels = self._read(path)
        if pixels.shape[1:] == (self.size, self.size):
            return pixels
        functional = require("torchvision.transforms.v2.functional", "cli")
        resized: Tensor = functional.center_crop(functional.resize(pixels, [self.size], antialias=True), [self.size])
        return resized


def _for_all(function: Callable[[int], object], count: int) -> None:
    """Call a function with all numbers below ``count``; several threads share many of them."""
    chunk = 256

    def call(start: int) -> None:
        for index in range(start, min(start + chunk, count)):
            function(index)

    if count <= chunk:
        call(0)
    else:
        with ThreadPoolExecutor() as pool:
            list(pool.map(call, range(0, count, chunk)))


def read_image(path: str) -> Tensor:
    """Read an image file as RGB, (3, height, width) uint8.

    Args:
        path: of the file.

    Raises:
        ValueError: if PIL cannot read it, because it is truncated, for instance.

    Example:
        >>> read_image(__file__)
        Traceback (most recent call last):
            ...
        ValueError: ...batches.py is no readable image (cannot identify image file ...
    """
    try:
        with require("PIL.Image", "cli").open(path) as file:
            return torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1)
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what PIL raises for broken files
        raise ValueError(
            f'{path} is no readable image ({error}); broken_files="skip" of ImageFolderDataModule leaves it out.'
        ) from error


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
