"""Networks of the papers, and any of torchvision's and timm's by name."""

from lightning_manifold_mixup.paper.models.conv_net import ConvNet
from lightning_manifold_mixup.paper.models.lookup import build_model
from lightning_manifold_mixup.paper.models.mlp import MLP, BottleneckMLP, GaussianNoise
from lightning_manifold_mixup.paper.models.preact_resnet import (
    PreActResNet,
    preact_resnet18,
    preact_resnet34,
    preact_resnet50,
    preact_resnet101,
    preact_resnet152,
)
from lightning_manifold_mixup.paper.models.text import TextConvNet, TextLSTM
from lightning_manifold_mixup.paper.models.wide_resnet import WideResNet

__all__ = [
    "MLP",
    "BottleneckMLP",
    "ConvNet",
    "GaussianNoise",
    "PreActResNet",
    "TextConvNet",
    "TextLSTM",
    "WideResNet",
    "build_model",
    "preact_resnet18",
    "preact_resnet34",
    "preact_resnet50",
    "preact_resnet101",
    "preact_resnet152",
]
