"""The forward hook that mixes the output of a layer, and when it does."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from lightning_manifold_mixup._step.check.modes import nodes_made
from lightning_manifold_mixup._step.labels.targets import MixingError
from lightning_manifold_mixup._step.mix.dims import batch_dims
from lightning_manifold_mixup._step.mix.interpolation import differentiable
from lightning_manifold_mixup._step.mix.switches import is_unmixed

if TYPE_CHECKING:
    from lightning_manifold_mixup.mixing import Mix


class MixingHook:
    """Forward hook that mixes the output of its module while it holds a draw.

    It may stay registered: torch.compile then sees the same hook each time, and compiles one graph for each layer that
    is armed. A copy of the module (EMA, ``copy.deepcopy``) gets a hook that does nothing.

    Attributes:
        mixes: the draw to apply, one for each group of samples that passes the layer; empty lets every state through.
        calls: how many states have been mixed since the hook was armed.
        nodes: how many nodes of the autograd graph that has taken.
        in_eval: whether all forward passes are mixed: also those in eval mode, and clean ones (``with unmixed():``).
    """

    def __init__(self, batch_dim: int | None = None, dims: Sequence[int | None] | None = None) -> None:
        self.batch_dim = batch_dim
        # Found at the first batch, because a later one may have as many samples as time steps. None: not mixed.
        self.dims: Sequence[int | None] | None = dims
        self.mixes: tuple[Mix, ...] = ()
        self.calls = 0
        self.nodes = 0
        self.in_eval = False

    def arm(self, mixes: tuple[Mix, ...]) -> None:
        """Mix by these draws from now on."""
        self.mixes = mixes
        self.calls = self.nodes = 0

    def disarm(self) -> None:
        """Let every state through."""
        self.mixes = ()

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Return the mixed output, or None to leave it as it is."""
        if not self.mixes:
            return None
        wanted = self.in_eval or (module.training and not is_unmixed())
        if not wanted or not (torch.is_grad_enabled() or is_training_forward()):
            return None
        if len(self.mixes) > 1:
            _check_order(module)
        mix = self.mixes[self.calls % len(self.mixes)]
        self.calls += 1
        if torch.compiler.is_compiling():
            return self._mixed(module, mix, output)
        # As a rule: one tensor. Its way is the shortest, since with small states the time goes into Python.
        dim = self.dims[0] if self.dims and type(output) is Tensor and output.requires_grad else None
        before = nodes_made()
        if dim is not None and output.ndim > dim and output.shape[dim] == mix.partners.shape[0]:
            how = mix.lam, mix.partners, dim
            mixed = differentiable(output, *how, permutation=mix.permutation, number=mix.number)
        else:
            mixed = self._mixed(module, mix, output)
        self.nodes += nodes_made() - before
        return mixed

    def _mixed(self, module: nn.Module, mix: Mix, output: Any) -> Any:
        # Not ``mix(output)``: torch.compile of torch 2.6 would make a new graph for each object that is called.
        if isinstance(module, nn.RNNBase):  # its states have the batch in dimension 1, whatever their sizes are
            sequence, states = output
            return mix.__call__(sequence, 0 if module.batch_first else 1), mix.__call__(states, 1)
        if self.dims is None and len(mix.partners) > 1:
            self.dims = batch_dims(output, len(mix.partners), self.batch_dim)
        return mix.__call__(output, self.dims if self.dims is not None else self.batch_dim)

    def __deepcopy__(self, memo: dict[int, Any]) -> MixingHook:
        return MixingHook(self.batch_dim, self.dims)

    def __getstate__(self) -> dict[str, Any]:
        return vars(MixingHook(self.batch_dim, self.dims))


def _check_order(module: nn.Module) -> None:
    """Refuse a layer for several parts of a batch that an activation checkpoint calls again, in backward."""
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        raise MixingError(
            "Expected a layer that is called once for each part of the batch, got one that the backward pass calls "
            f"again ({type(module).__name__}, inside an activation checkpoint): it cannot tell the parts apart. "
            "Take it out of `layers`; layers around the checkpoint can be mixed. No weight has changed in this step."
        )


def is_training_forward() -> bool:
    """Whether the forward pass that is running will be back-propagated through.

    True if gradients are enabled, and inside a reentrant activation checkpoint: it runs its first forward under
    ``no_grad``, and the one with gradients only in backward.

    Example:
        >>> with torch.no_grad():
        ...     is_training_forward()
        False
    """
    if torch.is_grad_enabled():
        return True
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return False
    frame = sys._getframe()
    while frame := frame.f_back:  # type: ignore[assignment]
        if frame.f_code is CheckpointFunction.forward.__code__:
            # Reentrant checkpoints are differentiated through their tensor arguments alone.
            return any(isinstance(a, Tensor) and a.requires_grad for a in frame.f_locals["args"])
    return False


class TargetHook(MixingHook):
    """Mixes what a module returns as a target, a teacher for instance, also without gradients and in eval mode."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Return the mixed output, or None to leave it as it is."""
        if not self.mixes:
            return None
        mix = self.mixes[self.calls % len(self.mixes)]
        self.calls += 1
        return mix(output, self.batch_dim)

    def __deepcopy__(self, memo: dict[int, Any]) -> TargetHook:
        return TargetHook(self.batch_dim)


def remember_original(mixed: Tensor, original: Tensor) -> Tensor:
    """Let ``hand_plain_inputs`` find the plain tensor of an input that is a target, too."""
    mixed._manifold_original = original  # type: ignore[attr-defined]
    return mixed


def hand_plain_inputs(module: nn.Module, stack: ExitStack) -> None:
    """Hand the plain input to the modules of a network whose loss reads the mixed one as a target (reconstruction)."""

    def plain_inputs(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return apply_to_collection(args, Tensor, _original), apply_to_collection(kwargs, Tensor, _original)

    for part in module.modules():
        if any(True for _ in part.parameters()):
            stack.callback(part.register_forward_pre_hook(plain_inputs, with_kwargs=True).remove)


def _original(tensor: Tensor) -> Tensor:
    base = tensor if tensor._base is None else tensor._base
    original: Tensor | None = getattr(base, "_manifold_original", None)
    if original is None:
        return tensor
    return original if base is tensor else original.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
