"""Where inputs, targets and masks are in batches that are built alike. A lookup takes about a microsecond."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_manifold_mixup._step.batch import tree as batches
from lightning_manifold_mixup._step.batch.tree import Key


@dataclass(frozen=True)
class Group:
    """Samples that are mixed among each other; a batch of several loaders has one group for each.

    Attributes:
        inputs: keys of the inputs.
        targets: keys of the targets.
        masks: keys of the attention masks.
    """

    inputs: tuple[Key, ...]
    targets: tuple[Key, ...]
    masks: tuple[Key, ...]


@dataclass(frozen=True)
class Places:
    """Where everything is in batches that are built alike. Made by ``Keys.locate``.

    Attributes:
        inputs: keys of the inputs; empty if they were not found (``require_inputs`` says why).
        targets: keys of the targets.
        masks: keys of the attention masks.
        groups: the samples that are mixed among each other; usually one group.
        target_dim: the dimension of the targets that counts the samples: 0, or ``batch_dim`` for time-major ones.
        row_mask: key of the (n,) bool mask that says which samples are trained on, if there is one.
        input_problem: why the inputs are not clear; None if they are.
    """

    inputs: tuple[Key, ...]
    targets: tuple[Key, ...]
    masks: tuple[Key, ...]
    groups: tuple[Group, ...]
    target_dim: int = 0
    row_mask: Key | None = None
    input_problem: str | None = None
    _paths: Mapping[Key, tuple[Any, ...]] = field(default_factory=dict, repr=False)
    _getters: Mapping[Key, Callable[[Any], Any]] = field(default_factory=dict, repr=False)

    def require_inputs(self) -> list[Key]:
        """Return the keys of the inputs, for mixing at the input.

        Raises:
            ValueError: if they were not found, or if other tensors may be inputs, too: mixing only some of them would
                mix a part of the state.
        """
        if self.input_problem is not None:
            raise ValueError(self.input_problem)
        return list(self.inputs)

    @cached_property
    def shared(self) -> list[Key]:
        """Keys that are input and target at once: right at the input, impossible at hidden layers."""
        paths = {self._paths[key] for key in self.inputs}
        return [key for key in self.targets if self._paths[key] in paths]

    @cached_property
    def mixed(self) -> frozenset[str]:
        """The keys of targets and masks, which are mixed wherever the states are; as texts."""
        return frozenset(map(str, (*self.targets, *self.masks)))

    def of(self, batch: Any, key: Key) -> Any:
        """Return the part of a batch at one of the keys found."""
        return self._getters[key](batch)

    def targets_of(self, batch: Any) -> list[Any]:
        """Return the targets of a batch, in the order of their keys."""
        return [self._getters[key](batch) for key in self.targets]

    def sample_of(self, batch: Any, group: int = 0) -> Tensor:
        """Return a target tensor of a group, from which the number of samples and the device are known."""
        value = self._getters[self.groups[group].targets[0]](batch)
        return value if isinstance(value, Tensor) else next(batches.tensors(value))

    def samples(self, batch: Any, group: int = 0) -> int:
        """Return the number of samples of a group."""
        sample = self.sample_of(batch, group)
        return sample.shape[self.target_dim if sample.ndim > self.target_dim else 0]

    def sizes(self, batch: Any) -> list[int]:
        """Return the number of samples of each group."""
        return [self.samples(batch, group) for group in range(len(self.groups))]

    def rows_of(self, batch: Any) -> Tensor | None:
        """Return which samples are trained on, (n,) bool; None if all are, as far as the batch says.

        The nodes of a graph have a mask for it (``train_mask``). In the batches of torch_geometric's NeighborLoader,
        the first ``batch_size`` nodes are trained on. Partners are drawn among these only, so that no label of another
        node gets into the loss.
        """
        if self.row_mask is not None:
            mask: Tensor = self._getters[self.row_mask](batch)
            return mask
        seeds = getattr(batch, "batch_size", None) if hasattr(batch, "n_id") else None
        if not isinstance(seeds, int) or seeds >= self.samples(batch):
            return None
        sample = self.sample_of(batch)
        return torch.arange(len(sample), device=sample.device) < seeds

    def replace(self, batch: Any, values: Mapping[Key, Any]) -> Any:
        """Return a batch of the same type with other values at some of the keys found; the batch itself stays."""
        return batches.substituted(batch, {self._paths[key]: value for key, value in values.items()})
