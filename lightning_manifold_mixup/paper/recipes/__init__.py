"""Recipes by name: YAML files for ``--config``, in layers, so that each value stands in one place with its reason.

A name is split at its hyphens. Every file whose own parts are all among the parts of the name is one of its layers.
Files with fewer parts come earlier, and a later layer overrides an earlier one. ``cifar10_small-5000`` is
``cifar10_small.yaml``, then ``cifar10_small-5000.yaml``. The rows of the paper's tables are made of the files in
``paper/`` in the same way: ``cifar10-wrn28_10-manifold`` is ``common``, ``cifar10``, ``wrn28_10``, ``manifold``, then
``wrn28_10-manifold``.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from itertools import product
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

__all__ = [
    "CODE",
    "DATASETS",
    "DEFAULT",
    "METHODS",
    "NETWORKS",
    "is_row",
    "layers_of",
    "merge",
    "names",
    "read",
    "row_names",
    "with_method",
]

DEFAULT = "digits"
"""What the commands use without ``--config``."""

METHODS = ("none", "input", "manifold")
"""No mixup, input mixup, Manifold Mixup."""

NETWORKS = ("preactresnet18", "preactresnet34", "wrn28_10")
DATASETS = ("cifar10", "cifar100", "svhn")
CODE = "-code"
"""Suffix of a row as the public code has it, where that differs from the paper's text."""

_FOLDER = Path(__file__).parent


def row_names() -> list[str]:
    """Name the rows of the paper's tables, ``<data>-<network>-<method>``.

    Example:
        >>> len(row_names()), row_names()[0], row_names()[-1]
        (30, 'cifar10-preactresnet18-none', 'tinyimagenet-preactresnet18-manifold')
    """
    pairs = [*product(DATASETS, NETWORKS), ("tinyimagenet", "preactresnet18")]
    return [f"{data}-{network}-{method}" for data, network in pairs for method in METHODS]


def is_row(name: str) -> bool:
    """Whether a name is that of a row of the paper's tables, as in the text or as in the public code (``-code``).

    Args:
        name: of a recipe.

    Example:
        >>> is_row("svhn-wrn28_10-manifold-code"), is_row("digits")
        (True, False)
    """
    return name.removesuffix(CODE) in row_names()


def with_method(row: str, method: str) -> str:
    """Name the row of the same table for another method.

    Args:
        row: name of a row.
        method: one of ``METHODS``.

    Example:
        >>> with_method("svhn-wrn28_10-manifold-code", "input")
        'svhn-wrn28_10-input-code'
    """
    convention = CODE if row.endswith(CODE) else ""
    return f"{row.removesuffix(CODE).rpartition('-')[0]}-{method}{convention}"


def names() -> list[str]:
    """Name all recipes: the small ones, then the paper's rows.

    Example:
        >>> names()[0], names()[-1]
        ('cifar10_small', 'tinyimagenet-preactresnet18-manifold')
    """
    return [*sorted(path.stem for path in _FOLDER.glob("*.yaml")), *row_names()]


def layers_of(name: str) -> list[Path]:
    """Find the files of a recipe.

    Args:
        name: a recipe's name; a file; or several of those joined by ``+``, the later overriding the earlier.

    Returns:
        The files, in the order in which ``--config`` takes them.

    Raises:
        FileNotFoundError: if a part of the name is in no file of the recipes; the message has near misses.

    Example:
        >>> [path.name for path in layers_of("cifar10_small-5000")]
        ['cifar10_small.yaml', 'cifar10_small-5000.yaml']
        >>> [path.stem for path in layers_of("cifar10-wrn28_10-manifold")]
        ['common', 'cifar10', 'wrn28_10', 'manifold', 'wrn28_10-manifold']
        >>> layers_of("digit")
        Traceback (most recent call last):
            ...
        FileNotFoundError: There is no recipe and no file 'digit'; did you mean digits...
    """
    if Path(name).is_file():
        return [Path(name)]
    if "+" in name:
        return [path for part in name.split("+") for path in layers_of(part)]
    plain = name.removesuffix(".yaml")
    if is_row(plain):
        return _subsets(["common", *plain.split("-")], _FOLDER / "paper")
    parts = plain.split("-")
    layers = _subsets(parts, _FOLDER)
    if {part for path in layers for part in path.stem.split("-")} == set(parts):
        return layers
    near = get_close_matches(plain, names())
    raise FileNotFoundError(
        f"There is no recipe and no file {name!r}"
        + (f"; did you mean {' or '.join(near)}? " if near else ". ")
        + "`manifold-mixup recipes` lists the recipes."
    )


def _subsets(parts: list[str], folder: Path) -> list[Path]:
    files = [path for path in folder.glob("*.yaml") if set(path.stem.split("-")) <= set(parts)]

    def order(path: Path) -> tuple[int, list[int]]:
        own = path.stem.split("-")
        return len(own), [parts.index(part) for part in own]

    return sorted(files, key=order)


def read(files: Iterable[Path]) -> dict[str, Any]:
    """Read YAML files, the later over the earlier.

    Args:
        files: as ``layers_of`` returns them.

    Returns:
        The configuration as nested dicts.

    Example:
        >>> read(layers_of("digits"))["trainer"]["max_epochs"]
        60
    """
    config: dict[str, Any] = {}
    for file in files:
        config = merge(config, yaml.safe_load(file.read_text(encoding="utf-8")) or {})
    return config


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Lay one configuration over another: dicts key by key, all else is replaced, the arguments of another class too.

    Args:
        below: a configuration.
        above: another, which counts where both have a value.

    Example:
        >>> merge({"a": {"b": 1, "c": [1, 2]}}, {"a": {"c": [3]}})
        {'a': {'b': 1, 'c': [3]}}
        >>> merge({"class_path": "StepLR", "init_args": {"step_size": 9}}, {"class_path": "CosineAnnealingLR"})
        {'class_path': 'CosineAnnealingLR'}
    """
    if {"class_path"} <= below.keys() & above.keys() and below["class_path"] != above["class_path"]:
        below = {key: value for key, value in below.items() if key != "init_args"}
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged
