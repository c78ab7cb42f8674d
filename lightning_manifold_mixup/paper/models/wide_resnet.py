"""WideResNet-d-k, as in the paper's supervised tables (28-10) and its semi-supervised ones (28-2).

``"input"`` and ``layer1`` are the paper's S = {0, 1} for this family.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_manifold_mixup.paper.models.blocks import stage

__all__ = ["WideResNet"]


class WideResNet(nn.Module):
    """Wide residual network: a 3x3 stem of 16 channels and three stages of 16k, 32k, 64k channels.

    ``conv1``, ``layer1``, ``layer2``, ``layer3``, a last norm ``bn`` and ReLU, the mean over positions, ``linear``.

    Args:
        depth: d = 6 b + 4 for b blocks a stage: 10, 16, 22, 28, 34, 40, ...
        widen_factor: k.
        num_classes: number of logits.
        dropout: probability of dropping a value between the two convolutions of a block.
        in_channels: channels of the input images.
        stride: stride of the stem: 1 for 32x32 images and smaller, 2 for 64x64.

    Shape:
        input (n, in_channels, height, width), output (n, num_classes).

    Raises:
        ValueError: for a depth that is not 6 b + 4.

    Source: Zagoruyko and Komodakis 2016, "Wide residual networks" (blocks, no biases, initialisation); Verma et al.
    2019, section 4.1, whose public code adds a bias to each convolution and keeps the shortcut's input as it is.

    Example:
        >>> import torch
        >>> model = WideResNet(10, 1, num_classes=7)
        >>> model(torch.zeros(2, 3, 16, 16)).shape
        torch.Size([2, 7])
    """

    def __init__(
        self,
        depth: int = 28,
        widen_factor: int = 10,
        num_classes: int = 10,
        dropout: float = 0.0,
        in_channels: int = 3,
        stride: int = 1,
    ) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 4, 6)
        if rest or blocks < 1:
            raise ValueError(f"WideResNet: expected a depth of 6 b + 4 (10, 16, 22, 28, 34, 40, ...), got {depth}.")
        width = 16 * widen_factor
        self.conv1 = nn.Conv2d(in_channels, 16, kernel_size=3, stride=stride, padding=1, bias=False)
        self.layer1 = stage(blocks, 16, width, 1, dropout)
        self.layer2 = stage(blocks, width, 2 * width, 2, dropout)
        self.layer3 = stage(blocks, 2 * width, 4 * width, 2, dropout)
        self.bn = nn.BatchNorm2d(4 * width)
        self.linear = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, num_classes) of images (n, in_channels, height, width)."""
        h = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        h = F.relu(self.bn(h))
        logits: Tensor = self.linear(h.mean(dim=(2, 3)))
        return logits
