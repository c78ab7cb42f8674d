"""How the cost grows with the state, the network, S, the classes and the processes; and what a model of it predicts."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from lightning_manifold_mixup import ManifoldMixupCallback, draw_mix
from lightning_manifold_mixup.models import MLP

from .measure import Measure, Section, keep_memory
from .step import Classifier, fit

Curve = tuple[str, str, list[float], list[float]]  # title, name of the horizontal axis, values on both


def run(measure: Measure, plot: Path | None = None) -> Section:
    keep_memory()
    section = Section("Growth", ["what grows", "from .. to", "cost", "per unit, last over first"], [], "")
    copies = copy_rate(measure)
    curves = [
        mixing(measure, "batch size", [(n, 64, 32, 32) for n in (16, 32, 64, 128, 256)]),
        mixing(measure, "size of a state", [(64, c, 32, 32) for c in (16, 32, 64, 128, 256)]),
        callback(measure, "layers of the network", [(depth, 2) for depth in (2, 8, 32, 128)]),
        callback(measure, "layers in S", [(32, size) for size in (1, 4, 16, 32)]),
        classes(measure),
        classes_memory(measure),
        processes(),
    ]
    for title, unit, xs, ys in curves:
        growth = (ys[-1] / ys[0]) / (xs[-1] / xs[0])
        listed = ", ".join(f"{y:.3g}" for y in ys)
        section.add(title, f"{unit} {', '.join(f'{x:g}' for x in xs)}", listed, f"{growth:.2f}")
    section.notes = (
        "Linear or better: the last column is at most about 1.\n"
        f"Model: the mix moves 3 states forward, 3 backward (2 reads, 1 write); a copy here moves {copies:.1f} GB/s, "
        f"read and written, so a state of s GB takes 6 s / {copies:.1f} seconds.\n{prediction()}"
    )
    if plot:
        draw(plot, curves)
        section.notes += f"\nPlot: {plot}"
    return section


def copy_rate(measure: Measure) -> float:
    """GB a second, read and written."""
    h = torch.randn(1 << 24, device=measure.device)
    out = torch.empty_like(h)
    return 2 * h.nbytes / measure.medians({"copy": lambda: out.copy_(h)})["copy"] / 1e9


def prediction() -> str:
    """For ResNet-50 at 8 x H100: bytes over bandwidth, against the time of a step that is bound by arithmetic."""
    n, bandwidth, images_per_second = 256, 0.85 * 3.35e12, 2800
    sizes = [n * 2 * c * r * r for c, r in ((3, 224), (256, 56), (512, 28))]  # bfloat16; S = input, layer1, layer2
    moved = statistics.mean([3 * sizes[0], 6 * sizes[1], 6 * sizes[2]])  # the input has no gradient
    mix, step = moved / bandwidth, n / images_per_second
    return (
        f"ResNet-50, bfloat16, 8 x H100, {n} images each, S = {{input, layer1, layer2}}: {moved / 1e9:.2f} GB a step, "
        f"{mix * 1e3:.2f} ms at 85 % of 3.35 TB/s, of a step of {step * 1e3:.0f} ms (2,800 images/s): "
        f"{1 + mix / step:.4f}. No communication is added; the draws are made on the host while the device works."
    )


def mixing(measure: Measure, unit: str, shapes: list[tuple[int, ...]]) -> Curve:
    """Milliseconds of the mix, forward and backward."""
    times = []
    for shape in shapes:
        h = torch.randn(shape, device=measure.device, requires_grad=True)
        mix = draw_mix(len(h)).to(h.device)
        gradient = torch.randn_like(h)
        task = partial(forward_and_backward, mix, h, gradient)
        times.append(measure.medians({"mix": task})["mix"] * 1e3)
    grows = 0 if unit == "batch size" else 1
    return f"mix of 64x32x32 float32, ms ({unit})", unit, [float(s[grows]) for s in shapes], times


def forward_and_backward(mix: Callable[[torch.Tensor], torch.Tensor], h: torch.Tensor, gradient: torch.Tensor) -> None:
    torch.autograd.grad(mix(h), h, gradient)


def callback(measure: Measure, unit: str, cases: list[tuple[int, int]]) -> Curve:
    """Microseconds a step that the callback adds to a network so small that nothing else takes time."""
    added = []
    for depth, size in cases:
        module = Classifier(MLP(8, 10, [8] * depth), "")
        layers = [f"model.layer{i + 1}" for i in range(size)]
        times: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(3):
            for on in times:
                callbacks = [ManifoldMixupCallback(layers=layers, seed=0)] if on else []
                times[on] += fit(measure, module, (8, 8), 10, 60, callbacks=callbacks).times
        added.append((statistics.median(times[True]) - statistics.median(times[False])) * 1e6)
    grows = 0 if unit.startswith("layers of") else 1
    return f"callback, added us a step ({unit})", unit, [float(case[grows]) for case in cases], added


CLASSES = [10, 100, 1000, 10_000, 50_000]


def losses(measure: Measure, number: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """Forward and backward of the loss, plain and mixed."""
    logits = torch.randn(256, number, device=measure.device, requires_grad=True)
    y = torch.randint(number, (256,), device=measure.device)
    mix = draw_mix(256).to(measure.device)

    def plain() -> None:
        torch.autograd.grad(F.cross_entropy(logits, y), logits)

    def mixed() -> None:
        torch.autograd.grad(F.cross_entropy(logits, mix.target(y)), logits)

    return plain, mixed


def classes(measure: Measure) -> Curve:
    added = []
    for number in CLASSES:
        plain, mixed = losses(measure, number)
        times = measure.medians({"plain": plain, "mixed": mixed})
        added.append((times["mixed"] - times["plain"]) * 1e3)
    return "mixed loss, added ms (256 samples)", "classes", [float(c) for c in CLASSES], added


def classes_memory(measure: Measure) -> Curve:
    """The peak of the mixed loss; a dense one-hot would be as large as the logits, and its mix as much again."""
    peaks = []
    for number in CLASSES:
        plain, mixed = losses(measure, number)
        mixed()
        with measure.peak() as first:
            plain()
        with measure.peak() as second:
            mixed()
        peaks.append((second[0] - first[0]) / 2**20)
    return "mixed loss, added MB at the peak", "classes", [float(c) for c in CLASSES], peaks


def processes() -> Curve:
    """Time of a step with the callback over one without, in 1 and in 2 processes (DDP over gloo, on the CPU)."""
    ratios = []
    for number in (1, 2):
        command = [sys.executable, "-m", "tests.benchmarks.growth", str(number)]
        output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout
        times = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
        ratios.append(times["with"] / times["without"])
    return "MLP step, with over without", "processes", [1.0, 2.0], ratios


def steps_in_processes(number: int) -> None:
    """Prints the medians of both kinds of step; run in a process of its own, which starts the others."""
    torch.set_num_threads(1)
    module = Classifier(MLP(784, 10, (512, 512, 512)), "")
    times: dict[str, list[float]] = {"without": [], "with": []}
    ways = {"accelerator": "cpu", "devices": number} | ({"strategy": "ddp"} if number > 1 else {})
    for _ in range(3):
        for kind in times:
            callbacks = [ManifoldMixupCallback(layers=["model.layer1"], seed=0)] if kind == "with" else []
            times[kind] += fit(Measure(), module, (512, 784), 10, 20, callbacks=callbacks, **ways).times
    print(json.dumps({kind: statistics.median(each) for kind, each in times.items()}))


def draw(path: Path, curves: list[Curve]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 4, figsize=(18, 8), constrained_layout=True)
    for axis, (title, unit, xs, ys) in zip(axes.flat, curves, strict=False):
        axis.plot(xs, ys, "o-", label="measured")
        if min(ys) > 0 and len(xs) > 2:
            axis.plot(xs, [ys[-1] * x / xs[-1] for x in xs], "--", color="grey", label="linear")
            axis.set(xscale="log", yscale="log")
        axis.set(title=title, xlabel=unit)
        axis.legend()
    axes.flat[-1].axis("off")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    steps_in_processes(int(sys.argv[1]))
