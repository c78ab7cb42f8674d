"""Images as files, decoded on request or once."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightning_manifold_mixup._step.extras import require

__all__ = ["SUFFIXES", "ImageFiles", "find_images", "read_image"]

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


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
        ValueError: ...image_files.py is no readable image (cannot identify image file ...
    """
    try:
        with require("PIL.Image", "cli").open(path) as file:
            return torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1)
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what PIL raises for broken files
        raise ValueError(
            f'{path} is no readable image ({error}); broken_files="skip" of ImageFolderDataModule leaves it out.'
        ) from error


def find_images(folder: Path) -> list[str]:
    """Find the image files below a folder.

    Args:
        folder: links in it are followed.

    Returns:
        Paths, sorted.

    Example:
        >>> find_images(Path(__file__).parent)
        []
    """
    found = (
        os.path.join(where, name)
        for where, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.lower().endswith(SUFFIXES)
    )
    return sorted(found)
