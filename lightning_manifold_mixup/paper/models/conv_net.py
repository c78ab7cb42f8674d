"""A small convolutional network without skip connections, for training on two CPU cores.

``"input"``, ``layer1`` and ``layer2`` are S = {0, 1, 2}.
"""

from collections.abc import Sequence

from torch import Tensor, nn

__all__ = ["ConvNet"]


class ConvNet(nn.Module):
    """Plain convolutional network: ``layer1`` to ``layerN``, ``hidden``, ``linear``.

    A layer is a 3x3 convolution, batch norm, ReLU and, except in the first layer, 2x2 max pooling, as one module: its
    output is the hidden state. ``hidden`` averages these over a 2x2 grid and is fully connected.

    Args:
        num_classes: number of logits.
        in_channels: channels of the input images.
        widths: channels of each layer.
        hidden: width of the fully connected hidden layer.

    Shape:
        input (n, in_channels, height, width), at least ``2 ** (len(widths) - 1)`` pixels a side.
        Output (n, num_classes).

    Example:
        >>> import torch
        >>> model = ConvNet(num_classes=10, in_channels=1)
        >>> model(torch.zeros(5, 1, 8, 8)).shape, model.layer2(model.layer1(torch.zeros(5, 1, 8, 8))).shape
        (torch.Size([5, 10]), torch.Size([5, 64, 4, 4]))
    """

    def __init__(
        self, num_classes: int = 10, in_channels: int = 3, widths: Sequence[int] = (32, 64, 64), hidden: int = 128
    ) -> None:
        super().__init__()
        channels = in_channels
        for i, width in enumerate(widths):
            layer = nn.Sequential(
                nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
            )
            if i:
                layer.append(nn.MaxPool2d(2))
            self.add_module(f"layer{i + 1}", layer)
            channels = width
        self.hidden = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, hidden), nn.ReLU())
        self.linear = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, num_classes) of images (n, in_channels, height, width)."""
        for module in self.children():
            x = module(x)
        return x
