"""Paths through the record of a forward pass: how many there are, where they end, and where they use weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lightning_manifold_mixup.layers.flow import SOURCE, Flow


def count_paths(
    predecessors: Sequence[Sequence[int]], sinks: Iterable[int], source: int = SOURCE
) -> tuple[list[int], list[int]]:
    """Count the paths of a graph whose nodes are numbered in topological order.

    Args:
        predecessors: the predecessors of each node.
        sinks: where paths end. A path may run through one sink to another.
        source: where paths begin.

    Returns:
        For each node the number of paths from the source to it, and the number of paths from it to a sink. Their
        product is the number of paths through the node.

    Example:
        >>> diamond = [(), (0,), (0,), (1, 2)]
        >>> count_paths(diamond, sinks=[3])
        ([1, 1, 1, 2], [2, 1, 1, 1])
    """
    into = [0] * len(predecessors)
    onward = [0] * len(predecessors)
    into[source] = 1
    for node, before in enumerate(predecessors):
        into[node] += sum(into[other] for other in before)
    for sink in sinks:
        onward[sink] += 1
    for node in range(len(predecessors) - 1, -1, -1):
        if onward[node]:
            for other in predecessors[node]:
                onward[other] += onward[node]
    return into, onward


def find_sinks(flow: Flow) -> list[int]:
    """Find where the network ends: the content that was compared with a target.

    A target may also be an input (an autoencoder's image, a decoder's previous word), which the network itself combines
    with content. So a comparison counts only if no weight is used after it, or if it gives a single number (a penalty
    on gradients uses weights after the loss). A sum or product of losses is no end: each loss in it has its own.

    Args:
        flow: the record.

    Returns:
        Nodes; none if no target was compared with what the network makes.
    """
    learned = [False] * len(flow.predecessors)
    for node, before in enumerate(flow.predecessors):
        learned[node] = flow.weighted[node] or any(learned[other] for other in before)
    comparisons = {
        node: [other for other in content if learned[other]]
        for node, content in (flow.comparisons or flow.comparisons_without_gradient).items()
    }
    after = weights_after(flow.predecessors, flow.weighted)
    comparisons = {node: content for node, content in comparisons.items() if not after[node] or node in flow.losses}
    is_loss = [False] * len(flow.predecessors)
    for node, before in enumerate(flow.predecessors):
        is_loss[node] = node in comparisons or any(is_loss[other] for other in before)
    return sorted({other for content in comparisons.values() for other in content if not is_loss[other]})


def weights_after(predecessors: Sequence[Sequence[int]], weighted: Sequence[bool]) -> list[bool]:
    """Tell for each node whether a weighted node follows it.

    Example:
        >>> weights_after([(), (0,), (1,)], weighted=[False, True, False])
        [True, False, False]
    """
    after = [False] * len(predecessors)
    for node in range(len(predecessors) - 1, -1, -1):
        if after[node] or weighted[node]:
            for other in predecessors[node]:
                after[other] = True
    return after
