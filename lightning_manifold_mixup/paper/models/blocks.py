"""The residual block that ``PreActResNet`` and ``WideResNet`` are made of, and a stage of such blocks."""

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PreActBlock", "stage"]


class PreActBlock(nn.Module):
    """Norm, ReLU, 3x3, norm, ReLU, dropout, 3x3, and a shortcut around them.

    The shortcut is the block's input, or, where the shape changes, a 1x1 convolution of it after norm and ReLU.

    Args:
        in_channels: channels of the input.
        channels: channels of the output.
        stride: stride of the first convolution.
        dropout: probability of dropping a value between the two convolutions.

    Shape:
        input (n, in_channels, height, width), output (n, channels, height / stride, width / stride).

    Source: He et al. 2016, "Identity mappings in deep residual networks"; dropout as in Zagoruyko and Komodakis 2016.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout(dropout) if dropout else None
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False)
        self.shortcut = (
            None
            if stride == 1 and in_channels == channels
            else nn.Conv2d(in_channels, channels, kernel_size=1, stride=stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output (n, channels, height / stride, width / stride)."""
        h = F.relu(self.bn1(x))
        residual = x if self.shortcut is None else self.shortcut(h)
        h = F.relu(self.bn2(self.conv1(h)))
        if self.dropout is not None:
            h = self.dropout(h)
        out: Tensor = self.conv2(h) + residual
        return out


def stage(blocks: int, in_channels: int, channels: int, stride: int, dropout: float = 0.0) -> nn.Sequential:
    """Chain several blocks, of which the first changes the number of channels and the resolution.

    Example:
        >>> import torch
        >>> stage(2, in_channels=4, channels=8, stride=2)(torch.zeros(1, 4, 6, 6)).shape
        torch.Size([1, 8, 3, 3])
    """
    rest = [PreActBlock(channels, channels, 1, dropout) for _ in range(blocks - 1)]
    return nn.Sequential(PreActBlock(in_channels, channels, stride, dropout), *rest)
