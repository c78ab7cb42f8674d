"""Checks of what a user hands to the callback, and of the module: messages name the argument and what it got."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import isfinite
from numbers import Integral, Real
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

__all__ = ["check_alone", "check_arguments", "check_module", "check_number"]


def check_number(name: str, value: Any, least: float = 0.0, most: float = float("inf")) -> None:
    """Refuse what is no finite number in a range.

    Args:
        name: of the argument, for the message.
        value: what the user has given.
        least: the smallest that is allowed.
        most: the largest.

    Raises:
        ValueError: for anything else.

    Example:
        >>> check_number("probability", "0.5", most=1.0)
        Traceback (most recent call last):
            ...
        ValueError: Expected probability to be a number in [0, 1], got '0.5'.
    """
    if not isinstance(value, Real) or not isfinite(value) or not least <= float(value) <= most:
        span = f"a number in [{least:g}, {most:g}]" if isfinite(most) else f"a finite number >= {least:g}"
        raise ValueError(f"Expected {name} to be {span}, got {value!r}.")


def check_arguments(given: Mapping[str, Any]) -> None:
    """Refuse arguments of ``ManifoldMixupCallback`` that cannot be meant, before anything is trained.

    Alpha and the keys are checked where they are used.

    Args:
        given: the arguments by name.

    Raises:
        ValueError: for a wrong value; TypeError for partners that are no strategy.
    """
    check_number("probability", given["probability"], most=1.0)
    check_number("clean_weight", given["clean_weight"])
    for name in ("dominant", "self_check", "log_mixing", "log_clean"):
        if not isinstance(given[name], int) or given[name] not in (0, 1):  # "false" would count as true
            raise ValueError(f"Expected {name} to be True or False, got {given[name]!r}.")
    _check_layers(given["layers"])
    names = given["target_modules"]
    if isinstance(names, str) or not isinstance(names, Collection) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"Expected target_modules to be a list of names of modules, got {names!r}.")
    for name, meaning in (("batch_dim", "have it found"), ("seed", "follow `seed_everything`")):
        value = given[name]
        if value is not None and (not isinstance(value, Integral) or isinstance(value, bool) or value < 0):
            raise ValueError(f"Expected {name} to be an integer >= 0, or None to {meaning}, got {value!r}.")
    if not isinstance(given["passes"], int | str) or given["passes"] not in ("auto", 1, 2):
        raise ValueError(f"Expected passes to be 'auto', 1 or 2, got {given['passes']!r}.")
    partners = given["partners"]
    if partners is not None and (not callable(partners) or isinstance(partners, type)):
        raise TypeError(
            f"Expected partners to be a strategy such as `LabelDistancePartners(1.0)`, got {partners!r}. In YAML "
            "it is made from `class_path` and `init_args` by a recent jsonargparse."
        )


def _check_layers(layers: Any) -> None:
    names = [layers] if isinstance(layers, str) else layers
    if not isinstance(names, Collection) or not all(isinstance(name, str) for name in names):
        raise ValueError(
            "Expected layers to be 'auto', a name, a list of names, or a dict that gives each name a weight, got "
            f"{layers!r}."
        )
    if not layers:
        raise ValueError(
            "Expected layers to have at least one layer to mix, got none. Name some, or use layers='auto'."
        )


def check_alone(callbacks: Sequence[Any]) -> None:
    """Refuse a second callback of this package in one Trainer."""
    if len(callbacks) > 1:
        raise MisconfigurationException(
            f"Expected one ManifoldMixupCallback in the Trainer, got {len(callbacks)}: a batch is mixed once. "
            f"{' | '.join(map(str, callbacks))}. A ManifoldMixupModule brings its own; give it alpha=0 to use "
            "another."
        )


def check_module(module: Any, *, log_clean: bool) -> None:
    """Refuse a module whose batches cannot be mixed, or whose step cannot run once more for ``log_clean``."""
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        raise MisconfigurationException(
            "Expected a `training_step(batch, batch_idx)`, got one that takes its batches from `dataloader_iter`: "
            "they cannot be mixed on the way. Take `batch` as the argument."
        )
    if log_clean and not module.automatic_optimization:
        raise MisconfigurationException(
            "Expected automatic optimization with log_clean=True, got manual optimization: the step that is run once "
            "more would compute gradients. Set log_clean=False."
        )
