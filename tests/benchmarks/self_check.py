"""What the checks cost: the first batch, the first 100 and the first 1,000 with the callback, over plain ones."""

from __future__ import annotations

import statistics
from collections.abc import Collection
from unittest.mock import patch

import torchvision.models as vision

from lightning_manifold_mixup import ManifoldMixupCallback
from lightning_manifold_mixup._step.check.proof import Proof

from .measure import Measure, Section
from .step import Classifier, fit

SHAPE, CLASSES = (8, 3, 96, 96), 1000
LAYERS = ["input", "model.layer1", "model.layer2"]
SECOND = 10  # the batch before which the step is checked for the second time, by both oracles; before 100 by one
THIRD = SECOND + 2
TARGETS = {100: 1.10, 1000: 1.01}
DUE = Proof.due


def sooner(proof: Proof, layers: Collection[str], layer: str, mixed: int) -> list[str]:
    """Let the third check come soon after the second; in place of ``Proof.due``."""
    return DUE(proof, layers, layer, SECOND**2 if mixed == THIRD else mixed)


def run(measure: Measure, rounds: int = 3) -> Section:
    section = Section(
        f"The self-check: ResNet-50, |S| = {len(LAYERS)}, time with the callback over that of plain batches",
        ["batches", "time over plain", "target"],
        [],
        f"Three batches are timed, the first and those of the second and the third check. The third comes before batch "
        f"{SECOND**2}, and here\nbefore batch {THIRD}. With self_check=False, the first batch is observed alone.",
    )
    firsts: dict[bool, list[float]] = {True: [], False: []}
    later: list[list[float]] = []
    for _ in range(rounds):
        module = Classifier(vision.resnet50(), "")
        for check, ratios in firsts.items():
            callback = ManifoldMixupCallback(layers=LAYERS, seed=0, self_check=check)
            with patch.object(Proof, "due", sooner):
                times = fit(measure, module, SHAPE, CLASSES, THIRD + 3, callbacks=[callback], warm_up=0).times
            plain = statistics.median(times[1:SECOND])
            ratios.append(times[0] / plain)
            if check:
                later.append([times[SECOND] / plain, times[THIRD] / plain])
    first, *others = statistics.median(firsts[True]), *map(statistics.median, zip(*later, strict=True))
    section.add("the first, self_check=False", f"{statistics.median(firsts[False]):.2f}", "")
    section.add("the first", f"{first:.2f}", "")
    for number, ratio in zip((SECOND, SECOND**2), others, strict=True):
        section.add(f"the one of number {number}", f"{ratio:.2f}", "")
    for number, checks in ((100, 1), (1000, 2)):
        added = (first - 1 + sum(others[:checks]) - checks) / number
        section.add(f"the first {number:,}", f"{1 + added:.3f}", f"{TARGETS[number]:.2f}")
    return section
