"""How results are shown, the same in all charts: a colour for each method, means as lines, seeds as dots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lightning_manifold_mixup.evaluation.tables import decimals_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["COLOURS", "plot_seeds", "tint"]

COLOURS = {
    "none": "#8c8c8c",  # grey
    "input": "#e69f00",  # orange
    "manifold": "#0072b2",  # blue
    "manifold+clean": "#009e73",  # green
    "near partners": "#cc79a7",  # pink
    "weight decay": "#999933",  # olive
    "dropout": "#d55e00",  # vermilion
    "noise": "#8c564b",  # brown
    "batch norm": "#6a3d9a",  # violet
    "EMA teacher": "#882255",  # wine
    "own teacher": "#44aa99",  # teal
}
"""The colour of each method. People who see few colours can tell none, input and manifold apart (Okabe and Ito)."""

_WIDTH = 0.6
"""Of the line at the mean and of the band of dots, where two methods are 1 apart."""


def tint(method: str, share: float) -> str:
    """Return a paler colour of a method, for its variants.

    Args:
        method: a key of ``COLOURS``.
        share: of white, in [0, 1].

    Raises:
        KeyError: for another method.

    Example:
        >>> tint("manifold", 0.0), tint("manifold", 0.5)
        ('#0072b2', '#80b8d8')
    """
    channels = (int(COLOURS[method][i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(channel + share * (255 - channel)):02x}" for channel in channels)


def plot_seeds(
    ax: Axes, groups: Sequence[tuple[str, str, Sequence[float]]], title: str, decimals: int | None = None
) -> None:
    """Draw a column for each method: a line at the mean, and a dot for each seed, beside each other.

    The axis does not begin at 0: lengths mean nothing here, places do.

    Args:
        ax: to draw on.
        groups: name, colour and the seeds' numbers (seeds,) of each method; without numbers the column stays empty.
        title: what the numbers are.
        decimals: of the mean; None asks ``decimals_of`` the title.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = Figure().subplots()
        >>> plot_seeds(ax, [("no mixup", COLOURS["none"], [2.0, 4.0])], "error %")
        >>> [text.get_text() for text in ax.texts], ax.collections[0].get_offsets().data[:, 1].tolist()
        (['3.00'], [2.0, 4.0])
    """
    decimals = decimals_of(title) if decimals is None else decimals
    for position, (_, colour, values) in enumerate(groups):
        if not len(values):
            continue
        mean, half = float(np.mean(values)), _WIDTH / 2
        # From left to right by seed: seeds with equal numbers stay visible, and pairs of one seed can be compared.
        beside = np.linspace(-half, half, len(values) + 2)[1:-1]
        ax.scatter(position + beside, values, s=22, color=colour, edgecolors="white", linewidths=0.5, zorder=3)
        ax.plot([position - half, position + half], [mean, mean], color=colour, linewidth=2.5, solid_capstyle="butt")
        text, top = f"{mean:.{decimals}f}", (position, max(values))
        ax.annotate(text, top, (0, 5), textcoords="offset points", ha="center", fontsize=9)
    ax.set_xlim(-0.6, len(groups) - 0.4)
    ax.margins(y=0.2)
    names = [name.replace(" ", "\n", 1).replace("-", "-\n") for name, *_ in groups]
    ax.set_xticks(range(len(groups)), names, fontsize=9)
    ax.set_title(title, fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", alpha=0.25)
