"""PreActResNet: the residual network of the Manifold Mixup papers, for small images.

The states that the paper mixes are whole attributes: ``"input"``, ``layer1``, ``layer2`` are its S = {0, 1, 2}.
"""

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "PreActResNet",
    "preact_resnet18",
    "preact_resnet34",
    "preact_resnet50",
    "preact_resnet101",
    "preact_resnet152",
]


class PreActResNet(nn.Module):
    """Residual network with pre-activation blocks, as trained in the papers on CIFAR, SVHN and Tiny-ImageNet.

    A 3x3 stem ``conv1``, four stages ``layer1`` to ``layer4`` of 1, 2, 4, 8 times `initial_channels` (each after the
    first halves the resolution), the mean over positions, and ``linear``. As in the papers' public code there is no
    normalisation after the last stage. Any image size works, also 8x8.

    Args:
        depth: 18 or 34 (two 3x3 convolutions a block), 50, 101 or 152 (bottleneck blocks).
        num_classes: number of logits.
        initial_channels: width of the first stage; 64 in the papers, 16 trains in minutes on two cores.
        in_channels: channels of the input images.
        stride: stride of the stem: 1 for 32x32 images and smaller, 2 for 64x64 (Tiny-ImageNet).

    Shape:
        input (n, in_channels, height, width), output (n, num_classes).

    Raises:
        ValueError: for a depth that is not one of the five.

    Source: Verma et al. 2019, section 4.1; blocks of He et al. 2016, "Identity mappings in deep residual networks".

    Example:
        >>> import torch
        >>> model = PreActResNet(18, num_classes=10, initial_channels=4, in_channels=1)
        >>> model(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        depth: int = 18,
        num_classes: int = 10,
        initial_channels: int = 64,
        in_channels: int = 3,
        stride: int = 1,
    ) -> None:
        super().__init__()
        if depth not in _STAGES:
            raise ValueError(f"PreActResNet: expected a depth among {sorted(_STAGES)}, got {depth}.")
        block, blocks = _STAGES[depth]
        width = initial_channels
        self.conv1 = nn.Conv2d(in_channels, width, kernel_size=3, stride=stride, padding=1, bias=False)
        self.layer1 = _stage(block, blocks[0], width, width, stride=1)
        self.layer2 = _stage(block, blocks[1], width * block.expansion, 2 * width, stride=2)
        self.layer3 = _stage(block, blocks[2], 2 * width * block.expansion, 4 * width, stride=2)
        self.layer4 = _stage(block, blocks[3], 4 * width * block.expansion, 8 * width, stride=2)
        self.linear = nn.Linear(8 * width * block.expansion, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, num_classes) of images (n, in_channels, height, width)."""
        h = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        logits: Tensor = self.linear(h.mean(dim=(2, 3)))
        return logits


def preact_resnet18(
    num_classes: int = 10, initial_channels: int = 64, in_channels: int = 3, stride: int = 1
) -> PreActResNet:
    """`PreActResNet` of depth 18: 11.17 million parameters."""
    return PreActResNet(18, num_classes, initial_channels, in_channels, stride)


def preact_resnet34(
    num_classes: int = 10, initial_channels: int = 64, in_channels: int = 3, stride: int = 1
) -> PreActResNet:
    """`PreActResNet` of depth 34: 21.28 million parameters."""
    return PreActResNet(34, num_classes, initial_channels, in_channels, stride)


def preact_resnet50(
    num_classes: int = 10, initial_channels: int = 64, in_channels: int = 3, stride: int = 1
) -> PreActResNet:
    """`PreActResNet` of depth 50: 23.5 million parameters."""
    return PreActResNet(50, num_classes, initial_channels, in_channels, stride)


def preact_resnet101(
    num_classes: int = 10, initial_channels: int = 64, in_channels: int = 3, stride: int = 1
) -> PreActResNet:
    """`PreActResNet` of depth 101: 42.5 million parameters."""
    return PreActResNet(101, num_classes, initial_channels, in_channels, stride)


def preact_resnet152(
    num_classes: int = 10, initial_channels: int = 64, in_channels: int = 3, stride: int = 1
) -> PreActResNet:
    """`PreActResNet` of depth 152: 58.1 million parameters."""
    return PreActResNet(152, num_classes, initial_channels, in_channels, stride)


class _BasicBlock(nn.Module):
    """Norm, ReLU, 3x3, norm, ReLU, 3x3; the shortcut, where it needs a convolution, starts after the first ReLU."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False)
        self.shortcut = _shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(x))
        residual = x if self.shortcut is None else self.shortcut(h)
        h = self.conv1(h)
        h = self.conv2(F.relu(self.bn2(h)))
        out: Tensor = h + residual
        return out


class _BottleneckBlock(nn.Module):
    """The same with 1x1, 3x3, 1x1 convolutions and four times as many channels outside as inside."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, kernel_size=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, self.expansion * channels, kernel_size=1, bias=False)
        self.shortcut = _shortcut(in_channels, self.expansion * channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(x))
        residual = x if self.shortcut is None else self.shortcut(h)
        h = self.conv1(h)
        h = self.conv2(F.relu(self.bn2(h)))
        h = self.conv3(F.relu(self.bn3(h)))
        out: Tensor = h + residual
        return out


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Conv2d | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)


def _stage(
    block: type[_BasicBlock] | type[_BottleneckBlock], blocks: int, in_channels: int, channels: int, stride: int
) -> nn.Sequential:
    stage = nn.Sequential(block(in_channels, channels, stride))
    for _ in range(blocks - 1):
        stage.append(block(channels * block.expansion, channels, 1))
    return stage


_STAGES: dict[int, tuple[type[_BasicBlock] | type[_BottleneckBlock], tuple[int, int, int, int]]] = {
    18: (_BasicBlock, (2, 2, 2, 2)),
    34: (_BasicBlock, (3, 4, 6, 3)),
    50: (_BottleneckBlock, (3, 4, 6, 3)),
    101: (_BottleneckBlock, (3, 4, 23, 3)),
    152: (_BottleneckBlock, (3, 8, 36, 3)),
}
