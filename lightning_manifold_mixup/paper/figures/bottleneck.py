"""Figure 2: the hidden states of ten classes in a bottleneck of two dimensions, with and without mixing.

Source: Verma et al. 2019, Figure 2: MNIST, hidden layers 2 x 1024, 2, 2 x 1024, LeakyReLU, mixing right after the
bottleneck; here it is the 8x8 digits and a quarter of the width. Two dimensions are fewer than the nine that Theorem 1
asks for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lightning_manifold_mixup._step.extras import require
from lightning_manifold_mixup.evaluation import hidden_states
from lightning_manifold_mixup.evaluation.tables import Row
from lightning_manifold_mixup.paper.figures.training import (
    TITLES,
    Method,
    Problem,
    Report,
    cell,
    digits,
    evaluate,
    layers_after,
    means_and_stds,
    plot_grid,
    probabilities_on_grid,
    square_around,
    train_all,
)
from lightning_manifold_mixup.paper.models import BottleneckMLP

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEEDS = 3
EPOCHS = 100

METHODS = {
    "none": Method(),
    "input": Method(alpha=2.0, layer="input"),
    "manifold": Method(alpha=2.0),
}


def problem() -> Problem:
    """Make the digits, and the paper's network at a quarter of its width, with its public script's batch norm."""
    shape = {"in_features": 64, "num_classes": 10, "before": [256] * 2, "bottleneck": 2, "after": [256] * 2}
    return Problem(*digits(), network=shape | {"bottleneck_norm": True})


def make(epochs: int = EPOCHS, seeds: int = SEEDS) -> Report:
    """Train, measure and draw; the picture is that of seed 0.

    Args:
        epochs: of each training.
        seeds: how many trainings per method.

    Returns:
        A row for each method: test error (%), NLL, and "confidence", the mean of the largest probability over
        the smallest square around the training set's hidden states, enlarged by a quarter.
    """
    task = problem()
    networks = train_all(task, METHODS, epochs, seeds)
    rows: list[Row] = []
    for method, trained in networks.items():
        numbers = [
            evaluate(network, task.test_set) | {"confidence": _maps(network, task)[3].mean().item()}
            for network in trained
        ]
        rows.append({"method": method, **means_and_stds(numbers)})
    table: list[Row] = [
        {
            "method": row["method"],
            "test error %": cell(row, "test_error", 2),
            "NLL": cell(row, "test_nll", 3),
            "mean confidence": cell(row, "confidence", 3),
        }
        for row in rows
    ]
    figure = draw(task, {method: trained[0] for method, trained in networks.items()})
    return Report(rows, {"confidence: mean over the hidden plane": table}, {"epochs": epochs, "seeds": seeds}, figure)


@torch.no_grad()
def _maps(network: BottleneckMLP, task: Problem) -> tuple[torch.Tensor, torch.Tensor, float, torch.Tensor]:
    """Compute hidden states of the training set, the square around them, and the confidence over that square."""
    states = hidden_states(network, task.train_set[0], ["bottleneck"])[1]["bottleneck"]
    centre, radius = square_around(states)
    return states, centre, radius, probabilities_on_grid(layers_after(network), centre, radius).amax(2)


def draw(task: Problem, networks: dict[str, BottleneckMLP]) -> Figure:
    """Draw hidden states over the confidence that the rest of the network has in each point of the plane.

    Args:
        task: for its training samples.
        networks: one per method.
    """
    figure: Figure = require("matplotlib.figure", "cli").Figure(figsize=(12, 4.4), layout="constrained")
    panels = figure.subplots(1, len(networks), squeeze=False)[0]
    labels = task.train_set[1]
    colors = require("matplotlib.colors", "cli")
    greys = colors.LinearSegmentedColormap.from_list("light greys", ["1", "0.7"])
    colours = [f"C{digit}" if digit != 7 else "black" for digit in range(10)]  # C7 is grey, and so is the map
    for ax, (method, network) in zip(panels, networks.items(), strict=True):
        states, centre, radius, confidence = _maps(network, task)
        image = plot_grid(ax, confidence, centre, radius, cmap=greys, vmin=0.1, vmax=1, interpolation="bilinear")
        for digit in range(10):
            of_class = states[labels == digit]
            ax.scatter(*of_class.T, s=7, color=colours[digit], edgecolors="white", linewidths=0.2, label=str(digit))
        ax.set_title(TITLES.get(method, method))
    figure.colorbar(image, ax=panels, label="confidence (largest probability)", pad=0.01)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=10, markerscale=2.5)
    return figure
