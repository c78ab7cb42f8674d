"""A small U-Net, for segmentation on two cores."""

import torch
from torch import Tensor, nn

__all__ = ["UNet"]


class UNet(nn.Module):
    """Encoder ``enc1``, ``enc2``, ``enc3``, decoder ``dec2``, ``dec1`` that also sees the encoder's states, ``head``.

    Everything goes through ``enc1`` and ``dec1``, which can be mixed. ``enc2``, ``enc3`` and ``dec2`` cannot: the
    connections from encoder to decoder bypass them.

    Args:
        num_classes: number of logits for each pixel.
        in_channels: channels of the images.
        channels: of ``enc1`` and ``dec1``; twice and four times as many further down.

    Shape:
        input (n, in_channels, height, width), sides that 4 divides. Output (n, num_classes, height, width).

    Source: Ronneberger et al., "U-Net", 2015, with padding, batch norm and two levels instead of four.

    Example:
        >>> UNet(num_classes=4)(torch.zeros(2, 3, 16, 16)).shape
        torch.Size([2, 4, 16, 16])
    """

    def __init__(self, num_classes: int, in_channels: int = 3, channels: int = 16) -> None:
        super().__init__()
        self.enc1 = _block(in_channels, channels)
        self.enc2 = _block(channels, 2 * channels)
        self.enc3 = _block(2 * channels, 4 * channels)
        self.up2 = nn.ConvTranspose2d(4 * channels, 2 * channels, 2, stride=2)
        self.dec2 = _block(4 * channels, 2 * channels)
        self.up1 = nn.ConvTranspose2d(2 * channels, channels, 2, stride=2)
        self.dec1 = _block(2 * channels, channels)
        self.head = nn.Conv2d(channels, num_classes, 1)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, num_classes, height, width) of images (n, in_channels, height, width)."""
        first = self.enc1(x)
        second = self.enc2(self.pool(first))
        third = self.enc3(self.pool(second))
        second = self.dec2(torch.cat([self.up2(third), second], 1))
        first = self.dec1(torch.cat([self.up1(second), first], 1))
        return self.head(first)  # type: ignore[no-any-return]


def _block(in_channels: int, channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )
