"""Accuracy on test images deformed in ways that training never showed (Verma et al., arXiv 1806.05236).

Levels and names are the paper's. Its code rescales the sampling grid: "zoom-in 60 %" enlarges 60 % of the image's width
to the whole width, and "zoom-out 140 %" fits 140 % of the width, the image with its surroundings, into the frame. In
torchvision's terms the scales are 1/0.6 and 1/1.4.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor
from typing_extensions import Unpack, override

from lightning_manifold_mixup._step.extras import require
from lightning_manifold_mixup.evaluation.report import EvaluationCallback, EvaluationOptions, Row, axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["DEFORMATIONS", "Deformation", "DeformationCallback", "deform", "plot_deformations"]


@dataclass(frozen=True)
class Deformation:
    """A random affine map, drawn anew for each image.

    Args:
        rotation: largest angle in degrees; the angle is uniform in [-rotation, rotation].
        shear: largest horizontal shear angle in degrees; uniform in [-shear, shear].
        zoom: width of the visible part, in widths of the image: below 1 zooms in, above 1 zooms out.

    Example:
        >>> Deformation(rotation=20)
        Deformation(rotation=20, shear=0.0, zoom=1.0)
    """

    rotation: float = 0.0
    shear: float = 0.0
    zoom: float = 1.0


DEFORMATIONS = {
    "rotation 20": Deformation(rotation=20),
    "rotation 40": Deformation(rotation=40),
    "shear 28.6": Deformation(shear=28.6),
    "shear 57.3": Deformation(shear=57.3),
    "zoom-in 60": Deformation(zoom=0.6),
    "zoom-in 80": Deformation(zoom=0.8),
    "zoom-out 120": Deformation(zoom=1.2),
    "zoom-out 140": Deformation(zoom=1.4),
}
"""The paper's deformations of CIFAR-100: largest angle in degrees, or zoom in percent."""


def deform(
    images: Tensor,
    deformation: Deformation,
    generator: torch.Generator | None = None,
    fill: float | Sequence[float] = 0.0,
) -> Tensor:
    """Deform each image about its centre, by bilinear interpolation.

    Args:
        images: (n, channels, height, width), in any units.
        deformation: the largest angles, and the zoom.
        generator: draws the angles, on the CPU; the global generator if None.
        fill: value of pixels from outside the image, in the images' units, one number or one per channel. 0 in
            normalised images is the mean colour.

    Returns:
        The deformed images, same shape.

    Raises:
        ModuleNotFoundError: without torchvision.

    Example:
        >>> image = torch.arange(4.0).view(1, 1, 2, 2).repeat(1, 1, 3, 3)
        >>> deform(image, Deformation(zoom=2.0))[0, 0, 0]  # the outermost pixels come from outside the image
        tensor([0., 0., 0., 0., 0., 0.])
    """
    affine = require("torchvision.transforms.v2.functional", "cli").affine
    bounds = torch.tensor([deformation.rotation, deformation.shear], dtype=torch.float64)
    if not bounds.any():
        return torch.as_tensor(affine(images, 0.0, [0, 0], 1 / deformation.zoom, [0.0, 0.0], "bilinear", fill))
    draws = torch.rand(len(images), 2, generator=generator, dtype=torch.float64) * 2 - 1
    deformed = [
        affine(image, angle, [0, 0], 1 / deformation.zoom, [shear, 0.0], "bilinear", fill)
        for image, (angle, shear) in zip(images, (draws * bounds).tolist(), strict=True)
    ]
    return torch.stack(deformed)


class DeformationCallback(EvaluationCallback):
    """Report the accuracy under the paper's eight deformations in ``trainer.validate`` and ``trainer.test``.

    Writes ``<stage>_deformations.csv``, ``.json`` and ``.png``, prints the table and logs the numbers
    (``test_deformations/rotation_20_accuracy``) and the figure. Every run sees the same deformations.

    Args:
        fill: value of pixels from outside the image, in the units of the batch, one number or one per channel. 0 in
            normalised images is the mean colour.
        kwargs: the arguments of ``EvaluationCallback``; ``seed`` draws the angles.

    Example:
        >>> trainer = L.Trainer(callbacks=[DeformationCallback()], logger=False, enable_checkpointing=False)
    """

    family = "deformations"

    def __init__(self, fill: float | Sequence[float] = 0.0, **kwargs: Unpack[EvaluationOptions]) -> None:
        super().__init__(**kwargs)
        self.fill = fill

    @override
    def update(self, pl_module: L.LightningModule, images: Tensor, target: Tensor) -> None:
        self.record("none", self.logits(pl_module, images).argmax(1) == target)
        for name, deformation in DEFORMATIONS.items():
            deformed = deform(images, deformation, self.generator, self.fill)
            self.record(name, self.logits(pl_module, deformed).argmax(1) == target)

    @override
    def compute(self) -> tuple[list[Row], dict[str, Any]]:
        return [{"deformation": name, "accuracy": mean.compute().item()} for name, mean in self.means.items()], {}

    @override
    def plot(self, rows: list[Row], details: dict[str, Any]) -> Figure:
        figure, (ax,) = axes(1, 5.5, 3.6)
        plot_deformations(ax, rows)
        return figure


def plot_deformations(ax: Axes, rows: list[Row]) -> None:
    """Draw one bar per row.

    Args:
        ax: to draw on.
        rows: with "deformation" and "accuracy" in [0, 1]; the first is without deformation.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = Figure().subplots()
        >>> zoomed = {"deformation": "zoom-in 80", "accuracy": 0.5}
        >>> plot_deformations(ax, [{"deformation": "none", "accuracy": 0.9}, zoomed])
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['none', 'zoom-in 80 %']
    """
    names = [re.sub(r"^(rotation|shear) (.+)", r"\1 ±\2°", row["deformation"]) for row in rows]
    names = [f"{name} %" if name.startswith("zoom") else name for name in names]
    bars = ax.barh(names, [100 * row["accuracy"] for row in rows])
    bars[0].set_color("0.6")
    ax.bar_label(bars, fmt="%.1f", padding=3)
    ax.invert_yaxis()
    ax.set(xlabel="accuracy (%)", xlim=(0, 110), title="Accuracy on deformed images")
    ax.set_xticks(range(0, 101, 20))
