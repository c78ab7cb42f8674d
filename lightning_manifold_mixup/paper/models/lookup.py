"""A network by name: the project's own, torchvision's, timm's."""

import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import partial
from typing import Any

from torch import nn

from lightning_manifold_mixup.evaluation.extras import require
from lightning_manifold_mixup.paper.models.mlp import MLP, BottleneckMLP
from lightning_manifold_mixup.paper.models.preact_resnet import PreActResNet
from lightning_manifold_mixup.paper.models.wide_resnet import WideResNet

__all__ = ["build_model"]


def build_model(name: str, num_classes: int, in_channels: int = 3, **kwargs: Any) -> nn.Module:
    """Build a classifier by name, with random weights.

    Args:
        name: one of
            ``"preact_resnet18"`` (34, 50, 101, 152), ``"wide_resnet28_10"`` (any depth and factor; ``"wrn28-10"`` too),
            ``"mlp"``, ``"bottleneck_mlp"``;
            a torchvision classification model, ``"resnet18"`` or ``"torchvision:resnet18"``;
            a timm model, ``"timm:resnet18"``.
            Case, hyphens and underscores do not matter for the project's own.
        num_classes: number of logits.
        in_channels: channels of the input images. torchvision's models take 3; fully connected ones take `in_features`.
        kwargs: passed on to the model: ``initial_channels``, ``stride``, ``dropout``, ``widths``, ...

    In YAML (a function, unlike a class, has to be told `num_classes`; `kwargs` go under ``dict_kwargs``)::

        model:
          class_path: lightning_manifold_mixup.ManifoldMixupModule
          init_args:
            model:
              class_path: lightning_manifold_mixup.paper.models.build_model
              init_args: {name: "timm:resnet18", num_classes: 10}
              dict_kwargs: {drop_rate: 0.1}

    Raises:
        ValueError: for an unknown name (the message has near misses), or channels that the model cannot take.
        ModuleNotFoundError: if torchvision or timm is needed and not installed; the message has the pip command.

    Example:
        >>> type(build_model("preact_resnet18", num_classes=10, initial_channels=4)).__name__
        'PreActResNet'
        >>> build_model("preact_resnet17", num_classes=10)
        Traceback (most recent call last):
            ...
        ValueError: build_model: unknown name 'preact_resnet17'; did you mean preact_resnet18...
    """
    library, colon, rest = name.partition(":")
    if library == "timm" and colon:
        return _build_timm(rest, num_classes, in_channels, kwargs)
    if library == "torchvision" and colon:
        return _build_torchvision(rest, num_classes, in_channels, kwargs)
    own = _own(name)
    if own is not None:
        return own(num_classes=num_classes, in_channels=in_channels, **kwargs)
    models = require("torchvision.models", "cli")
    torchvision_names = models.list_models(module=models)
    if name in torchvision_names:
        return _build_torchvision(name, num_classes, in_channels, kwargs)
    raise ValueError(_unknown(name, [*_OWN_NAMES, *torchvision_names]))


_OWN_NAMES = (
    *(f"preact_resnet{depth}" for depth in (18, 34, 50, 101, 152)),
    "wide_resnet28_10",
    "wide_resnet28_2",
    "mlp",
    "bottleneck_mlp",
)


def _own(name: str) -> Callable[..., nn.Module] | None:
    """The network of this project that has that name, whatever its case and separators."""
    plain = re.sub(r"(?<=[a-z])[-_ ]|[-_ ](?=[a-z])", "", name.lower())
    if match := re.fullmatch(r"preactresnet(18|34|50|101|152)", plain):
        return partial(PreActResNet, int(match[1]))
    match = re.fullmatch(r"(?:wideresnet|wrn)(\d+)[-_](\d+)", plain)
    if match and (int(match[1]) - 4) % 6 == 0:  # torchvision's wide_resnet50_2 and wide_resnet101_2 are another family
        return partial(WideResNet, int(match[1]), int(match[2]))
    return {"mlp": _mlp, "bottleneckmlp": _bottleneck_mlp}.get(plain)


def _mlp(in_channels: int, **kwargs: Any) -> nn.Module:
    return MLP(**kwargs)


def _bottleneck_mlp(in_channels: int, **kwargs: Any) -> nn.Module:
    return BottleneckMLP(**kwargs)


def _build_torchvision(name: str, num_classes: int, in_channels: int, kwargs: dict[str, Any]) -> nn.Module:
    models = require("torchvision.models", "cli")
    names = models.list_models(module=models)
    if name not in names:
        raise ValueError(_unknown(name, names, "torchvision:"))
    if in_channels != 3:
        raise ValueError(
            f"build_model: expected 3 channels for torchvision's {name}, got {in_channels}; timm's models take any "
            f'number ("timm:{name}").'
        )
    model: nn.Module = models.get_model(name, num_classes=num_classes, **kwargs)
    return model


def _build_timm(name: str, num_classes: int, in_channels: int, kwargs: dict[str, Any]) -> nn.Module:
    timm = require("timm", "all")
    if not timm.is_model(name):
        raise ValueError(_unknown(name, timm.list_models(), "timm:"))
    model: nn.Module = timm.create_model(name, num_classes=num_classes, in_chans=in_channels, **kwargs)
    return model


def _unknown(name: str, names: Iterable[str], prefix: str = "") -> str:
    near = [prefix + match for match in get_close_matches(name, names)]
    return f"build_model: unknown name {prefix + name!r}" + (
        f"; did you mean {' or '.join(near)}?"
        if near
        else '; expected one of this project\'s, a torchvision model, or "timm:" and a timm model.'
    )
