"""Flattening on digits: singular values of each class's hidden states, for several ways to train.

The paper's experiment (Verma et al. 2019, section 4 and the table of singular values) is MNIST with hidden layers 3 x
1024, 12, 4 x 1024; here it is the 8x8 digits and a quarter of the width. Mixing only at the bottleneck of 12.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lightning_manifold_mixup._step.extras import require
from lightning_manifold_mixup.evaluation.charts import COLOURS, plot_seeds
from lightning_manifold_mixup.evaluation.tables import Row
from lightning_manifold_mixup.paper.figures.training import (
    TITLES,
    Method,
    Problem,
    Report,
    cell,
    digits,
    evaluate,
    means_and_stds,
    spectra,
    train_all,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEEDS = 3
EPOCHS = 60

METHODS = {
    "none": Method(),
    "weight decay": Method(weight_decay=1e-4),  # the paper's; with Adam, 1e-3 gives a constant network
    "dropout": Method(network={"dropout": 0.5}),
    "input": Method(alpha=2.0, layer="input"),
    "manifold": Method(alpha=2.0),
}

LAYERS = {"bottleneck": "mixed layer (12)", "layer4": "one layer after (256)", "layer1": "first hidden layer (256)"}
"""The layers whose hidden states are measured, and their names in the picture."""


def problem() -> Problem:
    """Make the digits, and the paper's network at a quarter of its width."""
    shape = {"in_features": 64, "num_classes": 10, "before": [256] * 3, "bottleneck": 12, "after": [256] * 4}
    return Problem(*digits(), network=shape)


def make(epochs: int = EPOCHS, seeds: int = SEEDS) -> Report:
    """Train, measure and draw.

    Args:
        epochs: of each training.
        seeds: how many trainings per method.

    Returns:
        A row for each method, layer and set of samples ("train", "test"): "largest" and "rest", the sum of the other
        singular values, both means over classes, then over seeds; test error (%) and NLL of the method.
    """
    task = problem()
    networks = train_all(task, METHODS, epochs, seeds)
    rows: list[Row] = []
    curves: dict[str, Any] = {}
    for method, trained in networks.items():
        errors = means_and_stds([evaluate(network, task.test_set) for network in trained])
        for states, labelled in (("train", task.train_set), ("test", task.test_set)):
            found = [spectra(network, labelled, list(LAYERS)) for network in trained]
            for layer in LAYERS:
                numbers = means_and_stds(
                    [{name: spectrum[layer][name].mean().item() for name in ("largest", "rest")} for spectrum in found]
                )
                rows.append({"method": method, "layer": layer, "states": states, **numbers, **errors})
            if states == "train":
                curves[method] = {
                    layer: [spectrum[layer]["singular_values"].mean(0).tolist() for spectrum in found]
                    for layer in LAYERS
                }
    details = {"epochs": epochs, "seeds": seeds, "singular_values": curves}
    return Report(rows, _tables(rows), details, draw(curves))


def _tables(rows: list[Row]) -> dict[str, list[Row]]:
    rows = [row for row in rows if row["states"] == "train"]
    tables: dict[str, list[Row]] = {}
    for name, title in (("largest", "largest singular value"), ("rest", "sum of all other singular values")):
        tables[title] = [
            {"method": method} | {row["layer"]: cell(row, name, 1) for row in rows if row["method"] == method}
            for method in METHODS
        ]
    tables["test set"] = [
        {"method": row["method"], "error %": cell(row, "test_error", 2), "NLL": cell(row, "test_nll", 3)}
        for row in rows
        if row["layer"] == "bottleneck"
    ]
    return tables


def draw(curves: dict[str, Any]) -> Figure:
    """Draw the spectra at each layer, means over classes and seeds, and below them the sum of all but the largest.

    Args:
        curves: for each method and layer a spectrum per seed, the mean over classes.
    """
    figure: Figure = require("matplotlib.figure", "cli").Figure(figsize=(11, 6.4), layout="constrained")
    upper, lower = figure.subplots(2, len(LAYERS), gridspec_kw={"height_ratios": [1.25, 1]})
    for above, below, (layer, title) in zip(upper, lower, LAYERS.items(), strict=True):
        sums = []
        for method in METHODS:
            values, name, colour = torch.tensor(curves[method][layer]), TITLES.get(method, method), COLOURS[method]
            sums.append((name, colour, values[:, 1:].sum(1).tolist()))
            values = values[:, :24]
            index = range(1, values.shape[1] + 1)
            above.plot(index, values.mean(0), color=colour, marker=".", label=name)
            above.fill_between(index, values.amin(0), values.amax(0), color=colour, alpha=0.15, linewidth=0)
        above.set(title=title, xlabel="index", xticks=[1, *range(4, len(index) + 1, 4)], yscale="log")
        above.spines[["top", "right"]].set_visible(False)
        plot_seeds(below, sums, "sum of all but the largest", decimals=1)
    upper[0].set_ylabel("singular value (band: seeds)")
    upper[0].legend(fontsize=9)
    return figure
