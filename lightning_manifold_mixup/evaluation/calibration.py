"""How sure a model is, and whether rightly so: NLL, Brier score, ECE, and confidence away from the data.

The confidence of a prediction is its largest softmax probability. On test data it should equal the accuracy
(reliability diagram; the expected calibration error, ECE, is the mean gap), and it should be lower on other data than
on test data (the area under the ROC curve, AUROC, says how often it is). Between test points and on noise there is
no right answer: there, the paper (Verma et al., arXiv 1806.05236) says, Manifold Mixup makes broad regions of low
confidence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.classification import BinaryAUROC, MulticlassCalibrationError
from typing_extensions import Unpack, override

from lightning_manifold_mixup._step.devices import float64_device
from lightning_manifold_mixup._step.host import is_overridden
from lightning_manifold_mixup.evaluation.confidence import ConfidenceBins, confidence, noise_like
from lightning_manifold_mixup.evaluation.report import EvaluationCallback, EvaluationOptions, Row, axes
from lightning_manifold_mixup.evaluation.temperature import brier_score, fit_temperature
from lightning_manifold_mixup.mixing import Mix

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "CalibrationCallback",
    "plot_histogram",
    "plot_interpolation",
    "plot_reliability",
]


_AWAY = ("noise", "other data")
"""What a model should be less sure of than of test data."""


Batches = L.LightningDataModule | DataLoader[Any]
"""Where samples come from: a loader, or a data module that has one for the purpose."""


class CalibrationCallback(EvaluationCallback):
    """Report NLL, Brier score, ECE and confidence on test data, and confidence away from it.

    Rows are the test data ("data"), the same after temperature scaling ("data scaled"), points between test points
    ("interpolation 0.5"), noise, and other data where they are given. Writes ``<stage>_calibration.csv``, ``.json``
    (with the bins) and ``.png`` (reliability diagram, histogram of confidence, confidence between test points), prints
    the table and logs the numbers (``test_calibration/data_scaled_ece``) and the figure.

    Args:
        lams: points between an image and a random partner of its batch, as weights of the image: 0.5 is halfway. Values
            below 0.5 give the same points in the mean, since partners are random.
        num_bins: bins of confidence, in the ECE and in the pictures.
        held_out: data to fit the temperature on, a loader or (its validation loader) a data module. None takes the
            validation data of the Trainer's data module in a test; without any, there is no row "data scaled".
        other_data: data of another kind, a loader or (its test loader) a data module, to be told from the test data.
        kwargs: the arguments of ``EvaluationCallback``; ``seed`` draws partners and noise.

    Raises:
        ValueError: for lams outside [0, 1], at construction.

    The column "auroc" is the probability that a test sample has more confidence than one of noise, or of other data.

    Example:
        >>> trainer = L.Trainer(callbacks=[CalibrationCallback(lams=[0.5])], logger=False, enable_checkpointing=False)
    """

    family = "calibration"

    def __init__(
        self,
        lams: Sequence[float] = (0.5, 0.6, 0.7, 0.8, 0.9),
        num_bins: int = 15,
        held_out: Batches | None = None,
        other_data: Batches | None = None,
        **kwargs: Unpack[EvaluationOptions],
    ) -> None:
        super().__init__(**kwargs)
        if not all(0 <= lam <= 1 for lam in lams):
            raise ValueError(f"expected lams in [0, 1], got {list(lams)}")
        self.lams = list(lams)
        self.num_bins = num_bins
        self.held_out, self.other_data = held_out, other_data
        self.temperature: float | None = None
        self.bins: dict[str, ConfidenceBins] = {}
        self.ece: dict[str, MulticlassCalibrationError] = {}
        self.auroc: dict[str, BinaryAUROC] = {}

    @override
    def start(self) -> None:
        super().start()
        self.temperature = None
        self.bins, self.ece, self.auroc = {}, {}, {}

    @override
    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_validation_epoch_start(trainer, pl_module)
        if not self.should_evaluate(trainer):
            return
        held_out = self._held_out(trainer)
        if held_out is None:
            rank_zero_info(
                f"{type(self).__name__}: there is no held-out data, so there is no row after temperature scaling. Set "
                "`held_out`, or test with a data module that has a validation loader."
            )
        else:  # each rank takes all of it
            logits, target = zip(*self._predictions(trainer, pl_module, held_out), strict=True)
            self.temperature = fit_temperature(torch.cat(logits), torch.cat(target))
        if self.other_data is not None:
            for logits_there, _ in self._predictions(trainer, pl_module, _loader(self.other_data, "test")):
                self._sure("other data", "other data", logits_there)

    on_test_epoch_start = on_validation_epoch_start

    def _held_out(self, trainer: L.Trainer) -> Any:
        """Return the loader to fit the temperature on; None if there is none."""
        if self.held_out is not None:
            return _loader(self.held_out, "validate")
        data = getattr(trainer, "datamodule", None)
        if not trainer.testing or data is None:
            return None
        data.setup("validate")
        return data.val_dataloader() if is_overridden("val_dataloader", data) else None

    def _predictions(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loader: Any
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield logits and targets of the batches of another loader than the one that is evaluated."""
        for batch in loader:
            batch = trainer.strategy.batch_to_device(batch)
            images, target = self.entries(batch)
            with trainer.precision_plugin.forward_context():
                logits = self.logits(pl_module, images).float()
            yield logits, target

    @override
    def update(self, pl_module: L.LightningModule, images: Tensor, target: Tensor) -> None:
        logits = self.logits(pl_module, images).float()
        self._score("data", logits, target)
        self._sure("data", "data", logits, logits.argmax(1) == target)
        if self.temperature is not None:
            self._score("data scaled", logits / self.temperature, target)
            self.record("data scaled", confidence(logits / self.temperature))
        partners = torch.randperm(len(images), generator=self.generator)
        for lam in self.lams:
            between = Mix(torch.tensor(lam), partners).to(images.device)(images, batch_dim=0)
            self._sure("interpolation", f"interpolation {lam:g}", self.logits(pl_module, between))
        self._sure("noise", "noise", self.logits(pl_module, noise_like(images, self.generator)))

    def _score(self, row: str, logits: Tensor, target: Tensor) -> None:
        if row not in self.ece:  # made here, where the number of classes is known
            self.ece[row] = MulticlassCalibrationError(logits.shape[1], n_bins=self.num_bins).to(logits.device)
        self.ece[row].update(logits.softmax(1), target)
        self.record(f"{row}/accuracy", logits.argmax(1) == target)
        self.record(f"{row}/nll", F.cross_entropy(logits, target, reduction="none"))
        self.record(f"{row}/brier", brier_score(logits, target))

    def _sure(self, bins: str, row: str, logits: Tensor, correct: Tensor | None = None) -> None:
        sure = confidence(logits)
        self.record(row, sure)
        if bins not in self.bins:
            self.bins[bins] = ConfidenceBins(self.num_bins).to(float64_device(sure.device))
        self.bins[bins].update(sure, correct)
        for name in _AWAY if row == "data" else {row} & set(_AWAY):
            if name not in self.auroc:
                self.auroc[name] = BinaryAUROC().to(sure.device)
            self.auroc[name].update(sure, torch.full_like(sure, row == "data", dtype=torch.long))

    @override
    def compute(self) -> tuple[list[Row], dict[str, Any]]:
        mean = {name: metric.compute().item() for name, metric in self.means.items()}
        temperatures = {"data": 1.0, "data scaled": self.temperature}
        order = ["data", "data scaled", *(f"interpolation {lam:g}" for lam in self.lams), *_AWAY]
        rows: list[Row] = [
            {
                "inputs": name,
                "confidence": mean[name],
                **{score: mean.get(f"{name}/{score}") for score in ("accuracy", "nll", "brier")},
                "ece": self.ece[name].compute().item() if name in self.ece else None,
                "temperature": temperatures.get(name),
                "auroc": self.auroc[name].compute().item() if name in _AWAY else None,
            }
            for name in order
            if name in mean
        ]
        bins = {name: {k: v.tolist() for k, v in metric.compute().items()} for name, metric in self.bins.items()}
        for name in bins.keys() - {"data"}:
            del bins[name]["accuracy"]  # on these inputs there is no right answer
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
        bins: what ``ConfidenceBins.compute`` gave.
        ece: expected calibration error in [0, 1], for the title.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = Figure().subplots()
        >>> plot_reliability(ax, {"count": [1.0, 3.0], "accuracy": [0.0, 1.0]}, ece=0.0125)
        >>> ax.get_title()
        'Reliability: ECE 1.25 %'
    """
    num_bins = len(bins["count"])
    left = [b / num_bins for b in range(num_bins)]
    ax.bar(left, bins["accuracy"], width=1 / num_bins, align="edge", color="#9ecae1", edgecolor="white")
    ax.axline((0, 0), slope=1, linestyle="--", color="k", linewidth=1)
    ax.text(0.72, 0.65, "calibrated", rotation=45, rotation_mode="anchor", transform_rotates_text=True, va="top")
    ax.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    ax.set_title(f"Reliability: ECE {100 * ece:.2f} %")


def plot_histogram(ax: Axes, bins: dict[str, dict[str, list[float]]]) -> None:
    """Draw how often each confidence occurs, one step line per kind of input.

    Args:
        ax: to draw on.
        bins: for each kind of input, what ``ConfidenceBins.compute`` gave.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = Figure().subplots()
        >>> plot_histogram(ax, {"data": {"count": [1.0, 3.0]}})
        >>> ax.patches[0].get_data().values.tolist()
        [25.0, 75.0]
    """
    for name, counts in bins.items():
        count = torch.tensor(counts["count"])
        edges = torch.linspace(0, 1, len(count) + 1)
        ax.stairs((100 * count / count.sum()).tolist(), edges.tolist(), label=name, linewidth=1.5)
    ax.set(xlabel="confidence", ylabel="share of inputs (%)", xlim=(0, 1), title="How sure the model is")
    ax.set_ylim(bottom=0)
    ax.legend()


def plot_interpolation(ax: Axes, rows: list[Row]) -> None:
    """Draw mean confidence between test points, from a point to halfway to another, and on noise.

    Args:
        ax: to draw on.
        rows: with "inputs" ("data", "interpolation 0.5", ..., "noise") and mean "confidence".

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = Figure().subplots()
        >>> sure = {"data": 0.9, "interpolation 0.5": 0.6, "noise": 0.3}
        >>> plot_interpolation(ax, [{"inputs": name, "confidence": value} for name, value in sure.items()])
        >>> ax.lines[0].get_xydata().tolist()
        [[0.5, 0.6], [1.0, 0.9]]
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


def _loader(source: Batches, stage: str) -> Any:
    """Return the loader of a data module for a stage, "validate" or "test"; or ``source``, if it is a loader."""
    if isinstance(source, DataLoader):
        return source
    source.prepare_data()
    source.setup(stage)
    return source.val_dataloader() if stage == "validate" else source.test_dataloader()
