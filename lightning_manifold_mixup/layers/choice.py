"""The default set S: which of the eligible layers to mix at, when the user leaves the choice to us.

The paper mixes a residual network at its input and after its first two stages (section 4: S = {0, 1, 2}). The rule
below says in general what input and stages are, and keeps the first half.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_manifold_mixup.layers.cutpoints import Layer, Verdict
from lightning_manifold_mixup.layers.names import INPUT

MAX_LAYERS = 7
"""The most layers in S: torch.compile makes a graph for each, and gives up at its recompile limit of 8."""

_LOOKUPS = (nn.Embedding, nn.EmbeddingBag)


def default_layers(layers: Sequence[Layer]) -> list[str]:
    """Choose the default S.

    1. Its first element is the input if that is eligible; else the outermost eligible layer that holds embeddings and
       no other weight; else the earliest eligible layer.
    2. A *stage* is an eligible layer with two weights or more (parameters of two or more dimensions, embeddings aside).
       The units are the stages at the shallowest level where three or more are siblings, else where two are; of
       siblings, those before the first that has branches inside are a stem, and left out.
    3. In a network without stages, there is a unit for each weight: the last eligible layer before the next weight is
       used, if any lies between the two.
    4. S is the first element and the first half of the units (rounded up); of more than six, six evenly spaced.

    Args:
        layers: all layers, judged.

    Returns:
        Their names, from the input on; empty if no layer is eligible.

    Example:
        >>> default_layers([])  # of a network: ``eligible_layers(model, batch).default``
        []
    """
    eligible = [layer for layer in layers if layer.eligible]
    first = _first(eligible)
    if first is None:
        return []
    candidates = [layer for layer in eligible if layer.module is not None and layer.group != first.group]
    units: dict[int, str] = {}
    for layer in sorted(_stages(candidates, layers) or _per_weight(candidates, first), key=_order):
        units.setdefault(layer.group, layer.name)
    half = list(units.values())[: -(-len(units) // 2)]
    room = MAX_LAYERS - 1
    if len(half) > room:
        half = [half[index * len(half) // room] for index in range(room)]
    return [first.name, *half]


def weights(module: nn.Module | None) -> int:
    """Count the weights in a module: parameters of two or more dimensions, embeddings aside.

    A parametrised one (weight normalisation, say, computes one weight from two parameters) counts once.
    """
    if module is None:
        return 0
    total = 0
    for part in module.modules():
        own = sum(parameter.ndim >= 2 for parameter in part.parameters(recurse=False))
        if not isinstance(part, _LOOKUPS):
            total += min(own, 1) if isinstance(part, ParametrizationList) else own
    return total


def _first(eligible: Sequence[Layer]) -> Layer | None:
    if any(layer.name == INPUT for layer in eligible):
        return next(layer for layer in eligible if layer.name == INPUT)
    embeddings = [
        layer
        for layer in eligible
        if layer.module is not None and weights(layer.module) == 0 and _holds_lookup(layer.module)
    ]
    earliest = sorted(eligible, key=lambda layer: layer.position)[:1]
    return min(embeddings or earliest, key=_outermost_first, default=None)


def _stages(candidates: Sequence[Layer], layers: Sequence[Layer]) -> list[Layer]:
    """Return the units of rule 2."""
    siblings: dict[str, list[Layer]] = {}
    for layer in sorted(candidates, key=_order):
        if weights(layer.module) >= 2:
            siblings.setdefault(layer.name.rpartition(".")[0], []).append(layer)
    for stages in siblings.values():
        # All that comes before the first stage with branches is the stem; a plain network has none.
        branched = [_has_branch(stage, layers) for stage in stages]
        if any(branched):
            del stages[: branched.index(True)]
    for at_least in (3, 2):
        levels = [
            parent.count(".") + bool(parent)
            for parent, stages in siblings.items()
            if len({stage.group for stage in stages}) >= at_least
        ]
        if levels:
            return [
                stage
                for parent, stages in siblings.items()
                if parent.count(".") + bool(parent) == min(levels)
                and len({stage.group for stage in stages}) >= at_least
                for stage in stages
            ]
    return []


def _per_weight(candidates: Sequence[Layer], first: Layer) -> list[Layer]:
    """Return the units of rule 3. Of layers that return the same tensor, the outermost."""
    last: dict[int, Layer] = {}
    for layer in sorted(candidates, key=lambda layer: layer.position):
        if layer.depth > first.depth:
            last[layer.depth] = layer
    return [
        min((layer for layer in candidates if layer.group == unit.group), key=_outermost_first)
        for unit in last.values()
    ]


def _has_branch(stage: Layer, layers: Sequence[Layer]) -> bool:
    return any(
        layer.verdict is Verdict.BYPASSED and _inside(layer, stage) and weights(layer.module) for layer in layers
    )


def _holds_lookup(module: nn.Module) -> bool:
    return any(isinstance(part, _LOOKUPS) for part in module.modules())


def _inside(layer: Layer, outer: Layer) -> bool:
    return layer.name.startswith(f"{outer.name}.")


def _order(layer: Layer) -> int:
    return layer.live[0].order


def _outermost_first(layer: Layer) -> tuple[int, int]:
    return layer.name.count("."), _order(layer)
