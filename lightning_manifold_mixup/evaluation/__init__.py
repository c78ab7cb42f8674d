"""What Manifold Mixup changes, each number beside its plot.

Callbacks for the validation and test of any LightningModule whose forward gives logits, and the functions beneath them.
"""

from lightning_manifold_mixup.evaluation.attacks import AttackCallback, adversarial_correct, fgsm, pgd, plot_attacks
from lightning_manifold_mixup.evaluation.calibration import (
    CalibrationCallback,
    plot_histogram,
    plot_interpolation,
    plot_reliability,
)
from lightning_manifold_mixup.evaluation.charts import COLOURS, plot_seeds, tint
from lightning_manifold_mixup.evaluation.confidence import ConfidenceBins, confidence, noise_like
from lightning_manifold_mixup.evaluation.deformations import (
    DEFORMATIONS,
    Deformation,
    DeformationCallback,
    deform,
    plot_deformations,
)
from lightning_manifold_mixup.evaluation.report import EvaluationCallback, write_report
from lightning_manifold_mixup.evaluation.spectrum import (
    ClassSpectrum,
    RepresentationCallback,
    hidden_states,
    plot_spectrum,
    spectrum_summary,
)
from lightning_manifold_mixup.evaluation.tables import console, decimals_of, mean_and_std, plus_minus, print_table
from lightning_manifold_mixup.evaluation.temperature import brier_score, fit_temperature

__all__ = [
    "COLOURS",
    "DEFORMATIONS",
    "AttackCallback",
    "CalibrationCallback",
    "ClassSpectrum",
    "ConfidenceBins",
    "Deformation",
    "DeformationCallback",
    "EvaluationCallback",
    "RepresentationCallback",
    "adversarial_correct",
    "brier_score",
    "confidence",
    "console",
    "decimals_of",
    "deform",
    "fgsm",
    "fit_temperature",
    "hidden_states",
    "mean_and_std",
    "noise_like",
    "pgd",
    "plot_attacks",
    "plot_deformations",
    "plot_histogram",
    "plot_interpolation",
    "plot_reliability",
    "plot_seeds",
    "plot_spectrum",
    "plus_minus",
    "print_table",
    "spectrum_summary",
    "tint",
    "write_report",
]
