"""Images of one data set in the shape of another: what a model has to tell from its own test data."""

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_manifold_mixup.paper.data.batches import VectorDataset, collate

__all__ = ["ResizedDataModule", "resized"]


def resized(images: Tensor, image_size: int, in_channels: int) -> Tensor:
    """Give images another size and number of channels, and then mean 0 and standard deviation 1.

    Args:
        images: (n, channels, height, width); one channel is repeated, several become their mean where one is wanted.
        image_size: side in pixels; the whole image is shown in it, with antialiasing.
        in_channels: number of channels wanted.

    Returns:
        (n, in_channels, image_size, image_size) float32. Mean and standard deviation are those of all images, for each
        channel.

    Raises:
        ValueError: if the channels can be neither repeated nor averaged.

    Example:
        >>> images = resized(torch.rand(5, 3, 32, 32), image_size=8, in_channels=1)
        >>> images.shape, round(images.std(correction=0).item(), 3)
        (torch.Size([5, 1, 8, 8]), 1.0)
    """
    channels = images.shape[1]
    if in_channels == 1:
        images = images.float().mean(1, keepdim=True)
    elif channels not in (1, in_channels):
        raise ValueError(f"expected images of 1 or {in_channels} channels, got {channels}")
    small = F.interpolate(images.float(), size=(image_size, image_size), mode="bilinear", antialias=True)
    dims = (0, 2, 3)
    standard = (small - small.mean(dims, keepdim=True)) / small.std(dims, correction=0, keepdim=True)
    return standard.expand(-1, in_channels, -1, -1).contiguous()


class ResizedDataModule(L.LightningDataModule):
    """The test images of another data module, resized and standardised: ``other_data`` of a ``CalibrationCallback``.

    Standardised, they are as bright and as rich in contrast as normalised test data, so that a model can tell them by
    what they show alone. There is no right answer on them: all labels are 0.

    Args:
        datamodule: whose test loader gives (images, labels), images of shape (n, channels, height, width).
        image_size: side in pixels that the model takes.
        in_channels: channels that the model takes.
        batch_size: images of a batch.

    Raises:
        ValueError: in ``test_dataloader``, if the channels of the images can be neither repeated nor averaged.

    Example:
        >>> from lightning_manifold_mixup.paper.data import DigitsDataModule
        >>> data = ResizedDataModule(DigitsDataModule(), image_size=32, in_channels=3)
        >>> images, labels = next(iter(data.test_dataloader()))
        >>> images.shape, labels.unique()
        (torch.Size([500, 3, 32, 32]), tensor([0]))
    """

    def __init__(
        self, datamodule: L.LightningDataModule, image_size: int, in_channels: int, batch_size: int = 500
    ) -> None:
        super().__init__()
        self.datamodule = datamodule
        self.image_size = image_size
        self.in_channels = in_channels
        self.batch_size = batch_size

    @override
    def prepare_data(self) -> None:
        self.datamodule.prepare_data()

    @override
    def setup(self, stage: str) -> None:
        self.datamodule.setup(stage)

    @override
    def test_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        images = torch.cat([batch[0] for batch in self.datamodule.test_dataloader()])
        dataset = VectorDataset(
            resized(images, self.image_size, self.in_channels), torch.zeros(len(images), dtype=torch.long)
        )
        return DataLoader(dataset, batch_size=self.batch_size, collate_fn=collate)
