"""The arithmetic of Manifold Mixup, ``lam * h + (1 - lam) * h[partners]``, as fast as the memory allows."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

# What PyTorch hands to one thread, at least. A row of this many elements for each thread is worth a call of its own.
_GRAIN = 1 << 15


def interpolate(h: Tensor, lam: Tensor, partners: Tensor, dim: int = 0, transposed: bool = False) -> Tensor:
    """``lam * h + (1 - lam) * h.index_select(dim, partners)``, without gradients.

    No temporary of h's size; one pass over the memory on CUDA, and on large states everywhere. Rounded once, from the
    wider of h's dtype and float32. Waits for no device: ``lam`` is only read on the host if it is there.

    Args:
        h: floating point tensor of any shape and strides; the result has its order of strides (channels_last stays).
        lam: 0-d float32 tensor, on the device of ``h`` or on the host.
        partners: (n,) int64 tensor, n the size of dimension ``dim``; best on the device of ``h``.
        dim: the dimension that counts the samples.
        transposed: compute the transpose of that linear map, which is its gradient: sample ``partners[i]``, not i,
            receives ``lam * h[partners[i]] + (1 - lam) * h[i]``. Each sample is written once: deterministic.

    Example:
        >>> interpolate(torch.tensor([0.0, 4.0]), torch.tensor(0.75), torch.tensor([1, 0]))
        tensor([1., 3.])
    """
    partners = partners.to(h.device, non_blocking=True)
    if torch.compiler.is_compiling() or type(h) is not Tensor:  # inductor fuses these; a DTensor has rules for them
        return _plain(h, lam, partners, dim, transposed)
    if h.is_contiguous():
        return _contiguous(h, lam, partners, dim, transposed)
    # With its dimensions in the order in which they lie in memory, any dense state is contiguous.
    order = sorted(range(h.ndim), key=h.stride, reverse=True)
    mixed = _contiguous(h.permute(order), lam, partners, order.index(dim % h.ndim), transposed)
    return mixed.permute([order.index(d) for d in range(h.ndim)])


def _contiguous(h: Tensor, lam: Tensor, partners: Tensor, dim: int, transposed: bool) -> Tensor:
    if h.device.type == "cpu":
        return _on_cpu(h, lam, partners, dim, transposed)
    if h.device.type == "cuda" and (kernel := _kernel(h.device)):
        return kernel(h, lam, partners, dim, transposed)
    return _plain(h, lam, partners, dim, transposed)


def _plain(h: Tensor, lam: Tensor, partners: Tensor, dim: int, transposed: bool) -> Tensor:
    dtype = torch.promote_types(h.dtype, lam.dtype)
    partner = h.index_select(dim, partners.argsort() if transposed else partners)
    return torch.lerp(partner.to(dtype), h.to(dtype), lam.to(h.device, dtype, non_blocking=True)).to(h.dtype)


def _on_cpu(h: Tensor, lam: Tensor, partners: Tensor, dim: int, transposed: bool) -> Tensor:
    # With a number, half precision is mixed in float32. A tensor is handed over faster, which counts, row by row.
    weight: Any = lam.item() if h.dtype.itemsize < lam.dtype.itemsize else lam.to(h)
    # Row by row there is one pass; but a row must be of one piece, keep all threads busy, and repay the call.
    if h.stride(dim) < _GRAIN * torch.get_num_threads():
        return h.index_select(dim, partners.argsort() if transposed else partners).lerp_(h, weight)
    mixed = torch.empty_like(h)
    rows, results, partner_of = h.unbind(dim), mixed.unbind(dim), partners.tolist()
    for i in _along_cycles(partner_of):
        j = partner_of[i]
        if transposed:
            torch.lerp(rows[i], rows[j], weight, out=results[j])
        else:
            torch.lerp(rows[j], rows[i], weight, out=results[i])
    return mixed


def _along_cycles(partners: list[int]) -> list[int]:
    """All samples, each before its partner: the partner's row is in the cache when its own turn comes."""
    order: list[int] = []
    seen = [False] * len(partners)
    for i in range(len(partners)):
        while not seen[i]:
            seen[i] = True
            order.append(i)
            i = partners[i]
    return order


@cache
def _kernel(device: torch.device) -> Callable[..., Tensor] | None:
    """The kernel for a CUDA device; None where there is no Triton (Windows, macOS), or none that works.

    It is tried on two numbers first: Triton needs a C compiler, and not every GPU will do.
    """
    try:
        from lightning_manifold_mixup._step.kernels import interpolate as kernel
    except ImportError:
        return None
    try:
        kernel(torch.zeros(2, device=device), torch.tensor(0.5), torch.arange(2, device=device), 0, False)
    except Exception as error:
        warnings.warn(
            f"Triton fails here ({type(error).__name__}: {error}), so Manifold Mixup mixes by two operations of "
            "PyTorch's, which takes about twice as long. Triton needs a C compiler (`CC`).",
            stacklevel=2,
        )
        return None
    return kernel
