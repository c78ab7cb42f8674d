"""Names of layers, as a user writes them: relative to the LightningModule, free of the names that wrappers add."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper

INPUT = "input"
"""The name of layer 0, the network's input. It is no module, so it has no entry in ``named_layers``."""

# Attributes of the wrappers of torch.compile, activation checkpointing and FSDP. No user chooses these names.
_PRIVATE = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
# Users do choose the name ``module``, so it is a wrapper's only below these.
_PARALLEL = (nn.parallel.DistributedDataParallel, nn.DataParallel)


def named_layers(root: nn.Module) -> dict[str, nn.Module]:
    """Map the name of every layer below ``root`` to the module that a forward hook for this name belongs on.

    Components that a wrapper adds (``_orig_mod``, ``_checkpoint_wrapped_module``, ``_fsdp_wrapped_module``, and
    ``module`` below ``DistributedDataParallel`` and ``DataParallel``) are left out of the names, so a wrapper and the
    module inside it share one. A module registered under two names has an entry for each.

    Args:
        root: the module the names are relative to. It has no entry itself.

    Returns:
        Names in the order of ``root.named_modules()``, with their modules.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(2, 2), torch.compile(nn.Sequential(nn.ReLU())))
        >>> list(named_layers(net))
        ['0', '1', '1.0']
    """
    layers: dict[str, nn.Module] = {}
    clean = {"": ""}
    modules = dict(root.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        if name == "":
            continue
        parent, _, last = name.rpartition(".")
        wrapped = last in _PRIVATE or (last == "module" and isinstance(modules[parent], _PARALLEL))
        clean[name] = clean[parent] if wrapped else f"{clean[parent]}.{last}".lstrip(".")
        # Outer modules come first, and an inner one replaces its wrapper: torch.compile traces hooks of the module
        # inside, and not those of the wrapper. The wrapper of activation checkpointing stays: a hook on it runs once,
        # one on the module inside would run again at each recomputation.
        if clean[name] and not isinstance(layers.get(clean[name]), CheckpointWrapper):
            layers[clean[name]] = module
    return layers


def resolve_layers(root: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Expand names and globs into layer names.

    A glob is matched part by part, so ``*`` does not cross a dot: ``model.layer*`` gives ``model.layer1`` to
    ``model.layer4``, and not ``model.layer1.0``. Names that carry a wrapper's components (``_orig_mod``, ...) are
    understood too. ``"input"`` is layer 0, and is passed through.

    Args:
        root: the module the names are relative to.
        patterns: exact names and globs (``*``, ``?``, ``[12]``).

    Returns:
        Names in the order of the patterns (within a glob: in the order of the modules), each once.

    Raises:
        ValueError: if ``patterns`` is empty, a name is unknown, or a glob matches nothing.

    Example:
        >>> net = nn.ModuleDict({"layer1": nn.Sequential(nn.ReLU()), "layer2": nn.ReLU(), "head": nn.ReLU()})
        >>> resolve_layers(net, ["input", "layer*"])
        ['input', 'layer1', 'layer2']
    """
    if isinstance(patterns, str):
        raise ValueError(f"Expected a list of layer names, got the text {patterns!r}. Write [{patterns!r}].")
    if not patterns:
        raise ValueError("Expected at least one layer name, got none. Name layers, or use layers='auto'.")
    known = list(named_layers(root))
    found: dict[str, None] = {}
    for pattern in patterns:
        wanted = ".".join(part for part in pattern.split(".") if part not in _PRIVATE)
        if wanted == INPUT or wanted in known:
            found[wanted] = None
        elif re.search(r"[*?\[]", wanted):
            matches = [name for name in known if _matches(name, wanted)]
            if not matches:
                raise ValueError(
                    f"Expected a glob that matches layers of {type(root).__name__}, got {pattern!r}, which matches none"
                    f" ('*' does not cross a dot).{near_misses(wanted, known)} `manifold-mixup layers` lists all names."
                )
            found.update(dict.fromkeys(matches))
        else:
            raise ValueError(unknown_layer(pattern, root))
    return list(found)


def weighted_layers(root: nn.Module, layers: str | Sequence[str] | Mapping[str, float]) -> dict[str, float]:
    """Expand what a user writes for S into layer names with their weights.

    Args:
        root: the module the names are relative to.
        layers: a name or glob, several of them, or a mapping from them to weights > 0.

    Returns:
        The weight of each layer; 1 unless it was given.

    Raises:
        ValueError: if a name is unknown or is there twice, or a weight is not a positive number.

    Example:
        >>> net = nn.ModuleDict({"layer1": nn.ReLU(), "layer2": nn.ReLU()})
        >>> weighted_layers(net, {"input": 1, "layer*": 2})
        {'input': 1.0, 'layer1': 2.0, 'layer2': 2.0}
    """
    if not isinstance(layers, Mapping):
        patterns = [layers] if isinstance(layers, str) else list(layers)
        repeated = sorted({pattern for pattern in patterns if patterns.count(pattern) > 1})
        if repeated:
            weights = ", ".join(f"{pattern}: {patterns.count(pattern)}" for pattern in dict.fromkeys(patterns))
            raise ValueError(
                f"Expected each layer once, got {repeated} several times. To draw a layer more often, give weights: "
                f"layers={{{weights}}}."
            )
        return dict.fromkeys(resolve_layers(root, patterns), 1.0)
    found: dict[str, float] = {}
    for pattern, weight in layers.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
            raise ValueError(f"Expected the weight of layer {pattern!r} to be a number > 0, got {weight!r}.")
        for name in resolve_layers(root, [pattern]):
            if name in found:
                raise ValueError(f"Expected one weight for each layer, got two for {name!r}.")
            found[name] = float(weight)
    return found


def unknown_layer(name: str, root: nn.Module) -> str:
    """Say that ``root`` has no layer ``name``, and which names come near.

    Args:
        name: the name that was asked for.
        root: the module the names are relative to.

    Returns:
        Sentences for an error.

    Example:
        >>> unknown_layer("layr1", nn.ModuleDict({"layer1": nn.ReLU()}))
        "Expected the name of a layer of ModuleDict, got 'layr1'. Did you mean 'layer1'?"
    """
    return unknown_name(name, list(named_layers(root)), type(root).__name__)


def unknown_name(name: str, known: Sequence[str], model: str) -> str:
    """Say the same of a name that is not among the ``known`` ones of a ``model``."""
    hint = near_misses(name, known) or f" The outermost ones: {', '.join(repr(n) for n in known if '.' not in n)}."
    return f"Expected the name of a layer of {model}, got {name!r}.{hint}"


def near_misses(name: str, known: Sequence[str]) -> str:
    """Return `` Did you mean ...?`` with the closest known names, or nothing."""
    # The most frequent mistake, a name without its first part (``layer1`` for ``model.layer1``), is no near miss by
    # letters.
    tails = [candidate for candidate in known if candidate.endswith(f".{name}")]
    close = difflib.get_close_matches(name, [INPUT, *known], n=10)
    close.sort(key=lambda candidate: candidate.count(".") != name.count("."))
    shown = list(dict.fromkeys([*tails, *close]))[:3]
    return f" Did you mean {', '.join(map(repr, shown))}?" if shown else ""


def _matches(name: str, glob: str) -> bool:
    parts, globs = name.split("."), glob.split(".")
    return len(parts) == len(globs) and all(map(fnmatchcase, parts, globs))
