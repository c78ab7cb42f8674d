"""Confidence: the largest softmax probability of a prediction, counted in bins, on data, between them and on noise."""

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["ConfidenceBins", "confidence", "noise_like"]


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
