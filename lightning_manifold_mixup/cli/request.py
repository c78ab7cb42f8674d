"""What a command line asks for, found before its parser is built: which classes, and what the data tells the model.

The data module knows ``num_classes`` and the like; links of jsonargparse hand them to the model. These links must be
made before anything is parsed, so this module reads the command line first, and only links that fit are made. Links
that are always declared were tried, with jsonargparse 4.53: a class without the argument is refused ("Expected key
model.init_args.num_classes to be in data", for Lightning's BoringModel); what the user has set is overwritten in
silence (``num_classes=12`` becomes 10), and a link's function cannot tell it from a default; and a saved configuration
lacks it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from pydoc import locate
from typing import Any

import yaml  # type: ignore[import-untyped]
from lightning.pytorch import LightningModule
from lightning_utilities.core.inheritance import get_all_subclasses
from torch import nn

from lightning_manifold_mixup._step.extras import require
from lightning_manifold_mixup.cli.terminal import UsageError
from lightning_manifold_mixup.paper import recipes

__all__ = ["LINKED", "asked_for", "class_of", "handed_on", "links", "options_of", "value"]

LINKED = ("num_classes", "in_channels", "in_features", "vocabulary_size", "word_vectors")
"""Arguments of a model, or of its network, that are taken from attributes of the data module."""


def options_of(args: Sequence[str]) -> list[tuple[str, str]]:
    """Pair each word of a command line with its value: what follows ``=``, or else the next word.

    Example:
        >>> options_of(["--config=a", "--seed", "3"])
        [('--config', 'a'), ('--seed', '3'), ('3', '')]
    """
    pairs = []
    for index, arg in enumerate(args):
        following = args[index + 1] if index + 1 < len(args) else ""
        option, equals, text = arg.partition("=")
        pairs.append((option, text if equals else following))
    return pairs


def asked_for(args: Sequence[str]) -> dict[str, Any]:
    """Merge what files and options say about model and data.

    Args:
        args: a command line.

    Returns:
        A configuration as in YAML; later arguments override earlier ones.

    Raises:
        FileNotFoundError: for an unknown recipe.
        UsageError: for ``--config`` without a value.

    Example:
        >>> asked_for(["--model", "Mine", "--model.init_args.alpha=0", "--data.batch_size", "5"])
        {'model': {'class_path': 'Mine', 'init_args': {'alpha': 0}}, 'data': {'init_args': {'batch_size': 5}}}
        >>> asked_for(["--model.model", "Net", "--model.model.width", "5"])["model"]
        {'init_args': {'model': {'class_path': 'Net', 'init_args': {'width': 5}}}}
    """
    config: dict[str, Any] = {}
    for option, text in options_of(args):
        if option in ("-c", "--config"):
            if not text:
                raise UsageError(f"Expected a file or the name of a recipe after {option}, got nothing.")
            config = recipes.merge(config, recipes.read(recipes.layers_of(text)))
        elif option.startswith(("--model", "--data")):
            keys = _full(option[2:])
            if len(keys) == 1 and not text.lstrip().startswith("{"):
                keys.append("class_path")
            layer: Any = yaml.safe_load(text) if text else None
            for key in reversed(keys):
                layer = {key: layer}
            config = recipes.merge(_with_class(config, keys), layer)
    return config


_PARTS = ("class_path", "init_args", "dict_kwargs")
"""What a class is written with; on a command line ``init_args`` may be left out."""


def _full(option: str) -> list[str]:
    """Split the name of an option at its dots, with each ``init_args`` that was left out."""
    keys: list[str] = []
    for key in option.split("."):
        if keys and key not in _PARTS and keys[-1] not in _PARTS:
            keys.append("init_args")
        keys.append(key)
    return keys


def _with_class(config: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """Write the classes on the way to a key, where the path alone stands, as ``class_path``."""
    if not keys or keys[0] not in config:
        return config
    inner = config[keys[0]]
    if isinstance(inner, str) and len(keys) > 1 and keys[1] in _PARTS:
        inner = {"class_path": inner}
    return {**config, keys[0]: _with_class(inner, keys[1:])} if isinstance(inner, dict) else config


def value(config: Any, key: str) -> Any:
    """Look a dotted key up in nested dicts; None if it is missing.

    Example:
        >>> value({"model": {"class_path": "Mine"}}, "model.class_path")
        'Mine'
    """
    for part in key.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config


def class_of(path: Any, base: type) -> Any:
    """Find the class or function of a ``class_path``; None if it cannot be found.

    Args:
        path: a dotted path, or the name alone of an imported subclass of ``base``.
        base: what is wanted.

    Example:
        >>> class_of("ManifoldMixupModule", LightningModule).__name__
        'ManifoldMixupModule'
    """
    if not isinstance(path, str):
        return None
    if "." in path:
        return locate(path)
    return next((known for known in get_all_subclasses(base) if known.__name__ == path), None)


def links(config: dict[str, Any]) -> list[tuple[str, Callable[[Any], Any]]]:
    """Find what the data module has to tell the model.

    Args:
        config: as ``asked_for`` returns it.

    Returns:
        For each argument that the model or its network takes and nobody has set: its key, and a function that reads the
        value from the data module.

    Example:
        >>> [key for key, _ in links(recipes.read(recipes.layers_of("digits")))]  # doctest: +NORMALIZE_WHITESPACE
        ['model.init_args.num_classes', 'model.init_args.model.init_args.num_classes',
         'model.init_args.model.init_args.in_channels']
    """
    found: list[tuple[str, Callable[[Any], Any]]] = []
    for name in LINKED:
        for prefix, base in (("model", LightningModule), ("model.init_args.model", nn.Module)):
            path = value(config, prefix)  # the path alone is allowed, too
            parameter = _parameter(class_of(path if isinstance(path, str) else value(path, "class_path"), base), name)
            key, by_hand = f"{prefix}.init_args.{name}", value(config, f"{prefix}.dict_kwargs") or {}
            if parameter is not None and value(config, key) is None and name not in by_hand:
                found.append((key, partial(_read, parameter, prefix)))
    return found


def _parameter(target: Any, name: str) -> inspect.Parameter | None:
    """Find the argument of a class or function by name, its own or one that it hands on through ``**kwargs``."""
    if not isinstance(target, type):
        return _parameter_of_function(target, name)
    for base in target.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(vars(base)["__init__"]).parameters
        if name in parameters:
            return parameters[name]
        if all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
            return None
    return None


def _parameter_of_function(target: Any, name: str) -> inspect.Parameter | None:
    if not callable(target):
        return None
    parameters = inspect.signature(target).parameters
    if name in parameters:
        return parameters[name]
    if name in handed_on(target):
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
    # jsonargparse reads in the source what becomes of `**kwargs`; a setting that it does not find there is refused.
    parser, key = require("jsonargparse", "cli").ArgumentParser(), f"function.{name}"
    if key not in parser.add_function_arguments(target, "function", fail_untyped=False):
        return None
    default = parser.get_default(key)  # None, too, where there is none
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default or inspect.Parameter.empty)


def handed_on(function: Any) -> tuple[str, ...]:
    """Name the arguments that a function takes in ``**kwargs`` though its source does not show it.

    ``timm.create_model`` looks networks up by name and hands ``num_classes`` on, unless that is None.

    Example:
        >>> import timm
        >>> handed_on(timm.create_model), handed_on(nn.init.ones_)
        (('num_classes',), ())
    """
    library = (getattr(function, "__module__", None) or "").partition(".")[0]
    return ("num_classes",) if library == "timm" and function.__name__ == "create_model" else ()


def _read(parameter: inspect.Parameter, prefix: str, data: Any) -> Any:
    value = getattr(data, parameter.name, parameter.default)
    if value is inspect.Parameter.empty:
        raise UsageError(
            f"The model needs {parameter.name}, and {type(data).__name__} has no such attribute: set "
            f"{prefix}.init_args.{parameter.name}."
        )
    return value
