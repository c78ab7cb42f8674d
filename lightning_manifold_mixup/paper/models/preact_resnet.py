"""PreActResNet: the residual network of the Manifold Mixup papers, for small images.

The states that the paper mixes are whole attributes: ``"input"``, ``layer1``, ``layer2`` are its S = {0, 1, 2}.
"""

from torch import Tensor, nn

from lightning_manifold_mixup.paper.models.blocks import stage

__all__ = ["PreActResNet"]


class PreActResNet(nn.Module):
    """Residual network with pre-activation blocks, as trained in the papers on CIFAR, SVHN and Tiny-ImageNet.

    A 3x3 stem ``conv1``, four stages ``layer1`` to ``layer4`` of 1, 2, 4, 8 times ``initial_channels`` (each after the
    first halves the resolution), the mean over positions, and ``linear``. As in the papers' public code there is no
    normalisation after the last stage. Any image size works, also 8x8.

    Args:
        depth: 18 (11.17 million parameters at 64 channels) or 34 (21.28 million).
        num_classes: number of logits.
        initial_channels: width of the first stage; 64 in the papers, 16 trains in minutes on two cores.
        in_channels: channels of the input images.
        stride: stride of the stem: 1 for 32x32 images and smaller, 2 for 64x64 (Tiny-ImageNet).

    Shape:
        input (n, in_channels, height, width), output (n, num_classes).

    Raises:
        ValueError: for another depth.

    Source: Verma et al. 2019, section 4.1; blocks of He et al. 2016, "Identity mappings in deep residual networks".

    Example:
        >>> import torch
        >>> model = PreActResNet(18, num_classes=10, initial_channels=4, in_channels=1)
        >>> model(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self, depth: int = 18, num_classes: int = 10, initial_channels: int = 64, in_channels: int = 3, stride: int = 1
    ) -> None:
        super().__init__()
        if depth not in _BLOCKS:
            raise ValueError(f"PreActResNet: expected a depth among {sorted(_BLOCKS)}, got {depth}.")
        blocks, width = _BLOCKS[depth], initial_channels
        self.conv1 = nn.Conv2d(in_channels, width, kernel_size=3, stride=stride, padding=1, bias=False)
        self.layer1 = stage(blocks[0], width, width, stride=1)
        self.layer2 = stage(blocks[1], width, 2 * width, stride=2)
        self.layer3 = stage(blocks[2], 2 * width, 4 * width, stride=2)
        self.layer4 = stage(blocks[3], 4 * width, 8 * width, stride=2)
        self.linear = nn.Linear(8 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, num_classes) of images (n, in_channels, height, width)."""
        h = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        logits: Tensor = self.linear(h.mean(dim=(2, 3)))
        return logits


_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
"""Blocks of each stage, by depth."""
