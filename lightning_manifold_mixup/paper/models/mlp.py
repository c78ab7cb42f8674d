"""Fully connected networks, plain and with a bottleneck: the paper's Figures 1 and 2 and its singular values.

Layers have names that are easy to give to a callback: ``layer1``, ``layer2``, ... , ``bottleneck``, ``linear``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["MLP", "BottleneckMLP", "GaussianNoise"]


class MLP(nn.Module):
    """Fully connected network: hidden layers ``layer1`` to ``layerN``, then ``linear``.

    A hidden layer is Linear, batch norm (if wanted), activation, dropout, noise, as one module: its output is the
    hidden state. Inputs of more than two dimensions (images) are flattened.

    Args:
        in_features: numbers per sample: 64 for the 8x8 digits, 2 for the spirals.
        num_classes: number of logits.
        widths: width of each hidden layer.
        activation: ``"leaky_relu"`` (the paper's), ``"relu"``, ``"tanh"``, ``"gelu"`` or ``"silu"``.
        dropout: probability of dropping a hidden value.
        batch_norm: normalise each hidden layer before its activation.
        noise: standard deviation of Gaussian noise added to each hidden state in training.

    Shape:
        input (n, ...) of ``in_features`` numbers a sample, output (n, num_classes).

    Raises:
        ValueError: for an unknown activation.

    Example:
        >>> import torch
        >>> model = MLP(64, 10, widths=[32, 16])
        >>> model(torch.zeros(5, 1, 8, 8)).shape, model.layer2(model.layer1(torch.zeros(5, 64))).shape
        (torch.Size([5, 10]), torch.Size([5, 16]))
    """

    def __init__(
        self,
        in_features: int = 64,
        num_classes: int = 10,
        widths: Sequence[int] = (256, 256),
        activation: str = "leaky_relu",
        dropout: float = 0.0,
        batch_norm: bool = False,
        noise: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = [in_features, *widths]
        for i in range(len(widths)):
            self.add_module(f"layer{i + 1}", _layer(sizes[i], sizes[i + 1], activation, dropout, batch_norm, noise))
        self.linear = nn.Linear(sizes[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, num_classes) of samples (n, ...)."""
        h = x.flatten(1)
        for module in self.children():
            h = module(h)
        return h


class BottleneckMLP(nn.Module):
    """Fully connected network with a narrow linear layer, ``bottleneck``: the layer to mix at and to look at.

    Hidden layers are numbered through: with three before and four after they are ``layer1`` to ``layer3``,
    ``bottleneck``, ``layer4`` to ``layer7``, ``linear``. The defaults are the network on 2-D spirals of Figure 1: nine
    layers, two dimensions in the fifth.

    Args:
        in_features: numbers per sample.
        num_classes: number of logits.
        before: widths of the hidden layers before the bottleneck.
        bottleneck: dimensions of the bottleneck, which has no activation, dropout or noise.
        after: widths of the hidden layers after it.
        activation, dropout, batch_norm, noise: of the hidden layers, as for ``MLP``.
        bottleneck_norm: batch-normalise the bottleneck, as the public script for Figure 2 does.

    Shape:
        input (n, ...) of ``in_features`` numbers a sample, output (n, num_classes).

    Raises:
        ValueError: for an unknown activation.

    Source: Verma et al. 2019, Figure 1 (2-D spirals), Figure 2 (MNIST: 2 x 1024, 2, 2 x 1024) and the singular values
    of section 4 (3 x 1024, 12, 4 x 1024).

    Example:
        >>> import torch
        >>> model = BottleneckMLP(64, 10, before=[32, 32], bottleneck=12, after=[32])
        >>> [name for name, _ in model.named_children()]
        ['layer1', 'layer2', 'bottleneck', 'layer3', 'linear']
        >>> model(torch.zeros(5, 64)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        in_features: int = 2,
        num_classes: int = 2,
        before: Sequence[int] = (128, 128, 128, 128),
        bottleneck: int = 2,
        after: Sequence[int] = (128, 128, 128),
        activation: str = "leaky_relu",
        dropout: float = 0.0,
        batch_norm: bool = False,
        noise: float = 0.0,
        bottleneck_norm: bool = False,
    ) -> None:
        super().__init__()
        features, number = in_features, 0
        for width in before:
            number += 1
            self.add_module(f"layer{number}", _layer(features, width, activation, dropout, batch_norm, noise))
            features = width
        self.bottleneck = nn.Sequential(nn.Linear(features, bottleneck))
        if bottleneck_norm:
            self.bottleneck.append(nn.BatchNorm1d(bottleneck))
        features = bottleneck
        for width in after:
            number += 1
            self.add_module(f"layer{number}", _layer(features, width, activation, dropout, batch_norm, noise))
            features = width
        self.linear = nn.Linear(features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, num_classes) of samples (n, ...)."""
        h = x.flatten(1)
        for module in self.children():
            h = module(h)
        return h


class GaussianNoise(nn.Module):
    """Adds noise of standard deviation ``std`` in training, nothing in evaluation: one of the regularisers of Figure 1.

    Args:
        std: of the noise.

    Example:
        >>> import torch
        >>> GaussianNoise(0.1).eval()(torch.ones(2))
        tensor([1., 1.])
    """

    def __init__(self, std: float) -> None:
        super().__init__()
        self.std = std

    def forward(self, x: Tensor) -> Tensor:
        """``x``, with noise of its own shape and dtype while training."""
        return x + self.std * torch.randn_like(x) if self.training else x

    def extra_repr(self) -> str:
        """``std``, for print(model)."""
        return f"std={self.std}"


_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "leaky_relu": nn.LeakyReLU,
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}


def _layer(
    in_features: int, width: int, activation: str, dropout: float, batch_norm: bool, noise: float
) -> nn.Sequential:
    if activation not in _ACTIVATIONS:
        raise ValueError(f"MLP: expected an activation among {sorted(_ACTIVATIONS)}, got {activation!r}.")
    layer = nn.Sequential(nn.Linear(in_features, width))
    if batch_norm:
        layer.append(nn.BatchNorm1d(width))
    layer.append(_ACTIVATIONS[activation]())
    if dropout:
        layer.append(nn.Dropout(dropout))
    if noise:
        layer.append(GaussianNoise(noise))
    return layer
