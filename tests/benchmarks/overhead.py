"""The time in Python: what mixing adds to a step so small that nothing else takes time, by hand and by the callback."""

from __future__ import annotations

import statistics
from typing import Any

import lightning as L
import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn, randperm

from lightning_manifold_mixup import ManifoldMixupCallback

from .measure import Measure, Section
from .step import Classifier, fit

SHAPE, CLASSES, STEPS = (32, 16), 10, 150
WARM_UP = 15  # the checks of the first batch and of that of number 10 are another benchmark's


class ByHand(Classifier):
    """Manifold Mixup as one writes it into one's own step, after the first layer; or of the input."""

    def __init__(self, model: nn.Sequential, layer: int) -> None:
        super().__init__(model, str(layer))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        lam = np.random.beta(1.0, 1.0)
        partners = randperm(len(x), device=x.device)
        for index, layer in enumerate(self.model):
            if str(index) == self.layer:
                x = lam * x + (1 - lam) * x[partners]
            x = layer(x)
        return lam * F.cross_entropy(x, y) + (1 - lam) * F.cross_entropy(x, y[partners])


def network() -> nn.Sequential:
    """Three small linear layers."""
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, CLASSES))


def run(measure: Measure, rounds: int = 3) -> Section:
    section = Section(
        "Python: microseconds that mixing adds to a step of three small linear layers, through the Trainer",
        ["way", "step, us", "added, us", "over by hand", "added, 10th percentile", "over by hand", "target"],
        [],
        f"Of {rounds * 8} fits of {STEPS} steps each, all ways in turn: medians, and the 10th percentile, which other "
        "programs on the same machine disturb less.",
    )
    ways: dict[str, tuple[L.LightningModule, list[str]]] = {
        "plain": (Classifier(network(), ""), []),
        "by hand, hidden": (ByHand(network(), 2), []),
        "by hand, input": (ByHand(network(), 0), []),
        "callback, hidden": (Classifier(network(), ""), ["model.1"]),
        "callback, input": (Classifier(network(), ""), ["input"]),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds * 8):
        for way, (module, layers) in ways.items():
            callbacks = [ManifoldMixupCallback(alpha=1.0, layers=layers, seed=0)] if layers else []
            times[way] += fit(measure, module, SHAPE, CLASSES, STEPS, callbacks=callbacks, warm_up=WARM_UP).times
    medians, quiet = ({way: percentile(each, share) * 1e6 for way, each in times.items()} for share in (50, 10))
    for way in ways:
        cells = []
        for values in (medians, quiet):
            added = values[way] - values["plain"]
            hand = values[f"by hand, {way.rpartition(' ')[2]}"] - values["plain"] if way != "plain" else 1
            cells += [f"{added:.0f}", f"{added / hand:.2f}" if way.startswith("callback") else ""]
        section.add(way, f"{medians[way]:.0f}", *cells, "1.00" if way.startswith("callback") else "")
    return section


def percentile(values: list[float], share: int) -> float:
    """What ``share`` % of the values are below."""
    return statistics.quantiles(values, n=100)[share - 1]
