"""Observing one real forward pass: hooks around every layer, the record of what flows between them, and no trace after.

Whether a layer is eligible is a property of the graph that a forward pass computes. It is read from a pass that happens
anyway (the first training batch), or from one that ``eligible_layers`` runs and takes back.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_manifold_mixup._step.batch import tree as batches
from lightning_manifold_mixup._step.batch.keys import Keys
from lightning_manifold_mixup._step.batch.tree import tensors
from lightning_manifold_mixup._step.check.ghost import batch_of_ghosts, ghost_of, isolated
from lightning_manifold_mixup._step.mix.hooks import is_training_forward
from lightning_manifold_mixup.layers.cutpoints import Call, Mark, Rows, analyse
from lightning_manifold_mixup.layers.flow import Flow, is_transformed
from lightning_manifold_mixup.layers.names import INPUT, named_layers
from lightning_manifold_mixup.layers.report import LayerReport, make_report


class Observation:
    """What one forward pass showed. Made by ``observe``; ask it for a ``report`` once the pass is over.

    Attributes:
        flow: the record of which content flowed where.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
        >>> with observe(net, x := torch.randn(5, 4)) as seen:
        ...     output = net(x)
        >>> seen.report(output).eligible
        ['input', '0']
    """

    def __init__(self, root: nn.Module, flow: Flow, batch_sizes: Sequence[int], batch_dim: int | None) -> None:
        self._root = root
        self.flow = flow
        self._batch_sizes = batch_sizes
        self._batch_dim = batch_dim
        self._other_rows: frozenset[int] = frozenset()
        self._calls: dict[str, list[Call]] = {}
        self._order = 0

    def report(self, outputs: Any = None) -> LayerReport:
        """Analyse what was observed.

        Args:
            outputs: the network's outputs (tensors, nested in any way), if they are what counts as the end of the
                network. By default the end is what was compared with a target: the logits that the loss received.

        Returns:
            The report on every layer. Its ``sinks_found`` is False if no loss used the targets.
        """
        ends = None
        if outputs is not None:
            with torch._C.DisableTorchFunction():  # they may be of a tensor subclass
                ends = [node for tensor in tensors(outputs) if (node := self.flow.node(tensor)) is not None]
        rows = Rows(tuple(self._batch_sizes), self._batch_dim, self._other_rows)
        layers, sinks_found = analyse(self._root, self._calls, self.flow, ends, rows)
        return make_report(layers, type(self._root).__name__, rows, sinks_found)

    def add_targets(self, outputs: Any) -> None:
        """Make what a module has just returned part of the targets, a teacher's output for instance."""
        with torch._C.DisableTorchFunction():
            for tensor in tensors(outputs):
                self.flow.add_target(tensor)

    def _enter_input(self, inputs: Any) -> None:
        marks, shapes = [], []
        for tensor in tensors(inputs):
            node = self.flow.add_input(tensor)
            if node is not None and tensor.is_floating_point():  # complex numbers are content, and are not mixed
                marks.append(Mark(node, tuple(tensor.shape)))
                shapes.append(tuple(tensor.shape))
        self._calls[INPUT] = [Call(-1, tuple(marks), tuple(shapes), (True,) * len(shapes), carries_gradient=True)]
        self._other_rows = frozenset(
            tensor.shape[0]
            for tensor in tensors(inputs)
            if tensor.ndim and not any(n in tensor.shape[:2] for n in self._batch_sizes)
        )

    def _around(self, names: list[str]) -> tuple[Any, Any]:
        """Return the hooks for before and after a module that bears ``names``."""

        def before(module: nn.Module, args: Any) -> None:
            # Before each call, because sharded parameters (FSDP) are other tensors while the module runs.
            with torch._C.DisableTorchFunction():
                self.flow.add_state(module._parameters.values(), module._buffers.values())

        def after(module: nn.Module, args: Any, output: Any) -> Any:
            if torch._C._current_graph_task_id() != -1:
                return None  # a checkpoint is recomputed in backward, which is no new forward pass
            with torch._C.DisableTorchFunction():
                leaves, structure = tree_flatten(output)
                marks, shapes, from_input, transformed = [], [], [], False
                for index, leaf in enumerate(leaves):
                    if isinstance(leaf, Tensor) and leaf.is_floating_point():
                        shapes.append(tuple(leaf.shape))
                        from_input.append(self.flow.node(leaf) is not None)
                        transformed = transformed or is_transformed(leaf)
                        marked = self.flow.mark(leaf)
                        if marked is not None:
                            leaves[index], node = marked
                            marks.append(Mark(node, tuple(leaf.shape)))
                # A network that is in eval mode as a whole will be trained later; its mode says nothing about layers.
                training = module.training or not self._root.training
                found = tuple(marks), tuple(shapes), tuple(from_input)
                call = Call(self._order, *found, is_training_forward(), training, transformed)
            self._order += 1
            for name in names:
                self._calls.setdefault(name, []).append(call)
            return tree_unflatten(leaves, structure) if marks else None

        return before, after


@contextmanager
def observe(
    root: nn.Module,
    inputs: Any,
    targets: Any = None,
    batch_size: int | Sequence[int] | None = None,
    batch_dim: int | None = None,
) -> Iterator[Observation]:
    """Observe the forward pass that runs inside the ``with`` block.

    Nothing changes for what runs inside: results and gradients are bitwise the same, no random number is drawn, no
    buffer touched. Parts compiled by ``torch.compile`` run eagerly. Hooks and modes are gone afterwards, also after an
    exception; backward may run inside or later.

    Args:
        root: the module that layer names are relative to.
        inputs: the tensors of the batch that enter the network (nested in any way): float tensors, token ids.
        targets: the tensors of the batch that the loss compares with, as the code inside will hold them. They may share
            memory with inputs (an autoencoder).
        batch_size: the number of samples; of several groups of samples, on which the network is called in turn, one
            for each. By default the first size of the first input.
        batch_dim: the dimension of layers' outputs that runs over samples. By default 0 if its size is right, else 1
            for tensors of three dimensions or more.

    Yields:
        The observation, to be asked for its ``report()``.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> x, y = torch.randn(5, 4), torch.randint(3, (5,))
        >>> with observe(net, x, y) as seen:
        ...     loss = nn.functional.cross_entropy(net(x), y)
        >>> seen.report().eligible
        ['input', '0', '1']
    """
    flow = Flow()
    flow.add_state(root.parameters(), root.buffers())
    if batch_size is None:
        dim = batch_dim or 0
        batch_size = next((tensor.shape[dim] for tensor in tensors(inputs) if tensor.ndim > dim), 0)
    sizes = (batch_size,) if isinstance(batch_size, int) else tuple(batch_size)
    observation = Observation(root, flow, sizes, batch_dim)
    observation._enter_input(inputs)
    for target in tensors(targets):
        flow.add_target(target)
    names: dict[nn.Module, list[str]] = {}
    for name, module in named_layers(root).items():
        if not isinstance(module, torch.jit.ScriptModule):  # which take no hooks
            names.setdefault(module, []).append(name)
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for module, own_names in names.items():
            before, after = observation._around(own_names)
            stack.callback(module.register_forward_pre_hook(before).remove)
            stack.callback(module.register_forward_hook(after).remove)
        stack.enter_context(flow)
        yield observation


def eligible_layers(
    model: nn.Module, *inputs: Any, batch_size: int | None = None, batch_dim: int | None = None, **kwargs: Any
) -> LayerReport:
    """Find the layers of a network at which its whole state can be mixed.

    Runs one forward pass in the mode the model is in, and takes back what it changed: buffers (statistics of batch
    normalisation), and the states of the random generators.

    Args:
        model: the network. A LightningModule without ``forward`` runs its ``training_step`` instead, on a copy that
            shares the parameters, logs nowhere and steps no optimizer.
        *inputs: what to call it with: an example batch of at least two samples. A mapping (the batch of a tokenizer) is
            handed to a network that takes its entries by name. For a ``training_step``, a whole batch.
        batch_size: the number of samples. By default the first size of the first input; of a batch for a
            ``training_step``, the number of its targets.
        batch_dim: the dimension of layers' outputs that runs over samples. By default 0 if its size is right, else 1
            for tensors of three dimensions or more.
        **kwargs: further arguments for the call.

    Returns:
        A report with a row for every layer, the eligible ones and the default choice.

    Raises:
        ValueError: if a ``training_step`` has to run, and the target of the batch is not clear.
        NoGhostError: if it has to, and the module cannot be copied.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> report = eligible_layers(net, torch.randn(5, 4))
        >>> report.eligible
        ['input', '0', '1', '2', '3']
        >>> report.default
        ['input', '1']
        >>> print(report.refusal("4"))
        '4' gives the final output: no weights follow it. Valid before it: '3'.
    """
    with isolated(model), torch.enable_grad():
        if not has_forward(model):
            return _of_training_step(ghost_of(model), batch_of_ghosts(inputs[0]), batch_size, batch_dim)
        if batch_size is None and len(inputs) == 1:
            batch_size = getattr(inputs[0], "num_graphs", None)  # of torch_geometric, whose rows are nodes
        if len(inputs) == 1 and isinstance(inputs[0], Mapping):
            named = _arguments(model, inputs[0])
            inputs, kwargs = ((), {**named, **kwargs}) if named else (inputs, kwargs)
        # On the module itself, for its forward may be a function that knows no copy.
        with _same_buffers(model):
            with observe(model, (inputs, kwargs), batch_size=batch_size, batch_dim=batch_dim) as seen:
                outputs = model(*inputs, **kwargs)
            return seen.report(outputs)


def has_forward(model: nn.Module) -> bool:
    """Whether a module has a forward pass of its own; a LightningModule may do without.

    Args:
        model: any module, not run.

    Example:
        >>> has_forward(nn.Linear(2, 2))
        True
    """
    return type(model).forward.__qualname__ != "LightningModule.forward"  # in either package that Lightning comes in


def _of_training_step(model: Any, batch: Any, batch_size: int | None, batch_dim: int | None) -> LayerReport:
    places = Keys().locate(batch, batch_dim)
    inputs = list(batches.without(batch, [*places.targets, *places.masks]))
    two = is_param_in_hook_signature(model.training_step, "batch_idx", min_args=2)  # the question that Lightning asks
    arguments = (batch, 0) if two else (batch,)
    n = places.samples(batch) if batch_size is None else batch_size
    with observe(model, inputs, places.targets_of(batch), batch_size=n, batch_dim=batch_dim) as seen:
        output = model.training_step(*arguments)
    report = seen.report()
    return report if report.sinks_found else seen.report(output)


def _arguments(model: nn.Module, batch: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the entries of a batch that a network takes by name; none if it takes the batch as it is."""
    parameters = inspect.signature(model.forward).parameters.values()
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if any(p.kind is p.VAR_KEYWORD for p in parameters) and not named:
        return dict(batch)
    return {name: batch[name] for name in named if name in batch}


@contextmanager
def _same_buffers(model: nn.Module) -> Iterator[None]:
    """Undo changes to buffers."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
