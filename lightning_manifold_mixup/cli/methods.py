"""What is compared: no mixup, input mixup and Manifold Mixup, and which of them a configuration is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from lightning_manifold_mixup.callback import ManifoldMixupCallback
from lightning_manifold_mixup.cli.request import class_of
from lightning_manifold_mixup.cli.terminal import UsageError
from lightning_manifold_mixup.paper import recipes

__all__ = ["CLEAN", "LABELS", "label_of", "method_of", "set_method"]

LABELS = {
    "none": "no mixup",
    "input": "input mixup",
    "manifold": "Manifold Mixup",
    "manifold+clean": "Manifold Mixup + clean",
}
"""The methods, and what tables call them."""

CLEAN = "+clean"
"""Ends the name of a method that trains on the unmixed batch too."""

_ALPHAS = ("alpha", "alpha_labelled", "alpha_unlabelled")


def label_of(recipe: str) -> str:
    """Return a recipe's name without folder, suffix and method.

    Example:
        >>> label_of("cifar10-wrn28_10-manifold-code"), label_of("digits+some/folder/mine.yaml")
        ('cifar10-wrn28_10-code', 'digits+mine')
    """
    label = "+".join(Path(part).name.removesuffix(".yaml") for part in recipe.split("+"))
    return recipes.with_method(label, "").replace("--", "-").rstrip("-") if recipes.is_row(label) else label


def method_of(config: Any) -> str:
    """Return the name of the method that a parsed configuration trains with.

    Args:
        config: with ``trainer.callbacks`` and ``model``.

    Returns:
        One of ``LABELS``.
    """
    place, alphas, clean = _found(config)
    if not any(place[name] for name in alphas):
        return "none"
    method = "input" if place.get("layers") in ("input", ["input"]) else "manifold"
    return method + CLEAN if method == "manifold" and clean else method


def set_method(config: Any, method: str) -> None:
    """Turn a parsed configuration with Manifold Mixup into that of another method.

    Args:
        config: with a ``ManifoldMixupCallback`` among the Trainer's callbacks, or a model that has ``alpha`` (or
            ``alpha_labelled`` and ``alpha_unlabelled``) and ``layers``, as the modules of this package have. Changed in
            place.
        method: ``"none"``: no mixing. ``"input"``: alpha 1 at the input. ``"manifold"``: as the configuration has it.
            ``"manifold+clean"``: that, with the loss of the unmixed batch added (RegMixup, Pinto et al. 2022).

    Raises:
        UsageError: if the configuration has no Manifold Mixup.
    """
    place, alphas, _ = _found(config)
    if "layers" not in place or not any(place[name] for name in alphas):
        raise UsageError(
            "Nothing to compare: the recipe has no Manifold Mixup. Give it a ManifoldMixupModule, or a "
            "ManifoldMixupCallback in trainer.callbacks, with alpha above 0."
        )
    if method == "manifold":
        return
    if method.endswith(CLEAN):
        if place is not config.model.get("init_args"):
            place.clean_weight = 1.0
        elif "mixup" in place:  # the callback's further arguments, in the modules of this package
            place.mixup = {**(place.mixup or {}), "clean_weight": 1.0}
        else:
            raise UsageError(
                f"--methods {method} needs a ManifoldMixupModule, or a ManifoldMixupCallback in the recipe."
            )
        return
    for name in alphas:
        place[name] = 0.0 if method == "none" else 1.0
    if method == "input":
        place.layers = ["input"]


def _found(config: Any) -> tuple[Any, list[str], float]:
    """Return the arguments that have alpha, the names of the alphas among them, and the weight of the clean loss."""
    callbacks = config.trainer.callbacks or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    own = [c for c in callbacks if class_of(c.class_path, Callback) is ManifoldMixupCallback]
    place = (own[0] if own else config.model).get("init_args") or {}
    clean = place.get("clean_weight") or (place.get("mixup") or {}).get("clean_weight") or 0.0
    return place, [name for name in _ALPHAS if name in place], clean
