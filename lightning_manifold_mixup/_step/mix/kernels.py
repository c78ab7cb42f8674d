"""The mix on CUDA devices: one kernel, one pass. ``interpolation.py`` has the reference, and chooses between them."""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

# Elements of a row that one program mixes: 16 for each of its 128 threads.
_BLOCK = 2048


def interpolate(h: Tensor, lam: Tensor, partners: Tensor, dim: int, *, transposed: bool) -> Tensor:
    """See ``interpolation.interpolate``, whose arguments these are.

    Transposed, it is for permutations only: each row of the result is written by one program. Partners that are outside
    the batch give NaN, since values that were made on the device are not checked.
    """
    h = h.contiguous()  # a copy only where h has gaps, as a slice of a larger tensor has
    mixed = torch.empty_like(h)
    if not h.numel():
        return mixed
    if lam.device != h.device and lam.ndim:
        lam = lam.to(h.device, non_blocking=True)
    elif lam.device != h.device:  # a number on the host: handed to the device without waiting for it
        lam = torch.full((), lam.item(), dtype=lam.dtype, device=h.device)
    samples = h.shape[dim]
    inner = h.shape[dim + 1 :].numel()
    block = min(_BLOCK, triton.next_power_of_2(inner))
    blocks = triton.cdiv(inner, block)
    grid = (h.numel() // inner * blocks,)
    double = h.dtype.itemsize == 8
    with torch.cuda.device(h.device):
        mix_rows[grid](
            h,
            mixed,
            lam.contiguous(),
            partners.contiguous(),
            samples,
            inner,
            blocks,
            transposed,
            lam.ndim > 0,
            double,
            block,
            enable_fp_fusion=True,  # as in torch.lerp; unset, it depends on Triton's version, and 3.9 warns
        )
    return mixed


@triton.jit  # type: ignore[untyped-decorator]
def mix_rows(  # type: ignore[no-untyped-def]
    h_pointer,
    mixed_pointer,
    lam_pointer,
    partners_pointer,
    samples,
    inner,
    blocks,
    transposed: tl.constexpr,
    per_sample: tl.constexpr,
    double: tl.constexpr,
    block: tl.constexpr,
):
    """One block of one row: a row is what one sample has at one index of the dimensions before the batch's."""
    row = tl.program_id(0) // blocks
    sample = row % samples
    partner = tl.load(partners_pointer + sample)
    known = (partner >= 0) & (partner < samples)
    partner_row = row - sample + tl.where(known, partner, sample)
    own_row = partner_row if transposed else row
    other_row = row if transposed else partner_row
    # In 64 bits: a state may have more than 2**31 elements.
    columns = (tl.program_id(0) % blocks).to(tl.int64) * block + tl.arange(0, block)
    own_columns = own_row.to(tl.int64) * inner + columns
    other_columns = other_row.to(tl.int64) * inner + columns
    dtype = tl.float64 if double else tl.float32
    lam = tl.load(lam_pointer + (sample if per_sample else 0)).to(dtype)
    own = tl.load(h_pointer + own_columns, mask=columns < inner).to(dtype)
    other = tl.load(h_pointer + other_columns, mask=columns < inner).to(dtype)
    # As torch.lerp has it: lam = 0 gives ``other`` and lam = 1 gives ``own``, to the last bit.
    mixed = tl.where(lam < 0.5, other + lam * (own - other), own - (1 - lam) * (own - other))
    if transposed and per_sample:  # ``own`` is the partner, and lam its own
        mixed = tl.load(lam_pointer + partner, mask=known, other=0).to(dtype) * own + (1 - lam) * other
    tl.store(mixed_pointer + own_columns, tl.where(known, mixed, float("nan")), mask=columns < inner)
