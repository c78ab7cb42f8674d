"""What the checks cost: the first batch, the first 100 and the first 1,000 with the callback, over plain ones."""

from __future__ import annotations

import statistics

import torchvision.models as vision

from lightning_manifold_mixup import ManifoldMixupCallback

from .measure import Measure, Section
from .step import Classifier, fit

SHAPE, CLASSES = (8, 3, 96, 96), 1000
LAYERS = ["input", "model.layer1", "model.layer2"]
SECOND = 10  # the batch before which the step is checked for the second time; then 100, 1000, ...
TARGETS = {100: 1.10, 1000: 1.01}


def run(measure: Measure, rounds: int = 3) -> Section:
    section = Section(
        f"The self-check: ResNet-50, |S| = {len(LAYERS)}, time with the callback over that of plain batches",
        ["batches", "time over plain", "target"],
        [],
        f"Two batches are timed, the first and that of the second check; the third check, before batch {SECOND**2}, is "
        "like the second.\nWith self_check=False, the first batch is observed alone.",
    )
    firsts: dict[bool, list[float]] = {True: [], False: []}
    seconds: list[float] = []
    for _ in range(rounds):
        module = Classifier(vision.resnet50(), "")
        for check, ratios in firsts.items():
            callback = ManifoldMixupCallback(layers=LAYERS, seed=0, self_check=check)
            times = fit(measure, module, SHAPE, CLASSES, SECOND + 3, callbacks=[callback], warm_up=0).times
            plain = statistics.median(times[1:SECOND])
            ratios.append(times[0] / plain)
            if check:
                seconds.append(times[SECOND] / plain)
    first, second = statistics.median(firsts[True]), statistics.median(seconds)
    section.add("the first, self_check=False", f"{statistics.median(firsts[False]):.2f}", "")
    section.add("the first", f"{first:.2f}", "")
    section.add(f"the one of number {SECOND}", f"{second:.2f}", "")
    for number, checks in ((100, 1), (1000, 2)):
        added = (first - 1 + checks * (second - 1)) / number
        section.add(f"the first {number:,}", f"{1 + added:.3f}", f"{TARGETS[number]:.2f}")
    return section
