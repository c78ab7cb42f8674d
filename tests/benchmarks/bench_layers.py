"""The first batch with `layers="auto"`, which is observed, over one without the callback: time and memory."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
import torchvision.models as vision
from torch import nn
from torch.utils.data import DataLoader

from lightning_manifold_mixup import ManifoldMixupCallback

from .measure import Measure, Section
from .step import Classifier, Repeated

NETWORKS: dict[str, Callable[[], nn.Module]] = {"ResNet-50": vision.resnet50, "ViT-B/16": vision.vit_b_16}
TARGET_TIME, TARGET_MEMORY = 1.0, 1.5


class FirstBatch(L.Callback):
    """Times the only batch of a fit, or takes the peak of memory of its forward pass."""

    def __init__(self, measure: Measure, memory: bool) -> None:
        self.measure, self.memory = measure, memory
        self.seconds = 0.0
        self.bytes = 0

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if self.memory:
            self._peak = self.measure.peak()
            self._result = self._peak.__enter__()
        self.seconds -= self.measure.now()

    def on_before_backward(self, trainer: L.Trainer, module: Any, loss: Any) -> None:
        if self.memory:
            self._peak.__exit__(None, None, None)
            self.bytes = self._result[0]

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seconds += self.measure.now()


def first_batch(measure: Measure, module: Classifier, n: int, observed: bool, memory: bool = False) -> FirstBatch:
    gc.collect()  # what the fit before this one has left
    spy = FirstBatch(measure, memory)
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="gpu" if measure.device == "cuda" else "cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[spy, *([ManifoldMixupCallback(seed=0)] if observed else [])],
    )
    trainer.fit(module, DataLoader(Repeated((n, 3, 224, 224), 1000, times=1), batch_size=None))
    return spy


def forward(measure: Measure, module: Classifier, n: int) -> float:
    """Seconds of a forward pass in training."""
    x = torch.randn(n, 3, 224, 224, device=measure.device)
    module.to(measure.device).train()
    start = measure.now()
    logits = module.model(x)
    seconds = measure.now() - start
    del logits
    return seconds


def run(measure: Measure, rounds: int = 5) -> Section:
    n = 2 if measure.device == "cpu" else 64
    section = Section(
        f"The first batch: observed (layers='auto') over one without the callback, batch of {n} x 3 x 224 x 224",
        ["network", "forward ms", "batch ms", "observed ms", "added / forward", "target", "memory", "target"],
        [],
        "Medians of batches in turn, backward and optimizer included. Memory: the peak until backward, as a ratio.",
    )
    for name, build in NETWORKS.items():
        module = Classifier(build(), "")
        first_batch(measure, module, n, observed=True)  # libraries and gradients are there before
        times: dict[str, list[float]] = {"forward": [], "plain": [], "observed": []}
        for _ in range(rounds):
            times["forward"].append(forward(measure, module, n))
            times["plain"].append(first_batch(measure, module, n, observed=False).seconds)
            times["observed"].append(first_batch(measure, module, n, observed=True).seconds)
        middle = {key: statistics.median(each) for key, each in times.items()}
        plain, observed = (first_batch(measure, module, n, o, memory=True).bytes for o in (False, True))
        section.add(
            name,
            *(f"{1e3 * seconds:.0f}" for seconds in middle.values()),
            f"{(middle['observed'] - middle['plain']) / middle['forward']:.2f}",
            TARGET_TIME,
            f"{observed / plain:.2f}",
            TARGET_MEMORY,
        )
    return section
