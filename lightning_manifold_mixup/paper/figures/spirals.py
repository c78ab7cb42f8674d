"""Figure 1: what Manifold Mixup does to decision boundary, hidden states and their singular values, on 2-D spirals.

Source: Verma et al. 2019, Figure 1: a fully connected network of nine layers with a 2-D bottleneck in the middle, mixed
only there. The paper does not state the data, the widths and the strength of the other regularisers. Several strengths
were tried (weight decay 1e-4, 1e-3; noise and dropout 0.1, 0.5; input mixup alpha 1, 2); here each regulariser has the
largest one that gave a test error below 3.5 %.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lightning_manifold_mixup._step.extras import require
from lightning_manifold_mixup.evaluation import hidden_states
from lightning_manifold_mixup.evaluation.charts import COLOURS
from lightning_manifold_mixup.evaluation.tables import Row
from lightning_manifold_mixup.paper.data import SpiralsDataModule
from lightning_manifold_mixup.paper.data.batches import VectorDataset
from lightning_manifold_mixup.paper.figures.training import (
    TITLES,
    Method,
    Problem,
    Report,
    cell,
    evaluate,
    layers_after,
    means_and_stds,
    plot_grid,
    probabilities_on_grid,
    spectra,
    square_around,
    train_all,
)
from lightning_manifold_mixup.paper.models import BottleneckMLP

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEEDS = 1
EPOCHS = 100

METHODS = {
    "none": Method(),
    "weight decay": Method(weight_decay=1e-3),
    "noise": Method(network={"noise": 0.1}),
    "dropout": Method(network={"dropout": 0.1}),
    "batch norm": Method(network={"batch_norm": True}),
    "input": Method(alpha=1.0, layer="input"),  # with alpha 2, 30 % of the test points are misclassified
    "manifold": Method(alpha=2.0),
}
_SETTINGS = {
    "weight decay": "$10^{-3}$",
    "noise": "std 0.1",
    "dropout": "p = 0.1",
    "input": r"$\alpha$ = 1",
    "manifold": r"$\alpha$ = 2",
}

LAYERS = {"bottleneck": "bottleneck", "layer5": "one layer after"}
WINDOW = 1.2
"""Half the side of the square of inputs that is shown; the spirals' outer radius is 1."""

_CONFIDENT = 0.95
_DARK = ("#12325f", "#7b1420")  # points of the two classes
_LIGHT = ("#5b8fd0", "#ffffff", "#e0636b")  # probability of the second class from 0 over 1/2 to 1


def problem() -> Problem:
    """Make two spiral arms of 500 points, and a network of nine layers."""
    data = SpiralsDataModule()
    sets = []
    for dataset in (data.train_set, data.test_set):
        assert isinstance(dataset, VectorDataset)
        sets.append((dataset.inputs, dataset.labels))
    shape = {"in_features": 2, "num_classes": 2, "before": [128] * 4, "bottleneck": 2, "after": [128] * 3}
    return Problem(sets[0], sets[1], network=shape)


def make(epochs: int = EPOCHS, seeds: int = SEEDS) -> Report:
    """Train, measure and draw; the picture is that of seed 0.

    Args:
        epochs: of each training.
        seeds: how many trainings per method.

    Returns:
        A row for each method: test error (%), NLL, "confident", the share (%) of the square of inputs shown where the
        larger probability is above 0.95, and "largest" and "rest" of the singular values (training set, not centred,
        mean over classes) in the bottleneck and one layer after it.
    """
    task = problem()
    networks = train_all(task, METHODS, epochs, seeds)
    rows: list[Row] = []
    curves: dict[str, Any] = {}
    for method, trained in networks.items():
        found = [spectra(network, task.train_set, list(LAYERS)) for network in trained]
        numbers = [
            evaluate(network, task.test_set)
            | {"confident": _confident(network)}
            | {
                f"{layer}_{name}": spectrum[layer][name].mean().item()
                for layer in LAYERS
                for name in ("largest", "rest")
            }
            for network, spectrum in zip(trained, found, strict=True)
        ]
        rows.append({"method": method, **means_and_stds(numbers)})
        curves[method] = {
            layer: [spectrum[layer]["singular_values"].tolist() for spectrum in found] for layer in LAYERS
        }
    table: list[Row] = [
        {
            "method": row["method"],
            "test error %": cell(row, "test_error", 2),
            "NLL": cell(row, "test_nll", 3),
            "confidence > 0.95": cell(row, "confident", 0) + " %",
            "bottleneck": f"{cell(row, 'bottleneck_largest', 1)} / {cell(row, 'bottleneck_rest', 1)}",
            "layer5": f"{cell(row, 'layer5_largest', 1)} / {cell(row, 'layer5_rest', 1)}",
        }
        for row in rows
    ]
    details = {"epochs": epochs, "seeds": seeds, "singular_values": curves}
    figure = draw(task, {method: trained[0] for method, trained in networks.items()}, curves)
    return Report(rows, {"largest / sum of the other singular values of a class": table}, details, figure)


def _confident(network: BottleneckMLP) -> float:
    sure = probabilities_on_grid(network, torch.zeros(2), WINDOW).amax(2) > _CONFIDENT
    return 100 * sure.double().mean().item()


def draw(task: Problem, networks: dict[str, BottleneckMLP], curves: dict[str, Any]) -> Figure:
    """Draw a column per method: inputs, bottleneck, and singular values one layer after it.

    Args:
        task: for its training points.
        networks: one per method; "none" is among them.
        curves: for each method and layer a list over seeds of spectra (classes, features).
    """
    figure: Figure = require("matplotlib.figure", "cli").Figure(
        figsize=(1.9 * len(networks) + 0.9, 6.6), layout="constrained"
    )
    panels = figure.subplots(3, len(networks), squeeze=False)
    points, labels = task.train_set
    colours = [_DARK[label] for label in labels.tolist()]
    colormap = require("matplotlib.colors", "cli").LinearSegmentedColormap.from_list("classes", _LIGHT)
    background: dict[str, Any] = {"cmap": colormap, "vmin": 0, "vmax": 1, "interpolation": "bilinear"}
    shown = {method: torch.tensor(curves[method]["layer5"]).mean((0, 1))[:10] for method in ("none", *networks)}
    least, largest = (bound.item() for bound in torch.aminmax(torch.cat([*shown.values()])))
    for column, (method, network) in zip(panels.T, networks.items(), strict=True):
        image = probabilities_on_grid(network, torch.zeros(2), WINDOW)[..., 1]
        plot_grid(column[0], image, torch.zeros(2), WINDOW, **background)
        column[0].scatter(*points.T, s=2, c=colours, linewidths=0)
        column[0].set_title(f"{TITLES.get(method, method)}\n{_SETTINGS.get(method, '')}", fontsize=11)

        with torch.no_grad():
            states = hidden_states(network, points, ["bottleneck"])[1]["bottleneck"]
        centre, radius = square_around(states)
        image = probabilities_on_grid(layers_after(network), centre, radius)[..., 1]
        mapped = plot_grid(column[1], image, centre, radius, **background)
        column[1].scatter(*states.T, s=4, c=colours, linewidths=0)

        index = range(1, len(shown[method]) + 1)
        for name in dict.fromkeys(("none", method)):  # the other methods' panels have the line of none, too
            column[2].plot(index, shown[name], color=COLOURS[name], marker=".", label=TITLES.get(name, name))
        column[2].set(yscale="log", ylim=(least / 2, 2 * largest), xlabel="index", xticks=[1, 5, 10])
        column[2].legend(handlelength=1, frameon=False, fontsize=8, loc="upper right", borderpad=0)
        column[2].spines[["top", "right"]].set_visible(False)
        column[2].set_box_aspect(1)
        if column[2] is not panels[2, 0]:
            column[2].tick_params(labelleft=False)
    figure.colorbar(mapped, ax=panels[:2], label="probability of the red class", pad=0.01, aspect=40)
    for ax, text in zip(panels[:, 0], ("inputs", "2-D bottleneck", "singular values,\none layer after"), strict=True):
        ax.set_ylabel(text, fontsize=11)
    return figure
