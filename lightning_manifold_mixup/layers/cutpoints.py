"""Cut points: the layers that every path from the input to the logits runs through.

A layer's output is a cut point when no path leads around it; only there does mixing reach the whole state. With p paths
from the input to the logits, and q of them through the layer's output, the layer is a cut point exactly if p = q. The
counts are exact, since Python's integers do not overflow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import accumulate

import torch
from torch import nn

from lightning_manifold_mixup._step.mix.dims import sample_dims
from lightning_manifold_mixup.layers.flow import SOURCE, Flow
from lightning_manifold_mixup.layers.names import INPUT, named_layers
from lightning_manifold_mixup.layers.paths import count_paths, find_sinks, weights_after


@dataclass(frozen=True)
class Mark:
    """A tensor that a layer returned: its node in the record of flow, and its shape."""

    node: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Call:
    """One call of a layer.

    Attributes:
        order: position among all calls, in the order in which they returned.
        marks: the tensors of content that it returned.
        shapes: shapes of all tensors of floating point numbers that it returned, in the order of the structure.
        from_input: for each of ``shapes``, whether the tensor holds content (a codebook, say, comes from the weights).
        carries_gradient: whether it ran in a forward pass that is back-propagated.
        training: whether it ran in training mode; in eval mode, which is for teachers, nothing is mixed.
        transformed: whether it ran inside a transform such as ``torch.vmap``.
    """

    order: int
    marks: tuple[Mark, ...]
    shapes: tuple[tuple[int, ...], ...]
    from_input: tuple[bool, ...]
    carries_gradient: bool
    training: bool = True
    transformed: bool = False


class Verdict(Enum):
    """What was found about a layer, in words that fit into a table."""

    ELIGIBLE = "on every path"
    BYPASSED = "bypassed"
    FINAL = "final output"
    REPEATED = "called several times"
    UNCALLED = "never called"
    SCRIPTED = "TorchScript takes no hooks"
    TRANSFORMED = "runs inside torch.func or torch.vmap"
    UNUSED = "leads to no loss of the targets"
    NO_DATA = "does not depend on the input"
    NO_TENSOR = "returns no float tensor"
    NO_GRADIENT = "runs without gradients"
    EVAL_MODE = "runs in eval mode"
    NO_BATCH = "no batch dimension"
    OTHER_ROWS = "rows are not samples"
    CALLED_ON_OTHERS = "called on other rows, too"
    ROWS_EXCHANGED = "rows are exchanged after it"
    UNCLEAR_BATCH = "unclear batch dimension: set batch_dim"
    LOOKED_UP = "integer inputs go around it"


@dataclass(eq=False)
class Layer:
    """A layer with what was found about it.

    Attributes:
        name: its name, relative to the observed module.
        module: the module, None for the input.
        calls: its calls, in order.
        live: those of them whose output reaches the end of the network.
        verdict: the finding.
        group: layers of one group return the same tensor.
        position: A number that grows from the input to the logits; -1 if it was not called on the way.
        depth: how many operations on the way, up to its output, have used weights.
        batch_dims: for each float tensor of its output, which dimension runs over samples, None if none does.
        ambiguous: whether that was a guess, because dimensions 0 and 1 both have the size of the batch.
    """

    name: str
    module: nn.Module | None
    calls: list[Call]
    live: list[Call] = field(default_factory=list)
    verdict: Verdict = Verdict.UNCALLED
    group: int = -1
    position: int = -1
    depth: int = 0
    batch_dims: tuple[int | None, ...] = ()
    ambiguous: bool = False

    @property
    def eligible(self) -> bool:
        """Whether the whole state can be mixed here."""
        return self.verdict is Verdict.ELIGIBLE


@dataclass(frozen=True)
class Rows:
    """What counts samples, and what counts something else.

    Attributes:
        sizes: the numbers of samples of the groups that a layer is called on in turn; usually one.
        batch_dim: the dimension that runs over samples, None to tell it by its size.
        others: first sizes of inputs that have no dimension of samples (nodes, points, tokens).
    """

    sizes: tuple[int, ...]
    batch_dim: int | None
    others: frozenset[int]

    def dims(self, layer: Layer, shapes: Sequence[tuple[int, ...]], call: int) -> tuple[int | None, ...]:
        """Return the dimension of samples of each tensor that a layer returned in one of its calls."""
        n = self.sizes[call % len(self.sizes)]
        others = {size for size in self.others if size > n}
        return sample_dims(shapes, n, self.batch_dim, layer.module, others)

    def dims_of_inputs(self, layer: Layer, shapes: Sequence[tuple[int, ...]]) -> tuple[int | None, ...]:
        """Return the same for the inputs, which are those of all groups."""
        found = [self.dims(layer, shapes, group) for group in range(len(self.sizes))]
        return tuple(next((dim for dim in dims if dim is not None), None) for dims in zip(*found, strict=True))


def analyse(
    root: nn.Module,
    calls: Mapping[str, list[Call]],
    flow: Flow,
    ends: Sequence[int] | None,
    rows: Rows,
) -> tuple[list[Layer], bool]:
    """Judge every layer.

    Args:
        root: the observed module.
        calls: the calls of each layer, by name.
        flow: the record of what flowed between them.
        ends: the nodes of the network's outputs; None to take the content that met a target.
        rows: what counts samples.

    Returns:
        The layers, the input first, and whether the end of the network was found.
    """
    sinks = find_sinks(flow) if ends is None else list(dict.fromkeys(ends))
    found = bool(sinks)
    if not found:  # go on with whatever the forward pass computed last, for a report that helps to find out why
        read = {other for before in flow.predecessors for other in before}
        sinks = [node for node in range(len(flow.predecessors)) if node not in read]
    into, onward = count_paths(flow.predecessors, sinks)
    total = onward[SOURCE]
    through = [a * b for a, b in zip(into, onward, strict=True)]
    # Only weights on a path count: a penalty on weights, for instance, follows the logits too.
    on_path = [weight and bool(paths) for weight, paths in zip(flow.weighted, through, strict=True)]
    followed = weights_after(flow.predecessors, on_path)
    depth = list(accumulate(on_path, initial=0))

    exchanged = weights_after(flow.predecessors, flow.exchanged)
    layers = [Layer(INPUT, None, calls.get(INPUT, []))]
    layers += [Layer(name, module, calls.get(name, [])) for name, module in named_layers(root).items()]
    for layer in layers:
        layer.live = [call for call in layer.calls if any(through[mark.node] for mark in call.marks)]
        if layer.live:
            layer.position = max(mark.node for mark in layer.live[0].marks if through[mark.node])
            layer.depth = depth[layer.position]
            first = layer.live[0]
            dims = rows.dims(layer, first.shapes, layer.calls.index(first))
            layer.batch_dims = tuple(dim if own else None for dim, own in zip(dims, first.from_input, strict=True))
            if layer.name == INPUT:
                layer.batch_dims = rows.dims_of_inputs(layer, first.shapes)
            shapes = [mark.shape for mark in layer.live[0].marks if through[mark.node]]
            n = rows.sizes[0]
            told_by_size = rows.batch_dim is None and n > 1 and not isinstance(layer.module, nn.RNNBase)
            layer.ambiguous = told_by_size and any(len(shape) > 2 and shape[:2] == (n, n) for shape in shapes)
        layer.verdict = _judge(layer, flow, through, total, followed, exchanged, rows)
    _group(layers, flow, through, total)
    return layers, found


def _judge(
    layer: Layer,
    flow: Flow,
    through: Sequence[int],
    total: int,
    followed: Sequence[bool],
    exchanged: Sequence[bool],
    rows: Rows,
) -> Verdict:
    if not layer.live:
        return _why_not_live(layer)
    live = [[mark for mark in call.marks if through[mark.node]] for call in layer.live]
    nodes = [[mark.node for mark in marks] for marks in live]
    # No path leads through two tensors of one call, so the sum counts each path once.
    covered = sum(through[node] for call in nodes for node in call)
    if len(live) > 1 and (covered != total or _feeds_itself(nodes, flow.predecessors)):
        return Verdict.REPEATED
    if covered != total:
        return Verdict.LOOKED_UP if layer.name == INPUT else Verdict.BYPASSED
    if not all(call.carries_gradient for call in layer.live):
        return Verdict.NO_GRADIENT
    if not all(call.training for call in layer.live):
        return Verdict.EVAL_MODE
    if not any(followed[node] for call in nodes for node in call):
        return Verdict.FINAL
    wrong = _wrong_rows(layer, live, rows)
    if wrong is None and any(exchanged[node] for call in nodes for node in call):
        return Verdict.ROWS_EXCHANGED
    return wrong or Verdict.ELIGIBLE


def _wrong_rows(layer: Layer, live: Sequence[Sequence[Mark]], rows: Rows) -> Verdict | None:
    """Say why the rows of a layer cannot be mixed; None if they can."""
    if layer.name == INPUT:  # of the inputs only those are mixed that are used
        shapes = tuple(mark.shape for marks in live for mark in marks)
        calls = [(shapes, rows.dims_of_inputs(layer, shapes), (True,) * len(shapes))]
    else:  # a hook mixes all that a layer returns, used or not
        calls = [
            (call.shapes, rows.dims(layer, call.shapes, layer.calls.index(call)), call.from_input)
            for call in layer.live
        ]
    for shapes, dims, from_input in calls:
        for shape, dim, content in zip(shapes, dims, from_input, strict=True):
            if (not shape and layer.name != INPUT) or not content:  # a number, or a codebook: it is not mixed
                continue
            if dim is None:
                return _without_samples(shape, rows)
    # The hook also mixes in calls that lead to no loss of the targets.
    for index, call in enumerate(layer.calls):
        if layer.name != INPUT and call.carries_gradient and call.training and call not in layer.live:
            dims = rows.dims(layer, call.shapes, index)
            if any(dim is None and shape for shape, dim in zip(call.shapes, dims, strict=True)):
                return Verdict.CALLED_ON_OTHERS
    return None


def _without_samples(shape: tuple[int, ...], rows: Rows) -> Verdict:
    if rows.batch_dim is not None or not shape:
        return Verdict.NO_BATCH
    if len(shape) == 2 or shape[0] in rows.others:
        return Verdict.OTHER_ROWS
    return Verdict.UNCLEAR_BATCH if any(shape[1:2] == (n,) for n in rows.sizes) else Verdict.NO_BATCH


def _why_not_live(layer: Layer) -> Verdict:
    if isinstance(layer.module, torch.jit.ScriptModule):
        return Verdict.SCRIPTED
    if not layer.calls:
        return Verdict.UNCALLED
    if not any(call.shapes for call in layer.calls):
        return Verdict.NO_TENSOR
    if any(call.transformed for call in layer.calls):
        return Verdict.TRANSFORMED
    if not any(call.marks for call in layer.calls):
        return Verdict.NO_DATA
    # A pass without gradients (a teacher's) is more likely than a result that is not used.
    if not any(call.carries_gradient for call in layer.calls if call.marks):
        return Verdict.NO_GRADIENT
    return Verdict.UNUSED


def _feeds_itself(calls: Sequence[Sequence[int]], predecessors: Sequence[Sequence[int]]) -> bool:
    """Whether the output of one call is computed from that of another."""
    for index, call in enumerate(calls):
        others = {node for other, nodes in enumerate(calls) if other != index for node in nodes}
        stack, seen = list(call), set(call)
        while stack:
            for node in predecessors[stack.pop()]:
                if node in others:
                    return True
                if node not in seen:
                    seen.add(node)
                    stack.append(node)
    return False


def _group(layers: Sequence[Layer], flow: Flow, through: Sequence[int], total: int) -> None:
    """Put layers that return the same tensors, such as a container and its last child, into one group."""
    owner: dict[int, Layer] = {}
    groups = 0
    called = [layer for layer in layers if layer.live]
    for layer in sorted(called, key=lambda layer: (layer.live[0].order, layer.name.count("."))):
        nodes = [mark.node for call in layer.live for mark in call.marks if through[mark.node]]
        before = {
            owner.get(flow.predecessors[node][0]) if len(flow.predecessors[node]) == 1 else None for node in nodes
        }
        inner = before.pop() if len(before) == 1 else None
        if inner is not None and inner.verdict is layer.verdict and len(inner.live) == len(layer.live):
            layer.group = inner.group
        else:
            layer.group, groups = groups, groups + 1
        for node in nodes:
            owner[node] = layer
