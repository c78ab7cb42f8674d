"""Manifold Mixup, section 2 of Verma et al., "Manifold Mixup: Better Representations by Interpolating Hidden States".

1. Draw a layer k from the eligible set S.                                     (the caller; see ``callback.py``)
2. Run a minibatch up to layer k: ``h = g_k(x)``.                               (the network)
3. Mix: ``h <- lam * h + (1 - lam) * h[partners]``, likewise the labels,
   with ``lam ~ Beta(alpha, alpha)``.                                          (``Mix``, ``draw_mix``)
4. Go on from layer k to the output.                                           (``mixing``)
5. Take the loss against the mixed labels, and back-propagate.                 (``Mix.target``, ``targets.py``)

Throughout this package **lam is the weight of the original sample**, and ``partners[i]`` is the partner of sample i.
The paper draws one lam for a minibatch, and a permutation of it. One lam for each sample, and partners that repeat or
are left out (``partners.py``), are mixed just as exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf, isfinite
from numbers import Real
from typing import Any, TypeVar

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_manifold_mixup._step.batch.tree import tensors
from lightning_manifold_mixup._step.devices import sent
from lightning_manifold_mixup._step.labels.mixed_target import MixedTarget
from lightning_manifold_mixup._step.labels.targets import MixingError
from lightning_manifold_mixup._step.mix.dims import batch_dims, is_state, wrong_shape
from lightning_manifold_mixup._step.mix.draw_check import check_mix, check_target, number_of
from lightning_manifold_mixup._step.mix.hooks import MixingHook
from lightning_manifold_mixup._step.mix.interpolation import differentiable, interpolate
from lightning_manifold_mixup._step.mix.switches import mixing_opened
from lightning_manifold_mixup._step.mix.switches import unmixed as unmixed

T = TypeVar("T")


class _Known:
    """What is no field of a draw: the compiler of torch 2.6 makes a new graph for another value of any field."""

    permutation: bool
    number: float | None


@dataclass(frozen=True, eq=False)
class Mix(_Known):
    """One draw: how each sample of a minibatch is mixed with its partner.

    Attributes:
        lam: weight of the original sample, a float32 or float64 tensor in [0, 1]: 0-d, or (n,) with one lam for each
            sample.
        partners: (n,) int64 tensor of indices into the batch; ``partners[i]`` is the partner of sample i. A permutation
            is the fastest; a sample may also be the partner of several others, or of none.
        permutation: whether the partners are known not to repeat, which makes the gradient faster.
        number: lam, where there is one and the host knows it without asking a device; else None.

    Raises:
        TypeError: if ``lam`` or ``partners`` is no tensor, or one of another dtype.
        ValueError: for shapes that do not fit, and for values out of range. Values are checked in tensors on the host
            only, where that does not wait for a device.

    Example:
        >>> mix = Mix(lam=torch.tensor(0.75), partners=torch.tensor([1, 0]))
        >>> mix(torch.tensor([[0.0], [4.0]]))
        tensor([[1.],
                [3.]])
    """

    lam: Tensor
    partners: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "permutation", check_mix(self.lam, self.partners))
        object.__setattr__(self, "number", number_of(self.lam))

    @classmethod
    def _checked(cls, lam: Tensor, partners: Tensor, permutation: bool, number: float | None) -> Mix:
        """Return a mix of values that are known to be right."""
        mix = object.__new__(cls)
        vars(mix).update(lam=lam, partners=partners, permutation=permutation, number=number)
        return mix

    def __call__(self, h: T, batch_dim: int | Sequence[int | None] | None = None) -> T:
        """Compute ``lam * h + (1 - lam) * h[partners]`` (section 2, step 3), in the dtype of ``h``.

        The arithmetic is done in the wider of h's dtype and float32. Differentiable any number of times with respect
        to ``h``; the backward pass is deterministic, and keeps no activation.

        Args:
            h: hidden state with n samples: a floating point tensor, or tuples, lists, dicts and dataclasses of them
                (outputs of an LSTM, of a model). Integer tensors and numbers within are left as they are.
            batch_dim: the dimension that counts the samples: one for all tensors, one for each (None for a tensor that
                is not mixed), or None to find them (``batch_dims``). A lam for each sample goes along it.

        Returns:
            The mixed state, in the structure of ``h``.

        Raises:
            MixingError: if a tensor has no batch dimension of size n, or nothing in ``h`` can be mixed.
        """
        n = self.partners.shape[0]
        if batch_dim is None and isinstance(h, Tensor) and is_state(h) and h.shape[0] == n:  # as a rule
            dims: Sequence[int | None] = (0,)
        else:
            dims = batch_dims(h, n, batch_dim) if batch_dim is None or isinstance(batch_dim, int) else batch_dim
        if not isinstance(h, Tensor):
            rest = iter(dims)
            return apply_to_collection(h, Tensor, lambda t: self(t, [next(rest)]) if is_state(t) else t)  # type: ignore[no-any-return]
        dim = dims[0] if is_state(h) else None
        if dim is None:
            return h
        if h.shape[dim] != n:
            raise MixingError(wrong_shape(h, n, f"in dimension {dim}"))
        # A compiler differentiates plain operations itself; torch 2.11 makes the gradient of the Function below zero.
        if torch.compiler.is_compiling():
            return interpolate(h, self.lam, self.partners, dim, permutation=self.permutation)  # type: ignore[return-value]
        how = self.lam, self.partners, dim
        return differentiable(h, *how, permutation=self.permutation, number=self.number)  # type: ignore[return-value]

    def target(self, y: T) -> T:
        """Return the labels of the mixed samples (section 2, step 3).

        Args:
            y: (n, ...) tensor, or a structure of such tensors. Integer and bool labels become a
                ``MixedTarget``, whose losses are exact; a floating point target
                (regression, one-hot, multi-hot, soft labels) becomes the mixed tensor.

        Returns:
            The mixed target, in the structure of ``y``.

        Raises:
            TypeError: for float16, complex and sparse targets, and where there is no tensor.
            ValueError: if a tensor does not hold n samples.
        """

        def mix(labels: Tensor) -> Tensor:
            check_target(labels, len(self.partners))
            if labels.is_floating_point():
                return self(labels, batch_dim=0)
            return MixedTarget(labels, labels[self.partners], self.lam)

        if not isinstance(y, Tensor) and next(tensors(y), None) is None:
            raise TypeError(f"Expected labels in tensors (`torch.tensor(labels)`), got {type(y).__name__}: {y!r:.60}.")
        return mix(y) if isinstance(y, Tensor) else apply_to_collection(y, Tensor, mix)  # type: ignore[return-value]

    def to(self, device: torch.device | str) -> Mix:
        """Return the same draw on another device; the copy does not wait for the device."""
        device = torch.device(device)
        lam, partners = self.lam, self.partners
        if lam.device == partners.device == device:
            return self
        return Mix._checked(sent(lam, device), sent(partners, device), self.permutation, self.number)


@dataclass(frozen=True, eq=False)
class Draw:
    """What was drawn for one batch.

    Attributes:
        layer: name of the layer k after which the states are mixed, relative to the module; ``"input"`` is layer 0.
        mix: how they are mixed.

    Example:
        >>> Draw("model.layer1", Mix(torch.tensor(0.75), torch.tensor([1, 0]))).layer
        'model.layer1'
    """

    layer: str
    mix: Mix


def draw_mix(
    n: int,
    alpha: float | Sequence[float] = 1.0,
    generator: torch.Generator | np.random.Generator | None = None,
    dominant: bool = False,
    partners: Tensor | None = None,
) -> Mix:
    """Draw lam ~ Beta(alpha, alpha) and a uniform permutation of n samples (section 2).

    Args:
        n: number of samples in the minibatch.
        alpha: parameter of the Beta distribution, > 0; 1 gives U(0, 1), larger values concentrate lam at 1/2. The paper
            uses 2 for CIFAR and SVHN, 0.2 for Tiny-ImageNet. 0 is the limit: lam is 1 and nothing is mixed. A pair
            (a, b) gives Beta(a, b), whose mean is a / (a + b).
        generator: where the randomness comes from. A torch generator is advanced by one draw; None uses torch's global
            one.
        dominant: fold lam to max(lam, 1 - lam), so that the original sample weighs at least as much as its partner.
        partners: (n,) int64 tensor, chosen for instance by a strategy of ``partners.py``, in place of the permutation.

    Raises:
        ValueError: for an alpha that is negative or not finite, for a pair with zeros, and for partners that are not n
            indices into the batch.

    Example:
        >>> mix = draw_mix(4, alpha=2.0, generator=torch.Generator().manual_seed(0))
        >>> sorted(mix.partners.tolist()), bool(0 <= mix.lam <= 1)
        ([0, 1, 2, 3], True)
    """
    check_alpha(alpha)
    if not isinstance(generator, np.random.Generator):
        device = "cpu" if generator is None else generator.device
        seed = torch.randint(2**63 - 1, (), generator=generator, device=device)
        generator = np.random.default_rng(int(seed))
    a, b = (alpha, alpha) if isinstance(alpha, (int, float)) else alpha
    weight = generator.beta(a, b) if a > 0 else 1.0
    number = float(np.float32(max(weight, 1 - weight) if dominant else weight))
    lam = torch.scalar_tensor(number, dtype=torch.float32)
    if partners is None:
        permutation = torch.from_numpy(generator.permutation(n))
        return Mix._checked(lam, permutation, permutation=True, number=number)
    mix = Mix(lam, partners)
    if len(partners) != n:
        raise ValueError(f"Expected partners of the {n} samples, got {len(partners)}.")
    return mix


def check_alpha(alpha: Any) -> None:
    """Refuse an alpha for which there is no Beta(alpha, alpha), or Beta(a, b) for a pair (tuple, list, ListConfig)."""
    if type(alpha) is float and 0 <= alpha < inf:  # the usual case, checked for each batch
        return
    pair = isinstance(alpha, Sequence) and not isinstance(alpha, str)
    numbers = list(alpha) if pair else [alpha]
    finite = all(isinstance(x, Real) and isfinite(x) for x in numbers)
    if not finite or (len(numbers) != 2 or min(numbers) <= 0 if pair else alpha < 0):
        raise ValueError(
            "Expected alpha to be a finite number >= 0 (0 switches mixing off), or a pair (a, b) of numbers > 0 for "
            f"Beta(a, b), got {alpha!r}."
        )


@contextmanager
def mixing(layer: nn.Module, mix: Mix, batch_dim: int | None = None) -> Iterator[None]:
    """Mix the output of ``layer`` while the context is open (section 2, steps 2 to 4).

    For loops without a Trainer. Forward passes in eval mode or under ``no_grad`` (a teacher) are not mixed. Keep the
    context open during ``backward()`` if the layer is recomputed there (activation checkpointing).

    Args:
        layer: the module after which the hidden states are mixed; take one that no skip connection bypasses
            (``lightning_manifold_mixup.eligible_layers``).
        mix: the draw for this minibatch.
        batch_dim: see ``Mix.__call__``.

    Raises:
        TypeError: if ``layer`` is no module.
        MixingError: on leaving, if ``layer`` mixed nothing.

    Example:
        >>> import torch.nn.functional as F
        >>> model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> x, y = torch.randn(4, 2), torch.tensor([0, 1, 2, 0])
        >>> mix = draw_mix(len(x), alpha=2.0)
        >>> with mixing(model[1], mix):
        ...     logits = model(x)
        >>> loss = F.cross_entropy(logits, mix.target(y))
        >>> loss.backward()
    """
    if not isinstance(layer, nn.Module):
        raise TypeError(f"Expected a layer, an nn.Module, got {layer!r}: `model.get_submodule(name)` finds it by name.")
    hook = MixingHook(batch_dim)
    hook.arm((mix,))
    handle = layer.register_forward_hook(hook)
    try:
        with mixing_opened():
            yield
    finally:
        handle.remove()
    if not hook.calls:
        raise MixingError(
            f"{type(layer).__name__} was not called in training mode with gradients enabled inside `with mixing(...)`, "
            "so no state was mixed. Run the network inside the context, or choose a layer that its forward calls."
        )
