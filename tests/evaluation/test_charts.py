"""One colour for each method in all charts, means as lines, seeds as dots that do not hide each other."""

from itertools import combinations

import pytest
import torch
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from lightning_manifold_mixup.cli import compare, runs
from lightning_manifold_mixup.evaluation import COLOURS, plot_seeds, tint
from lightning_manifold_mixup.paper.figures import spectrum, spirals
from lightning_manifold_mixup.paper.models import BottleneckMLP


def result(method, seed, error):
    metrics = {runs.LAST: {"test/error": error, "test/nll": 1.0, "test/ece": 0.1}}
    return {"recipe": "digits", "method": method, "seed": seed, "metrics": metrics, "seconds": 1.0}


def line_colours(ax):
    return {line.get_label(): to_hex(line.get_color()) for line in ax.lines}


def test_colours_can_be_told_apart():
    for (one, first), (other, second) in combinations(COLOURS.items(), 2):
        distance = sum((a - b) ** 2 for a, b in zip(to_rgb(first), to_rgb(second), strict=True)) ** 0.5
        assert distance > 0.15, (one, other)


def test_every_method_of_the_package_has_a_colour():
    assert COLOURS.keys() >= {*runs.LABELS, *spectrum.METHODS, *spirals.METHODS}
    assert (COLOURS["none"], COLOURS["input"], COLOURS["manifold"]) == ("#8c8c8c", "#e69f00", "#0072b2")
    with pytest.raises(KeyError):
        tint("manifolt", 0.5)


def test_seeds_with_equal_numbers_are_seen():
    figure = Figure(figsize=(3, 3))
    ax = figure.subplots()
    plot_seeds(ax, [("no mixup", COLOURS["none"], [2.0, 2.0, 2.0]), ("input mixup", COLOURS["input"], [])], "NLL")
    [dots] = ax.collections
    figure.canvas.draw()
    x = ax.transData.transform(dots.get_offsets())[:, 0]
    diameter = dots.get_sizes()[0] ** 0.5 * figure.dpi / 72
    assert (x[1:] - x[:-1] > 0.9 * diameter).all()
    [line] = ax.lines
    assert set(line.get_ydata()) == {2.0}
    assert [text.get_text() for text in ax.texts] == ["2.000"]


def test_compare_draws_the_mean_as_a_line_and_each_seed_as_a_dot():
    results = [result(method, seed, 0.01 * (seed + 1)) for method in ("none", "manifold") for seed in range(3)]
    figure = compare.plot(results)
    assert [ax.get_title() for ax in figure.axes] == ["digits: error %", "digits: NLL", "digits: ECE %"]
    ax = figure.axes[0]
    assert [to_hex(line.get_color()) for line in ax.lines] == [COLOURS["none"], COLOURS["manifold"]]
    assert [line.get_ydata()[0] for line in ax.lines] == pytest.approx([2.0, 2.0])
    assert [sorted(dots.get_offsets()[:, 1]) for dots in ax.collections] == [pytest.approx([1, 2, 3])] * 2


def test_spirals_keep_their_curves_inside_the_frame_and_name_each():
    task = spirals.problem()
    networks = {name: BottleneckMLP(**task.network).eval() for name in ("none", "weight decay", "manifold")}
    spectra = {
        name: [[[10.0 ** (-k * rate) for k in range(10)]] * 2]
        for name, rate in zip(networks, (0.3, 1, 0.6), strict=True)
    }
    figure = spirals.draw(task, networks, {name: {"layer5": curve} for name, curve in spectra.items()})
    panels = figure.axes[6:9]
    for name, ax in zip(networks, panels, strict=True):
        low, high = ax.get_ylim()
        assert all(low < value < high for line in ax.lines for value in line.get_ydata())
        named = [text.get_text() for text in ax.get_legend().get_texts()]
        titles = {"none": "no mixup", "manifold": "Manifold Mixup"}
        assert named == [titles.get(n, n) for n in dict.fromkeys(("none", name))]
        assert line_colours(ax) == {titles.get(n, n): COLOURS[n] for n in ("none", name)}


def test_spectrum_draws_each_seed():
    curves = {m: {layer: (torch.rand(3, 30) + 0.1).tolist() for layer in spectrum.LAYERS} for m in spectrum.METHODS}
    figure = spectrum.draw(curves)
    below = figure.axes[len(spectrum.LAYERS)]
    for method, dots in zip(spectrum.METHODS, below.collections, strict=True):
        sums = [sum(seed[1:]) for seed in curves[method]["bottleneck"]]
        assert dots.get_offsets()[:, 1].tolist() == pytest.approx(sums)
