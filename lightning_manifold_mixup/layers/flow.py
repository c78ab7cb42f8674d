"""Which content flows where: a record of one forward pass, written while it runs.

The record is a graph of small integers. Node 0 is the input. Every operation that reads content makes a node, whose
predecessors are the nodes of what it read. *Content* is a tensor of floating point (or complex) numbers that comes from
the input: a float input itself, or what integer inputs look up in a parameter. Integers and booleans that come from the
input (masks, lengths, positions) are *controls*: they decide what is done with content and are not mixed themselves.

The record watches calls of ``torch.*`` functions and not of kernels, because kernels do not see the Python object of a
tensor. A mixing hook replaces one such object, the layer's output; other objects with the same memory stay unmixed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakIdKeyDictionary
from typing_extensions import override

from lightning_manifold_mixup._step.check.recording import Read, Recording, function_name, read_of, version_of

SOURCE = 0
"""The node that stands for the whole input of the network."""


class Flow(Recording):
    """The record of a forward pass. It changes nothing: every operation gives what it gives without the record.

    Attributes:
        predecessors: for each node the nodes it was computed from. Nodes are numbered in the order of computation, so
            this is a topological order.
        weighted: for each node, whether its operation also read a parameter of two or more dimensions.
        exchanged: for each node, whether its operation moved rows to each other by indices of the batch, such as the
            edges of a graph.
        comparisons: nodes whose operation read both content that carries a gradient and something derived from the
            targets, with that content.
        comparisons_without_gradient: the same for content that carries no gradient (metrics, soft labels, the inside of
            a custom function).
        losses: those of both whose result is a single number.
    """

    def __init__(self) -> None:
        super().__init__()
        self.predecessors: list[tuple[int, ...]] = [()]
        self.weighted: list[bool] = [False]
        self.exchanged: list[bool] = [False]
        self.comparisons: dict[int, tuple[int, ...]] = {}
        self.comparisons_without_gradient: dict[int, tuple[int, ...]] = {}
        self.losses: set[int] = set()
        # Content, by tensor object, with the version of its memory when the node was made.
        self._nodes: Any = WeakIdKeyDictionary()
        # The same by grad_fn, to find what went into kernels that are no torch functions (CUDA extensions, Triton).
        self._behind_grad: dict[Any, tuple[tuple[int, ...], bool]] = {}
        # By memory: the content that was written last; parameters, with their number of dimensions; what comes from the
        # targets; and controls, with the content that they were made from.
        self._latest: dict[int, int] = {}
        self._ndims: dict[int, int] = {}
        self._targets: set[int] = set()
        self._controls: dict[int, tuple[int, ...]] = {}
        self._state: set[int] = set()
        # Weak references: they keep the address of a storage from being used again, and do not keep its memory.
        self._storages: dict[int, StorageWeakRef] = {}
        self._without_storage: Any = WeakIdKeyDictionary()
        self._counter = count(-1, -1)

    def add_input(self, tensor: Tensor) -> int | None:
        """Make a tensor part of the input; return its node if it is content."""
        key = self._key(tensor)
        if not _is_content(tensor):
            self._controls[key] = (SOURCE,)
            return None
        self._latest[key] = self._new((SOURCE,), weighted=False)
        return self._latest[key]

    def add_target(self, tensor: Tensor) -> None:
        """Make a tensor part of the targets. It may be part of the input too (an autoencoder's)."""
        self._targets.add(self._key(tensor))

    def add_state(self, parameters: Iterable[Tensor | None], buffers: Iterable[Tensor | None]) -> None:
        """Register a module's parameters and buffers. The record leaves out what is written into them."""
        for parameter in parameters:
            if parameter is not None:
                key = self._key(parameter)
                self._state.add(key)
                self._ndims[key] = max(self._ndims.get(key, 1), parameter.ndim)
        self._state.update(self._key(buffer) for buffer in buffers if buffer is not None)

    def node(self, tensor: Tensor) -> int | None:
        """Return the node of a tensor, or None if it holds no content."""
        return self._find(read_of(tensor)) if _is_content(tensor) else None

    def mark(self, tensor: Tensor) -> tuple[Tensor, int] | None:
        """Make a second tensor object of a tensor, with a node of its own.

        Returns:
            The new object, which has the same memory and takes the place of the old one, and its node; None if the
            tensor holds no content.
        """
        node = self.node(tensor)
        if node is None or tensor.layout != torch.strided or tensor.is_nested or is_transformed(tensor):
            return None
        if not tensor.requires_grad:
            alias = tensor.detach()
        elif torch.is_grad_enabled():
            # A view: unlike a copy it takes no memory, and autograd follows operations in place on it.
            alias = torch.ops.aten.alias.default(tensor)
        else:
            return None  # an alias made under no_grad requires no gradient, and the tensor may need one later
        mark = self._new((node,), weighted=False)
        self._enter(alias, mark)
        return alias, mark

    @override
    def record(
        self, func: Any, args: Any, kwargs: Any, reads: Sequence[Read], made: list[Tensor], written: list[Tensor]
    ) -> None:
        results = made + [tensor for tensor in written if self._key(tensor) not in self._state]
        if not results:
            return
        content: dict[int, None] = {}
        carrying: dict[int, None] = {}
        origins: dict[int, None] = {}
        targeted = False
        weight = 0
        for read in reads:
            key = self._key(read.tensor)
            if key in self._ndims:
                # A single number computed from weights, such as their norm, does not count as a weight.
                weight = max(weight, self._ndims[key] if read.tensor.ndim else 1)
            elif _is_content(read.tensor) and (node := self._find(read)) is not None:
                content[node] = None
                if read.requires_grad:
                    carrying[node] = None
            origins.update(dict.fromkeys(self._controls.get(key, ())))
            targeted = targeted or key in self._targets
        looked_up = bool(origins) and weight > 0
        if not (content or origins or targeted or weight):
            return
        node = None
        for tensor in results:
            key = self._key(tensor)
            if _is_content(tensor) and (content or looked_up):
                if node is None:
                    node = self._new(content or origins, weighted=weight >= 2)
                    self.exchanged[node] = self._exchanges_rows(function_name(func), args, kwargs)
                self._enter(tensor, node)
            elif content or origins:
                self._controls[key] = tuple(content | origins)
            elif weight and _is_content(tensor):
                self._ndims[key] = weight
            if targeted and carrying:
                self._targets.discard(key)
            elif targeted:
                self._targets.add(key)
        if targeted and node is not None and content:
            (self.comparisons if carrying else self.comparisons_without_gradient)[node] = tuple(carrying or content)
            if all(tensor.ndim == 0 for tensor in results):
                self.losses.add(node)

    def _exchanges_rows(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether rows are gathered or summed by indices from the batch that do more than reorder them."""
        first = args[0] if args else None
        if not isinstance(first, Tensor) or not first.ndim:
            return False
        if name == "__getitem__":
            dim: Any = 0
            index = args[1][0] if isinstance(args[1], tuple) and args[1] else args[1]
        elif name.startswith(("index_", "scatter", "gather")):
            dim = args[1] if len(args) > 1 else kwargs.get("dim")
            index = args[2] if len(args) > 2 else kwargs.get("index")
        else:
            return False
        if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32) or not isinstance(dim, int):
            return False
        if dim % first.ndim or set(self._controls.get(self._key(index), (None,))) != {SOURCE}:
            return False
        reorders = index.ndim == 1 and len(index) == len(first) == len(torch.unique(index))
        return not reorders

    def _new(self, predecessors: Iterable[int], weighted: bool) -> int:
        self.predecessors.append(tuple(dict.fromkeys(predecessors)))
        self.weighted.append(weighted)
        self.exchanged.append(False)
        return len(self.predecessors) - 1

    def _enter(self, tensor: Tensor, node: int) -> None:
        self._nodes[tensor] = node, version_of(tensor)
        self._latest[self._key(tensor)] = node
        if tensor.grad_fn is not None:
            self._behind_grad[tensor.grad_fn] = (node,), False

    def _find(self, read: Read) -> int | None:
        tensor, version, grad_fn, _ = read
        key = self._key(tensor)
        node, seen_version = self._nodes.get(tensor, (None, version))
        unknown_grad = grad_fn is not None and grad_fn not in self._behind_grad
        # It was made from the targets and now carries a gradient: a custom autograd function has returned it.
        is_loss = key in self._targets and unknown_grad
        if node is not None and version == seen_version and not is_loss:
            return int(node)
        predecessors = [] if node is None else [node]
        if (node is None or version != seen_version) and key in self._latest:
            predecessors.append(self._latest[key])
        weighted = False
        if unknown_grad or (node is None and grad_fn is not None):
            behind, weighted = self._behind(grad_fn)
            predecessors += behind
        if not predecessors:
            return None
        node = self._new(predecessors, weighted)
        if is_loss:
            self.comparisons[node] = behind
            self.losses.update([node] if tensor.ndim == 0 else [])
            self._targets.discard(key)
        self._nodes[tensor] = node, version
        if grad_fn is not None:
            self._behind_grad[grad_fn] = (node,), False
        return node

    def _behind(self, grad_fn: Any) -> tuple[tuple[int, ...], bool]:
        """Find the nearest content that autograd knows behind ``grad_fn``, and whether a weight lies before that."""
        nodes: dict[int, None] = {}
        weighted = False
        stack, seen = [grad_fn], set()
        while stack:
            function = stack.pop()
            if function in seen:
                continue
            seen.add(function)
            if function in self._behind_grad:
                known, heavy = self._behind_grad[function]
                nodes.update(dict.fromkeys(known))
                weighted = weighted or heavy
            elif type(function).__name__ == "AccumulateGrad":
                leaf = function.variable
                if self._key(leaf) in self._latest:
                    nodes[self._latest[self._key(leaf)]] = None
                else:
                    weighted = weighted or leaf.ndim >= 2
            else:
                stack.extend(following for following, _ in function.next_functions if following is not None)
        self._behind_grad[grad_fn] = tuple(nodes), weighted
        return tuple(nodes), weighted

    def _key(self, tensor: Tensor) -> int:
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # sparse tensors, and tensors inside torch.func transforms
            if tensor not in self._without_storage:
                self._without_storage[tensor] = next(self._counter)
            return int(self._without_storage[tensor])
        key: int = storage._cdata
        if key not in self._storages:
            self._storages[key] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        return key


def is_transformed(tensor: Tensor) -> bool:
    """Whether a tensor belongs to a running transform such as ``torch.vmap``: it does not know its own gradient."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _is_content(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
