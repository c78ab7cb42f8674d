"""Segmentation without a download: overlapping shapes with textures, in noise."""

import math

import torch
from torch import Tensor
from typing_extensions import Unpack, override

from lightning_manifold_mixup.paper.data.base import ClassificationDataModule, Split
from lightning_manifold_mixup.paper.data.batches import LabelledDataset, VectorDataset
from lightning_manifold_mixup.paper.data.options import LoaderOptions

__all__ = ["ShapesDataModule", "inside_polygon", "textured_shapes"]

_SIDES = (0, 4, 3)
"""Corners of the shape of classes 1, 2 and 3; 0 for a disc."""

_WAVES = ((0.0, 2.0), (2.0, 4.0), (5.0, 7.0), (8.0, 10.0))
"""Stripes across an image, at least and at most, of classes 0 to 3."""


def textured_shapes(
    num_images: int, size: int, shapes: int, noise: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw discs, squares and triangles on top of each other, and which pixel belongs to which.

    A shape has a random place, angle, area and colour, with the same distribution for all kinds. It has stripes of
    another random colour and direction, which are finer for squares than for discs, and finest for triangles. Later
    shapes cover earlier ones.

    Args:
        num_images: how many.
        size: side in pixels.
        shapes: in each image.
        noise: standard deviation of the Gaussian noise on each pixel and channel; colours have a spread of 1.
        generator: where the draws come from.

    Returns:
        Images (num_images, 3, size, size) float32 and classes (num_images, size, size) int64: 0 background, 1 disc,
        2 square, 3 triangle.

    Example:
        >>> images, masks = textured_shapes(5, 32, shapes=4, noise=0.5, generator=torch.Generator().manual_seed(0))
        >>> images.shape, masks.shape, masks.unique()
        (torch.Size([5, 3, 32, 32]), torch.Size([5, 32, 32]), tensor([0, 1, 2, 3]))
    """

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(num_images, 1, 1, generator=generator)

    def texture(kind: Tensor) -> Tensor:
        low, high = torch.tensor(_WAVES)[kind].unbind(-1)
        direction, phase, waves = uniform(0, math.pi), uniform(0, 2 * math.pi), low + (high - low) * uniform(0, 1)
        along = (row * direction.sin() + column * direction.cos()) / size
        wave = (2 * math.pi * waves * along + phase).sin().unsqueeze(1)
        colours = torch.randn(2, num_images, 3, 1, 1, generator=generator)
        return colours[0] + 0.7 * wave * colours[1]

    row, column = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    images = texture(torch.zeros(num_images, 1, 1, dtype=torch.long))
    masks = torch.zeros(num_images, size, size, dtype=torch.long)
    for _ in range(shapes):
        kind = torch.randint(1, 4, (num_images, 1, 1), generator=generator)
        y, x = row - uniform(0.1, 0.9) * size, column - uniform(0.1, 0.9) * size
        area, angle = uniform(0.04, 0.2) * size**2, uniform(0, 2 * math.pi)
        inside = torch.zeros_like(masks, dtype=torch.bool)
        for number, sides in enumerate(_SIDES, 1):
            inside |= (kind == number) & inside_polygon(y, x, area, angle, sides)
        images = torch.where(inside.unsqueeze(1), texture(kind), images)
        masks = torch.where(inside, kind, masks)
    return images + noise * torch.randn(images.shape, generator=generator), masks


def inside_polygon(y: Tensor, x: Tensor, area: Tensor, angle: Tensor, sides: int) -> Tensor:
    """Whether points lie in a regular polygon of this area around the origin, or in a disc for 0 sides.

    Args:
        y: coordinates, of any shape.
        x: likewise.
        area: in squared units of the coordinates.
        angle: of the polygon, in radians.
        sides: number of sides; 0 for a disc.

    Returns:
        Booleans of the common shape.

    Example:
        >>> one, zero = torch.tensor(1.0), torch.tensor(0.0)
        >>> inside_polygon(torch.tensor([0.0, 0.4, 0.6]), torch.zeros(3), area=one, angle=zero, sides=4)
        tensor([ True,  True, False])
    """
    if sides == 0:
        return math.pi * (y**2 + x**2) < area
    apothem = (area / (sides * math.tan(math.pi / sides))).sqrt()
    normals = [angle + 2 * math.pi * side / sides for side in range(sides)]
    return torch.stack([y * normal.sin() + x * normal.cos() < apothem for normal in normals]).all(0)


class ShapesDataModule(ClassificationDataModule):
    """Discs, squares and triangles to be told from a background, pixel by pixel; see ``textured_shapes``.

    Batches are images (n, 3, size, size) float32 and classes (n, size, size) int64.

    Args:
        num_images: training images.
        test_images: test images. They, and those for validation, do not depend on the number of training images.
        val_images: validation images; 0 for none.
        size: side in pixels.
        shapes: in each image.
        noise: standard deviation of the noise on each pixel.
        kwargs: the arguments of ``ClassificationDataModule``; ``seed`` draws the images.

    Example:
        >>> data = ShapesDataModule(num_images=20, test_images=5, batch_size=10)
        >>> images, masks = next(iter(data.train_dataloader()))
        >>> images.shape, masks.shape, data.in_channels, data.num_classes
        (torch.Size([10, 3, 32, 32]), torch.Size([10, 32, 32]), 3, 4)
    """

    in_channels = 3

    def __init__(
        self,
        num_images: int = 100,
        test_images: int = 400,
        val_images: int = 0,
        size: int = 32,
        shapes: int = 3,
        noise: float = 0.3,
        **kwargs: Unpack[LoaderOptions],
    ) -> None:
        super().__init__(**kwargs)
        self.num_images, self.test_images, self.val_images = num_images, test_images, val_images
        self.size, self.shapes, self.noise = size, shapes, noise

    @property
    @override
    def class_names(self) -> tuple[str, ...]:
        return ("background", "disc", "square", "triangle")

    @override
    def make_dataset(self, split: Split) -> LabelledDataset | None:
        count = {"test": self.test_images, "val": self.val_images, "train": self.num_images}[split]
        if count == 0:
            return None
        # Each split has its own stream of random numbers.
        generator = torch.Generator().manual_seed(3 * self.seed + ["train", "val", "test"].index(split))
        return VectorDataset(*textured_shapes(count, self.size, self.shapes, self.noise, generator))
