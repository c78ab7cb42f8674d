"""The mix itself, forward and backward, over a copy of the tensor each way."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_manifold_mixup import draw_mix
from lightning_manifold_mixup._step.mix.interpolation import ROW_BYTES

from .measure import Measure, Section, keep_memory

SHAPES = [(128, 64, 32, 32), (128, 128, 16, 16), (128, 512), (32, 197, 768), (8, 1024, 1024)]
# Streams through the memory, a write counting twice (the line is read first), over those of a copy, 1 + 2. On a GPU a
# write counts once: 3 over 2.
ONE_PASS = {"cpu": 4 / 3, "cuda": 3 / 2}  # reads the sample and its partner, writes
TWO_PASSES = 2.0  # a gather, which is a copy; then lerp_ in place, which reads two and writes what it has read
GAPS = 3 / 2  # as one pass, but what is read comes with as many bytes that nobody asked for: 2 * 2 + 2 over 2 + 2


class Copy(torch.autograd.Function):
    """What the mix is measured against: one copy forward, one backward."""

    @staticmethod
    def forward(ctx: object, h: Tensor) -> Tensor:
        return h.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient.clone()


def run(measure: Measure) -> Section:
    keep_memory()
    section = Section(
        "The mix: time over that of a copy (forward and backward each)",
        ["state", "dtype", "layout", "forward", "backward", "limit", "torch.lerp", "lam*h+(1-lam)*h[p]"],
        [],
        "`torch.lerp`: of two states, one operation that permutes nothing, forward.\n"
        "`lam*h+(1-lam)*h[p]`: the formula as it stands, forward and backward.\n"
        "limit: the memory's. 1.33 is two reads and a write, 2.00 a gather and torch.lerp in place, where the rows of "
        "a sample are too short to be worth a call each. In half precision on a CPU torch.lerp is bound by its "
        "instructions (4 times a copy within the cache): its own column, plus 1.00 for a gather.\n"
        "Tried, and no faster on a CPU: groups of samples that stay in the cache, half precision by chunks in float32 "
        "(4), a call for each sample with its batch in dimension 1, index_copy_ for the inverse, embedding_bag.\n"
        "torch.compile of a gather and a lerp takes 1.4 copies forward on the largest state in bfloat16, and 6 on the "
        "smallest; it needs\na C++ compiler and seconds for each shape, so it is not used.",
    )
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            h = torch.randn(shape, device=measure.device).to(dtype)
            section.add(*row(measure, h, "contiguous", 0))
    image = torch.randn(SHAPES[0], device=measure.device)
    section.add(*row(measure, image.to(memory_format=torch.channels_last), "channels_last", 0))
    section.add(*row(measure, image.transpose(2, 3), "transposed", 0))
    section.add(*row(measure, torch.randn(128, 64, 32, 64, device=measure.device)[..., ::2], "every 2nd", 0))
    section.add(*row(measure, torch.randn(197, 32, 768, device=measure.device), "batch dim 1", 1))
    return section


def row(measure: Measure, h: Tensor, layout: str, dim: int) -> list[str]:
    mix = draw_mix(h.shape[dim], generator=torch.Generator().manual_seed(0)).to(h.device)
    h = h.detach().requires_grad_()
    lam = mix.lam.to(h.dtype)
    copied, mixed = Copy.apply(h), mix(h, dim)
    naive = lam * h + (1 - lam) * h.index_select(dim, mix.partners)
    first, second, number = h.detach(), mixed.detach(), mix.lam.item()
    gradient = torch.empty_like(mixed).copy_(mixed.detach())

    def backward(output: Tensor) -> None:
        torch.autograd.grad(output, h, gradient, retain_graph=True)

    times = measure.medians(
        {
            "copy": lambda: Copy.apply(h),
            "mix": lambda: mix(h, dim),
            "naive": lambda: lam * h + (1 - lam) * h.index_select(dim, mix.partners),
            "lerp": lambda: torch.lerp(second, first, number),
            "copy back": lambda: backward(copied),
            "mix back": lambda: backward(mixed),
            "naive back": lambda: backward(naive),
        }
    )
    naive_ratio = (times["naive"] + times["naive back"]) / (times["copy"] + times["copy back"])
    return [
        "x".join(map(str, h.shape)),
        str(h.dtype).removeprefix("torch."),
        layout,
        f"{times['mix'] / times['copy']:.2f}",
        f"{times['mix back'] / times['copy back']:.2f}",
        f"{limit(h, dim, times['lerp'] / times['copy']):.2f}",
        f"{times['lerp'] / times['copy']:.2f}",
        f"{naive_ratio:.2f}",
    ]


def limit(h: Tensor, dim: int, lerp: float) -> float:
    """What forward can come to at best, over a copy; ``lerp`` is what torch.lerp takes."""
    if h.device.type == "cuda":
        return ONE_PASS["cuda"]
    one_pass = h.stride(dim) * min(h.dtype.itemsize, 4) >= ROW_BYTES * torch.get_num_threads()  # row by row
    if h.dtype.itemsize < 4:
        return max(lerp, ONE_PASS["cpu"]) + (not one_pass)
    if min(h.stride()) > 1:
        return GAPS
    return ONE_PASS["cpu"] if one_pass else TWO_PASSES
