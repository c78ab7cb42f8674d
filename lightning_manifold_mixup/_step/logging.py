"""What is logged for a batch that was mixed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from lightning_manifold_mixup.mixing import Draw

PREFIX = "manifold_mixup"


def values_of(draw: Draw, layers: Sequence[str], alpha: Any, outputs: Any) -> dict[str, Any]:
    """Return the values to log, by name."""
    lam = draw.mix.lam.mean()
    values: dict[str, Any] = {
        f"{PREFIX}/lam": lam,
        # As a tensor: Lightning would copy a number to the device, and wait for that.
        f"{PREFIX}/layer": torch.full_like(lam, layers.index(draw.layer)),
    }
    if isinstance(alpha, (int, float)):
        values[f"{PREFIX}/alpha"] = torch.full_like(lam, alpha)
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    if loss is not None:
        values[f"{PREFIX}/loss/{draw.layer}"] = loss
    return values


def forget(trainer: Any) -> None:
    """Forget the values of earlier batches, which Lightning would show again where this one has none."""
    for metric in (getattr(trainer, "_results", None) or {}).values():
        if str(metric.meta.name).startswith(f"{PREFIX}/"):
            metric.reset()


def hyperparameters(loggers: Iterable[Any], callback: Any) -> None:
    """Log alpha, S, seed and versions with every logger."""
    values = {
        "alpha": str(callback.alpha),
        "layers": ", ".join(f"{index}: {name}" for index, name in enumerate(callback.layers_)),
        "probability": callback.probability,
        "seed": callback.state_dict()["seed"],
        **{name: _version_of(name) for name in ("lightning-manifold-mixup", "lightning", "torch")},
    }
    for logger in loggers:
        logger.log_hyperparams({f"{PREFIX}/{name}": value for name, value in values.items()})


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a copy of the source that is not installed
        return "not installed"
