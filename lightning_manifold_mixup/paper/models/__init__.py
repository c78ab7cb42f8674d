"""The networks of the papers.

Any other network goes into a recipe by its own path: ``torchvision.models.get_model``, ``timm.create_model``, a class.
"""

from lightning_manifold_mixup.paper.models.conv_net import ConvNet
from lightning_manifold_mixup.paper.models.mlp import MLP, BottleneckMLP, GaussianNoise
from lightning_manifold_mixup.paper.models.preact_resnet import PreActResNet
from lightning_manifold_mixup.paper.models.text import TextConvNet, TextLSTM
from lightning_manifold_mixup.paper.models.unet import UNet
from lightning_manifold_mixup.paper.models.wide_resnet import WideResNet

__all__ = [
    "MLP",
    "BottleneckMLP",
    "ConvNet",
    "GaussianNoise",
    "PreActResNet",
    "TextConvNet",
    "TextLSTM",
    "UNet",
    "WideResNet",
]
