"""How sure a model is, and how sure it has reason to be: NLL, ECE, and confidence away from the data.

The confidence of a prediction is its largest softmax probability. On test data it should equal the accuracy
(reliability diagram; the expected calibration error, ECE, is the mean gap). Between test points and on noise there is
no right answer: the paper (Verma et al., arXiv 1806.05236) has Manifold Mixup make broad regions of low confidence
there, and here they are measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassCalibrationError
from typing_extensions import override

from lightning_manifold_mixup.evaluation.report import EvaluationCallback, Row, axes, float64_device

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "CalibrationCallback",
    "ConfidenceBins",
    "confidence",
    "interpolate",
    "noise_like",
    "plot_histogram",
    "plot_interpolation",
    "plot_reliability",
]


def confidence(logits: Tensor) -> Tensor:
    """Give the largest softmax probability of each row, in float32 or better.

    Args:
        logits: (n, classes).

    Returns:
        (n,), between 1 / classes and 1.

    Example:
        >>> confidence(torch.tensor([[0.0, 0.0], [100.0, 0.0]]))
        tensor([0.5000, 1.0000])
    """
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(1).amax(1)


def interpolate(images: Tensor, lam: float, partners: Tensor) -> Tensor:
    """Give points on the lines between images and their partners.

    Args:
        images: (n, ...).
        lam: weight of the image itself; 1 - lam is the weight of its partner.
        partners: (n,), `partners[i]` is the partner of image i.

    Returns:
        The mixed images, same shape.

    Example:
        >>> interpolate(torch.tensor([[0.0], [1.0]]), 0.75, torch.tensor([1, 0]))
        tensor([[0.2500],
                [0.7500]])
    """
    return torch.lerp(images[partners], images, lam)


def noise_like(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw white noise with the mean and standard deviation that the batch has in each channel.

    Args:
        images: (n, channels, ...).
        generator: the global one if None.

    Returns:
        Gaussian noise, same shape.

    Example:
        >>> images = torch.tensor([[[0.0, 2.0]], [[0.0, 2.0]]]).expand(2, 1, 2)
        >>> noise_like(images, torch.Generator().manual_seed(0)).shape
        torch.Size([2, 1, 2])
    """
    device = "cpu" if generator is None else generator.device
    noise = torch.randn(images.shape, generator=generator, device=device, dtype=torch.float32).to(images)
    dims = [0, *range(2, images.ndim)]
    return images.mean(dims, keepdim=True) + images.std(dims, correction=0, keepdim=True) * noise


class ConfidenceBins(Metric):
    """Count predictions in equal bins of confidence: what a reliability diagram and a confidence histogram show.

    Args:
        num_bins: bins of [0, 1]. Bin b holds confidences in [b, b + 1) / num_bins, the last one also 1, as in
            torchmetrics.

    Example:
        >>> bins = ConfidenceBins(num_bins=2)
        >>> bins.update(torch.tensor([0.3, 0.7, 0.9]), torch.tensor([True, True, False]))
        >>> bins.compute()["accuracy"]
        tensor([1.0000, 0.5000], dtype=torch.float64)
    """

    full_state_update = False
    count: Tensor
    confidence: Tensor
    correct: Tensor

    def __init__(self, num_bins: int = 15) -> None:
        super().__init__()
        self.num_bins = num_bins
        for name in ("count", "confidence", "correct"):
            self.add_state(name, torch.zeros(num_bins, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, confidence: Tensor, correct: Tensor | None = None) -> None:
        """Add predictions.

        Args:
            confidence: (n,), in [0, 1].
            correct: (n,), whether the prediction is right; None where there is no right answer.
        """
        confidence = confidence.to(self.count.device)
        edges = torch.linspace(0, 1, self.num_bins + 1, dtype=confidence.dtype, device=confidence.device)
        index = (torch.bucketize(confidence, edges, right=True) - 1).clamp_max(self.num_bins - 1)
        self.count += torch.bincount(index, minlength=self.num_bins)
        self.confidence.index_add_(0, index, confidence.to(self.confidence))
        if correct is not None:
            self.correct.index_add_(0, index, correct.to(self.correct))

    def compute(self) -> dict[str, Tensor]:
        """Give "count", mean "confidence" and "accuracy" of each bin, (num_bins,); the means are NaN in empty bins."""
        return {
            "count": self.count,
            "confidence": self.confidence / self.count,
            "accuracy": self.correct / self.count,
        }


class CalibrationCallback(EvaluationCallback):
    """Report NLL, ECE and confidence on test data, between test points and on noise.

    Writes `<stage>_calibration.csv`, `.json` (with the bins) and `.png` (reliability diagram, histogram of confidence,
    confidence between test points), prints the table and logs the numbers (`test_calibration/data_ece`) and the figure.

    Args:
        lams: points between an image and a random partner of its batch, as weights of the image: 0.5 is halfway. (With
            random partners the other half of the way looks the same.)
        num_bins: of the ECE and of the pictures.
        kwargs: the arguments of `EvaluationCallback`; `seed` draws partners and noise.

    Example:
        >>> trainer = L.Trainer(callbacks=[CalibrationCallback(lams=[0.5])], logger=False, enable_checkpointing=False)
    """

    family = "calibration"

    def __init__(self, lams: Sequence[float] = (0.5, 0.6, 0.7, 0.8, 0.9), num_bins: int = 15, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not all(0 <= lam <= 1 for lam in lams):
            raise ValueError(f"expected lams in [0, 1], got {list(lams)}")
        self.lams = list(lams)
        self.num_bins = num_bins
        self.bins: dict[str, ConfidenceBins] = {}
        self.ece: MulticlassCalibrationError | None = None

    @override
    def start(self) -> None:
        super().start()
        self.bins = {}
        self.ece = None

    @override
    def update(self, pl_module: L.LightningModule, images: Tensor, target: Tensor) -> None:
        logits = self.logits(pl_module, images).float()
        if self.ece is None:  # now that the number of classes is known
            self.ece = MulticlassCalibrationError(logits.shape[1], n_bins=self.num_bins).to(logits.device)
        self.ece.update(logits.softmax(1), target)
        correct = logits.argmax(1) == target
        self.record("accuracy", correct)
        self.record("nll", F.cross_entropy(logits, target, reduction="none"))
        self._sure("data", "data", logits, correct)
        partners = torch.randperm(len(images), generator=self.generator).to(images.device)
        for lam in self.lams:
            between = interpolate(images, lam, partners)
            self._sure("interpolation", f"interpolation {lam:g}", self.logits(pl_module, between))
        self._sure("noise", "noise", self.logits(pl_module, noise_like(images, self.generator)))

    def _sure(self, bins: str, row: str, logits: Tensor, correct: Tensor | None = None) -> None:
        sure = confidence(logits)
        self.record(row, sure)
        if bins not in self.bins:
            self.bins[bins] = ConfidenceBins(self.num_bins).to(float64_device(sure.device))
        self.bins[bins].update(sure, correct)

    @override
    def compute(self) -> tuple[list[Row], dict[str, Any]]:
        assert self.ece is not None
        mean = {name: metric.compute().item() for name, metric in self.means.items()}
        on_data = {name: mean.pop(name) for name in ("accuracy", "nll")} | {"ece": self.ece.compute().item()}
        rows: list[Row] = [
            {"inputs": name, "confidence": sure} | (on_data if name == "data" else dict.fromkeys(on_data))
            for name, sure in mean.items()
        ]
        bins = {name: {k: v.tolist() for k, v in metric.compute().items()} for name, metric in self.bins.items()}
        for name in bins.keys() - {"data"}:
            del bins[name]["accuracy"]  # there is no right answer
        return rows, {"bins": bins}

    @override
    def plot(self, rows: list[Row], details: dict[str, Any]) -> Figure:
        figure, (left, middle, right) = axes(3, 12, 3.8)
        plot_reliability(left, details["bins"]["data"], rows[0]["ece"])
        plot_histogram(middle, details["bins"])
        plot_interpolation(right, rows)
        return figure


def plot_reliability(ax: Axes, bins: dict[str, list[float]], ece: float) -> None:
    """Draw accuracy over confidence as bars, against the diagonal of a calibrated model.

    Args:
        ax: to draw on.
        bins: what `ConfidenceBins.compute` gave.
        ece: expected calibration error, for the title.
    """
    num_bins = len(bins["count"])
    left = [b / num_bins for b in range(num_bins)]
    ax.bar(left, bins["accuracy"], width=1 / num_bins, align="edge", color="#9ecae1", edgecolor="white")
    ax.axline((0, 0), slope=1, linestyle="--", color="k", linewidth=1)
    ax.text(0.72, 0.65, "calibrated", rotation=45, rotation_mode="anchor", transform_rotates_text=True, va="top")
    ax.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1), title=f"Reliability: ECE {ece:.4f}")


def plot_histogram(ax: Axes, bins: dict[str, dict[str, list[float]]]) -> None:
    """Draw how often each confidence occurs, one step line per kind of input.

    Args:
        ax: to draw on.
        bins: for each kind of input, what `ConfidenceBins.compute` gave.
    """
    for name, counts in bins.items():
        count = torch.tensor(counts["count"])
        edges = torch.linspace(0, 1, len(count) + 1)
        ax.stairs((100 * count / count.sum()).tolist(), edges.tolist(), label=name, linewidth=1.5)
    ax.set(xlabel="confidence", ylabel="share of inputs (%)", xlim=(0, 1), title="How sure the model is")
    ax.set_ylim(bottom=0)
    ax.legend()


def plot_interpolation(ax: Axes, rows: list[Row]) -> None:
    """Draw mean confidence on the way from a test point to halfway to another, and on noise.

    Args:
        ax: to draw on.
        rows: with "inputs" ("data", "interpolation 0.5", ..., "noise") and mean "confidence".
    """
    sure = {row["inputs"]: row["confidence"] for row in rows}
    points = {float(name.split()[1]): value for name, value in sure.items() if name.startswith("interpolation")}
    points[1.0] = sure["data"]
    lams = sorted(points)
    ax.plot(lams, [points[lam] for lam in lams], "o-", label="between test points")
    ax.axhline(sure["noise"], color="C2", linestyle="--", label="noise")
    ax.set(xlabel="λ (weight of the test point)", ylabel="mean confidence", ylim=(0, 1), title="Away from the data")
    ax.grid(alpha=0.3)
    ax.legend(loc="lower right")
