"""How the cost grows with the state, the network, S, the classes and the processes; and what a model of it predicts."""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lightning_manifold_mixup import ManifoldMixupCallback, draw_mix
from lightning_manifold_mixup.paper.models import MLP

from .measure import Measure, Section, keep_memory
from .step import Classifier, EverySecond, Peer, fit


@dataclass
class Curve:
    """A cost, measured and by the model, for several values of what grows."""

    cost: str
    grows: str
    sizes: list[int]
    measured: list[float]
    model: list[float]
    beside: str = "model"


def run(measure: Measure, plot: Path | None = None) -> Section:
    keep_memory()
    rate = copy_rate(measure)
    section = Section("Growth", ["cost", "of", "measured", "model", "growth over linear"], [])
    curves = []
    for curve in (
        mixing(measure, rate, "samples of 64x32x32", [(n, 64, 32, 32) for n in (16, 32, 64, 128, 256)], 0),
        mixing(measure, rate, "channels of 64 x c x 32x32", [(64, c, 32, 32) for c in (16, 32, 64, 128, 256)], 1),
        callback(measure, "layers of the network, |S| = 2", [(depth, 2) for depth in (2, 8, 32, 128)], 0),
        callback(measure, "layers in S, of 32", [(32, size) for size in (1, 4, 16, 32)], 1),
        classes(measure, rate),
        classes_memory(measure),
        processes(),
    ):
        curves.append(curve)
        growth = (curve.measured[-1] / curve.measured[0]) / (curve.sizes[-1] / curve.sizes[0])
        section.add(
            curve.cost,
            f"{', '.join(f'{size:,}' for size in curve.sizes)} {curve.grows}",
            *(", ".join(f"{value:.3g}" for value in values) for values in (curve.measured, curve.model)),
            f"{growth:.2f}" if curve.measured[0] > 0 else "-",
        )
    section.notes = (
        f"Model: bytes moved over the rate of a copy here, {rate:.1f} GB/s read and written. The mix moves 3 states\n"
        "forward and 3 backward (2 reads, 1 write). The loss writes one more gradient of the logits and adds it to\n"
        "the first (4 times the logits), after what Python takes. The callback's Python is the same for all networks,\n"
        "call by call (`tests/training/test_speed.py`); after a long forward pass its code comes back into the caches\n"
        "slowly, as that of a loop by hand does.\n"
        f"{prediction(statistics.median(curves[2].measured))}"
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


def prediction(python: float) -> str:
    """For ResNet-50 at 8 x H100: bytes over bandwidth, against the time of a step that is bound by arithmetic."""
    n, bandwidth, images_per_second = 256, 0.85 * 3.35e12, 2800
    sizes = [n * 2 * c * r * r for c, r in ((3, 224), (256, 56), (512, 28))]  # bfloat16; S = input, layer1, layer2
    moved = statistics.mean([3 * sizes[0], 6 * sizes[1], 6 * sizes[2]])  # the input has no gradient
    mix, step = moved / bandwidth, n / images_per_second
    return (
        f"Prediction for ResNet-50, bfloat16, 8 x H100, {n} images each, S = {{input, layer1, layer2}}:\n"
        f"{moved / 1e9:.2f} GB a step in {mix * 1e3:.2f} ms at 85 % of 3.35 TB/s, of a step of {step * 1e3:.0f} ms "
        f"(2,800 images/s each): {1 + mix / step:.4f}.\nPython works ahead of the device: its {python / 1e3:.1f} ms a "
        "step are hidden. Nothing is communicated: the number of GPUs does not matter."
    )


def mixing(measure: Measure, rate: float, grows: str, shapes: list[tuple[int, ...]], dim: int) -> Curve:
    """Milliseconds of the mix, forward and backward."""
    times, model = [], []
    for shape in shapes:
        h = torch.randn(shape, device=measure.device, requires_grad=True)
        mix = draw_mix(len(h)).to(h.device)
        gradient = torch.randn_like(h)
        task = partial(forward_and_backward, mix, h, gradient)
        times.append(measure.medians({"mix": task})["mix"] * 1e3)
        model.append(6 * h.nbytes / rate / 1e6)
    return Curve("mix, ms", grows, [shape[dim] for shape in shapes], times, model)


def forward_and_backward(mix: Callable[[torch.Tensor], torch.Tensor], h: torch.Tensor, gradient: torch.Tensor) -> None:
    torch.autograd.grad(mix(h), h, gradient)


class ByHand(Peer):
    """Manifold Mixup by a hook of one's own, at one of some layers, and two losses."""

    def __init__(self, model: nn.Module, layers: list[str]) -> None:
        super().__init__(model, "")
        self.layers = layers

    def mixed_step(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        lam, partners = np.random.beta(2.0, 2.0), torch.randperm(len(x), device=x.device)
        handle = self.get_submodule(random.choice(self.layers)).register_forward_hook(
            lambda module, args, h: lam * h + (1 - lam) * h[partners]
        )
        logits = self.model(x)
        handle.remove()
        return lam * F.cross_entropy(logits, y) + (1 - lam) * F.cross_entropy(logits, y[partners])


def callback(measure: Measure, grows: str, cases: list[tuple[int, int]], which: int) -> Curve:
    """Microseconds that mixing adds to the step before, unmixed, of a network so small that nothing else takes time."""
    added: dict[str, list[float]] = {"callback": [], "by hand": []}
    for depth, size in cases:
        layers = [f"model.layer{i + 1}" for i in range(size)]
        pairs: dict[str, list[float]] = {way: [] for way in added}
        for _ in range(5):
            for way, differences in pairs.items():
                network = MLP(8, 10, [8] * depth)
                ours = way == "callback"
                module = Classifier(network, "") if ours else ByHand(network, layers)
                # One pass: in networks so narrow and deep the input hardly moves the loss, so the oracles cannot tell.
                callbacks = [EverySecond(layers=layers, seed=0, passes=1)] if ours else []
                times = fit(measure, module, (8, 8), 10, 161, callbacks=callbacks, warm_up=16).times
                differences += [mixed - plain for plain, mixed in zip(times[::2], times[1::2], strict=False)]
        for way, differences in pairs.items():
            added[way].append(statistics.median(differences) * 1e6)
    sizes = [case[which] for case in cases]
    return Curve("added to a step, us", grows, sizes, added["callback"], added["by hand"], "by hand")


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


def classes(measure: Measure, rate: float) -> Curve:
    added = []
    for number in CLASSES:
        plain, mixed = losses(measure, number)
        times = measure.medians({"plain": plain, "mixed": mixed})
        added.append((times["mixed"] - times["plain"]) * 1e3)
    model = [added[0] + 4 * 256 * 4 * number / rate / 1e6 for number in CLASSES]
    return Curve("loss of 256 samples, added ms", "classes", CLASSES, added, model)


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
    return Curve("loss of 256 samples, added MB", "classes", CLASSES, peaks, [0.0] * len(CLASSES))


def processes() -> Curve:
    """Time of a step with the callback over one without, in 1 and in 2 processes (DDP over gloo, on the CPU)."""
    ratios = []
    for number in (1, 2):
        command = [sys.executable, "-m", "tests.benchmarks.growth", str(number)]
        output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600).stdout
        times = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
        ratios.append(times["with"] / times["without"])
    return Curve("MLP, batch 512, step with over without", "processes", [1, 2], ratios, [ratios[0]] * 2)


def steps_in_processes(number: int) -> None:
    """Prints the medians of both kinds of step; run in a process of its own, which starts the others."""
    torch.set_num_threads(1)
    module = Classifier(MLP(784, 10, (512, 512, 512)), "")
    times: dict[str, list[float]] = {"without": [], "with": []}
    ways = {"accelerator": "cpu", "devices": number} | ({"strategy": "ddp"} if number > 1 else {})
    for _ in range(3):
        for kind in times:
            callbacks = [ManifoldMixupCallback(layers=["model.layer1"], seed=0)] if kind == "with" else []
            times[kind] += fit(Measure(), module, (512, 784), 10, 30, callbacks=callbacks, **ways).times
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(json.dumps({kind: statistics.median(each) for kind, each in times.items()}))


def draw(path: Path, curves: list[Curve]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator

    figure, axes = plt.subplots(2, 3, figsize=(13, 7.5), constrained_layout=True)
    for axis, curve in zip(axes.flat, [curve for curve in curves if any(curve.model)], strict=True):
        axis.plot(curve.sizes, curve.measured, "o-", label="measured")
        axis.plot(curve.sizes, curve.model, "--", color="grey", label=curve.beside)
        if curve.beside == "model" and curve.model[-1] > 2 * curve.model[0] > 0:
            axis.set(xscale="log", yscale="log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
        else:
            axis.set(xscale="log", ylim=(0, 1.6 * max(*curve.measured, *curve.model)))
        axis.set_xticks(curve.sizes, [f"{size:,}" for size in curve.sizes])
        axis.minorticks_off()
        axis.set(title=curve.cost, xlabel=curve.grows)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    steps_in_processes(int(sys.argv[1]))
