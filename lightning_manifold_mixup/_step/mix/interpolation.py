"""The arithmetic of Manifold Mixup, ``lam * h + (1 - lam) * h[partners]``, as fast as the memory allows."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

# The fewest elements that PyTorch gives to one thread, in float32. A row with so many for each is worth its own call.
ROW_BYTES = 4 << 15
# Up to as many elements, the operations of PyTorch with their own gradients take less time than a Function in Python.
SMALL = 1 << 14
# Devices whose numbers the host reads without waiting.
HOSTS = {"cpu"}


class Interpolate(torch.autograd.Function):
    """``lam * h + (1 - lam) * h[partners]`` along ``dim``. Linear in h, so no activation is kept for backward.

    The transpose of that map gives sample j lam times its own gradient, and 1 - lam times the gradient of each sample
    whose partner it is. If partners are a permutation, that is the map of the inverse permutation, and backward writes
    each sample once, too. Otherwise backward sums, always in the same order.
    """

    # For small states most of the time is spent here, not in the arithmetic. So this is not the newer form with
    # ``setup_context``, which binds the arguments by the signature at each call. All that has no gradient is one
    # argument, kept without ``save_for_backward``, whose checks are for activations. Backward is recorded only for a
    # second derivative.
    @staticmethod
    def forward(ctx: Any, h: Tensor, how: tuple[Tensor, Tensor, int, bool, bool]) -> Tensor:
        """Compute ``interpolate`` in the way ``how``."""
        ctx.how = lam, partners, dim, transposed, permutation = how
        return interpolate(h, lam, partners, dim, transposed=transposed, permutation=permutation)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Apply the transpose of the map in forward."""
        lam, partners, dim, transposed, permutation = ctx.how
        if torch.is_grad_enabled():
            return Interpolate.apply(gradient, (lam, partners, dim, not transposed, permutation)), None
        return interpolate(gradient, lam, partners, dim, transposed=not transposed, permutation=permutation), None


def differentiable(
    h: Tensor, lam: Tensor, partners: Tensor, dim: int, *, permutation: bool, number: float | None
) -> Tensor:
    """Compute ``interpolate`` with gradient, in the way that is faster; ``number`` is lam where the host knows it."""
    small = h.numel() <= SMALL and h.dtype.itemsize >= 4 and h.is_contiguous() and h.device.type in HOSTS
    if number is not None and small:
        return torch.lerp(h.index_select(dim, partners), h, number)
    if not (h.requires_grad and torch.is_grad_enabled()):
        return interpolate(h, lam, partners, dim, permutation=permutation)
    return Interpolate.apply(h, (lam, partners, dim, False, permutation))  # type: ignore[no-any-return]


def interpolate(
    h: Tensor, lam: Tensor, partners: Tensor, dim: int = 0, *, transposed: bool = False, permutation: bool = False
) -> Tensor:
    """Compute ``lam * h + (1 - lam) * h.index_select(dim, partners)``, without gradients.

    With one lam and a permutation, no temporary of h's size, and one pass over the memory on CUDA, and on large states
    everywhere. Rounded once, from the wider of h's dtype and float32. Deterministic. Waits for no device: ``lam`` is
    only read on the host if it is there.

    Args:
        h: floating point tensor of any shape and strides; the result has its order of strides (channels_last stays).
        lam: 0-d tensor, or (n,) with one lam for each sample, float32 or float64, on the device of ``h`` or on the
            host.
        partners: (n,) int64 tensor, n the size of dimension ``dim``; best on the device of ``h``.
        dim: the dimension that counts the samples.
        transposed: compute the transpose of that linear map, which is its gradient: sample j receives
            ``lam[j] * h[j]`` plus ``(1 - lam[i]) * h[i]`` of every sample i whose partner is j.
        permutation: a promise that no sample is the partner of two; the transposed map is faster then.

    Example:
        >>> interpolate(torch.tensor([0.0, 4.0]), torch.tensor(0.75), torch.tensor([1, 0]))
        tensor([1., 3.])
        >>> interpolate(torch.tensor([0.0, 4.0]), torch.tensor(0.75), torch.tensor([0, 0]), transposed=True)
        tensor([1., 3.])
    """
    if partners.device != h.device:
        partners = partners.to(h.device, non_blocking=h.is_cuda)
    if torch.compiler.is_compiling() or type(h) is not Tensor:  # inductor fuses these; a DTensor has rules for them
        return by_operations(h, lam, partners, dim, transposed=transposed, permutation=permutation)
    order = None
    if not h.is_contiguous():  # with its dimensions in the order in which they lie in memory, any dense state is
        order = sorted(range(h.ndim), key=h.stride, reverse=True)
        h, dim = h.permute(order), order.index(dim % h.ndim)
    # With one lam the transpose of a permutation is a torch.lerp like the map itself. Where samples are left out or
    # repeated, it sums. In half precision torch.lerp takes a number in float32, but rounds a tensor of lams.
    lerp = permutation or not transposed
    if lerp and h.device.type in HOSTS and (not lam.ndim or not (transposed or h.dtype.itemsize < lam.dtype.itemsize)):
        # Row by row takes one pass, but each row must be contiguous, keep all threads busy and be worth a call: in half
        # precision it holds half as much.
        if h.stride(dim) * min(h.dtype.itemsize, 4) >= ROW_BYTES * torch.get_num_threads():
            mixed = row_by_row(h, lam, partners, dim, transposed=transposed)
        else:
            partner = h.index_select(dim, partners.argsort() if transposed else partners)
            weight: Any = lam.item() if h.dtype.itemsize < lam.dtype.itemsize else lam.to(h)
            mixed = partner.lerp_(h, _along(dim, weight, h) if lam.ndim else weight)
    elif lerp and h.device.type == "cuda" and (kernel := kernel_for(h.device)):
        mixed = kernel(h, lam, partners, dim, transposed=transposed)
    else:
        mixed = by_operations(h, lam, partners, dim, transposed=transposed, permutation=permutation)
    return mixed if order is None else mixed.permute([order.index(d) for d in range(h.ndim)])


def by_operations(h: Tensor, lam: Tensor, partners: Tensor, dim: int, *, transposed: bool, permutation: bool) -> Tensor:
    """Compute ``interpolate`` by operations of PyTorch that make their results anew; for compilers and all devices."""
    dtype = torch.promote_types(h.dtype, lam.dtype)
    weight = _along(dim, lam.to(h.device, dtype, non_blocking=h.is_cuda), h)
    if transposed and not (permutation and lam.ndim == 0):
        wide = h.to(dtype)
        return _add_rows(weight * wide, (1 - weight) * wide, partners, dim).to(h.dtype)
    partner = h.index_select(dim, partners.argsort() if transposed else partners)
    return torch.lerp(partner.to(dtype), h.to(dtype), weight).to(h.dtype)


def _along(dim: int, lam: Tensor, h: Tensor) -> Tensor:
    """Give ``lam`` a shape that broadcasts along dimension ``dim`` of ``h``, whatever its other sizes are."""
    if lam.ndim == 0:
        return lam
    return lam.reshape([-1 if d == dim % h.ndim else 1 for d in range(h.ndim)])


def _add_rows(sums: Tensor, rows: Tensor, targets: Tensor, dim: int) -> Tensor:
    """Add row i to row ``targets[i]`` of ``sums``, always in the same order."""
    if sums.device.type == "cuda":  # index_add_ is in order only by ``use_deterministic_algorithms``; this one sorts
        sums.movedim(dim, 0).index_put_((targets,), rows.movedim(dim, 0), accumulate=True)
        return sums
    return sums.index_add_(dim, targets, rows)  # on CPUs, index_put_ may take another order


def row_by_row(h: Tensor, lam: Tensor, partners: Tensor, dim: int, *, transposed: bool) -> Tensor:
    """Compute ``interpolate`` for large states on the host, one sample at a time."""
    # With a number, half precision is mixed in float32. A tensor is handed over faster, which counts here.
    weight: Any = lam.item() if h.dtype.itemsize < lam.dtype.itemsize else lam.to(h)
    mixed = torch.empty_like(h)
    rows, results, partner_of = h.unbind(dim), mixed.unbind(dim), partners.tolist()
    weights = weight.unbind() if lam.ndim else [weight] * len(rows)
    for i in along_cycles(partner_of):
        j = partner_of[i]
        if transposed:
            torch.lerp(rows[i], rows[j], weights[i], out=results[j])
        else:
            torch.lerp(rows[j], rows[i], weights[i], out=results[i])
    return mixed


def along_cycles(partners: list[int]) -> list[int]:
    """Order all samples so that most come just before their partner, whose row is then still in the cache."""
    order: list[int] = []
    seen = [False] * len(partners)
    for i in range(len(partners)):
        while not seen[i]:
            seen[i] = True
            order.append(i)
            i = partners[i]
    return order


@cache
def kernel_for(device: torch.device) -> Callable[..., Tensor] | None:
    """Return the kernel for a CUDA device; None where there is no Triton (Windows, macOS), or none that works.

    It is tried on two numbers first: Triton needs a C compiler, and does not support every GPU.
    """
    try:
        from lightning_manifold_mixup._step.mix.kernels import interpolate as kernel
    except ImportError:
        return None
    try:
        kernel(torch.zeros(2, device=device), torch.tensor(0.5), torch.arange(2, device=device), 0, transposed=False)
    except Exception as error:
        warnings.warn(
            f"Triton fails here ({type(error).__name__}: {error}), so Manifold Mixup mixes by two operations of "
            "PyTorch's, which takes about twice as long. Triton needs a C compiler (`CC`).",
            stacklevel=2,
        )
        return None
    return kernel
