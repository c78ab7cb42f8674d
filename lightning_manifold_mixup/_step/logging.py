"""What is logged of a batch that was mixed, and only of that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from lightning_manifold_mixup.mixing import Draw

PREFIX = "manifold_mixup"


def values_of(draw: Draw, layers: Sequence[str], alpha: Any, outputs: Any) -> dict[str, Any]:
    """The values to log, by name."""
    lam = draw.mix.lam.mean()
    values: dict[str, Any] = {
        f"{PREFIX}/lam": lam,
        # Not a number: Lightning would copy it to the device, and wait for that.
        f"{PREFIX}/layer": torch.full_like(lam, layers.index(draw.layer)),
    }
    if isinstance(alpha, (int, float)):
        values[f"{PREFIX}/alpha"] = torch.full_like(lam, alpha)
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    if loss is not None:
        values[f"{PREFIX}/loss/{draw.layer}"] = loss
    return values


def forget(trainer: Any) -> None:
    """Lightning would show the values of an earlier batch again where this one has none."""
    for metric in (getattr(trainer, "_results", None) or {}).values():
        if str(metric.meta.name).startswith(f"{PREFIX}/"):
            metric.reset()


def hyperparameters(loggers: Iterable[Any], callback: Any) -> None:
    """Alpha, S, seed and versions, for every logger."""
    values = {
        "alpha": str(callback.alpha),
        "layers": ", ".join(f"{index}: {name}" for index, name in enumerate(callback.layers_)),
        "probability": callback.probability,
        "seed": callback.state_dict()["seed"],
        **{name: _version(name) for name in ("lightning-manifold-mixup", "lightning", "torch")},
    }
    for logger in loggers:
        logger.log_hyperparams({f"{PREFIX}/{name}": value for name, value in values.items()})


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a copy of the source that is not installed
        return "not installed"
