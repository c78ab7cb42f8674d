"""Who is mixed with whom: strategies that choose the partners of a minibatch.

The paper pairs at random. Where targets are continuous, or classes are rare, other partners have been found to do
better. In YAML::

    partners:
      class_path: lightning_manifold_mixup.partners.LabelDistancePartners
      init_args: {bandwidth: 1.0}
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import isfinite
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from typing_extensions import override


class Partners(ABC):
    """A strategy. It is a base class and not a protocol, because the YAML parser finds strategies by their base.

    Example:
        >>> class NextInBatch(Partners):
        ...     def __call__(self, targets, n, generator):
        ...         return torch.arange(n).roll(-1)
        >>> NextInBatch()(None, 4, np.random.default_rng(0))
        tensor([1, 2, 3, 0])
    """

    @abstractmethod
    def __call__(self, targets: Any, n: int, generator: np.random.Generator) -> Tensor:
        """Choose a partner for each sample of a minibatch.

        Args:
            targets: the targets of the batch as they are before mixing: a tensor, or a structure of tensors.
            n: number of samples.
            generator: where all randomness comes from, so that a resumed run draws the same again.

        Returns:
            (n,) int64 tensor on the host; entry i is the index of the partner of sample i.
        """


class UniformPartners(Partners):
    """The paper's: a permutation of the minibatch, all of them equally likely. Does not look at the targets.

    Example:
        >>> sorted(UniformPartners()(None, 4, np.random.default_rng(0)).tolist())
        [0, 1, 2, 3]
    """

    @override
    def __call__(self, targets: Any, n: int, generator: np.random.Generator) -> Tensor:
        """Return a permutation; see ``Partners``."""
        return torch.from_numpy(generator.permutation(n))


class LabelDistancePartners(Partners):
    """C-Mixup (Yao et al., "C-Mixup: Improving Generalization in Regression", NeurIPS 2022), within a minibatch.

    Samples whose labels are near are mixed more often: ``P(j | i) ~ exp(-||y_i - y_j||**2 / (2 * bandwidth**2))``. The
    sample itself is among those drawn from, and partners repeat. Waits for the device: one copy of the labels a batch.

    Args:
        bandwidth: sigma, in units of the labels. If it is small, a sample is mixed with similar ones or with itself; if
            it is large, with all equally often.

    Raises:
        ValueError: for a bandwidth that is not a finite number > 0.

    Example:
        >>> near = LabelDistancePartners(bandwidth=0.1)
        >>> near(torch.tensor([0.0, 0.0, 9.0, 9.0]), 4, np.random.default_rng(0)).tolist()
        [1, 0, 3, 3]
    """

    def __init__(self, bandwidth: float) -> None:
        if not (isfinite(bandwidth) and bandwidth > 0):
            raise ValueError(
                f"Expected a finite bandwidth > 0, in units of the labels, got {bandwidth}. For partners that do not "
                "depend on the labels take UniformPartners."
            )
        self.bandwidth = bandwidth

    @override
    def __call__(self, targets: Any, n: int, generator: np.random.Generator) -> Tensor:
        """Partners with repeats; see ``Partners``.

        Args:
            targets: one tensor of n rows, of numbers that have distances: (n,) or (n, ...).
            n: number of samples.
            generator: where the randomness comes from.

        Returns:
            (n,) int64 tensor.

        Raises:
            ValueError: if ``targets`` is not one tensor with n rows of finite numbers.
        """
        return _draw(self.log_weights(targets, n), generator)

    def log_weights(self, targets: Any, n: int) -> Tensor:
        """Compute ``log P(j | i)`` in row i and column j, up to a number for each row; (n, n) float64 on the host."""
        labels = _labels(targets, n, "LabelDistancePartners").reshape(n, -1).double()
        if not labels.isfinite().all():
            raise ValueError(f"Expected labels that are finite numbers, got {int((~labels.isfinite()).sum())} others.")
        # By differences: the faster way by products gives equal labels a distance above 0.
        distances = torch.cdist(labels, labels, compute_mode="donot_use_mm_for_euclid_dist")
        return -((distances / self.bandwidth) ** 2) / 2


class ClassBalancedPartners(Partners):
    """For long-tailed data: the partner's class is uniform over the classes in the minibatch, then the sample in it.

    So a rare class is mixed in as often as a frequent one. Partners repeat. Every value of a label counts as a class,
    -1 too. Waits for the device: one copy of the labels a batch.

    Example:
        >>> balanced, y = ClassBalancedPartners(), torch.tensor([0, 0, 0, 0, 0, 0, 0, 1])
        >>> y[balanced(y, 8, np.random.default_rng(0))].tolist()
        [0, 0, 0, 1, 1, 1, 1, 0]
    """

    @override
    def __call__(self, targets: Any, n: int, generator: np.random.Generator) -> Tensor:
        """Partners with repeats; see ``Partners``.

        Args:
            targets: one tensor of n integer or bool labels.
            n: number of samples.
            generator: where the randomness comes from.

        Returns:
            (n,) int64 tensor.

        Raises:
            ValueError: if ``targets`` is not one tensor with one integer or bool label for each sample.
        """
        labels = _labels(targets, n, "ClassBalancedPartners")
        if labels.numel() != n or labels.is_floating_point() or labels.is_complex():
            raise ValueError(
                f"ClassBalancedPartners expects one class index for each of the {n} samples, got {labels.dtype} labels "
                f"of shape {tuple(labels.shape)}. Of other labels, find the class in a strategy of your own."
            )
        _, class_of, counts = torch.unique(labels.reshape(n), return_inverse=True, return_counts=True)
        return _draw(-counts.double().log()[class_of].expand(n, n), generator)


def _draw(log_weights: Tensor, generator: np.random.Generator) -> Tensor:
    """Return an index for each row, with probability proportional to ``exp(log_weights)``.

    The largest of the logarithms plus Gumbel noise has that probability. Nothing is exponentiated, so nothing
    overflows.
    """
    return (log_weights + torch.from_numpy(generator.gumbel(size=log_weights.shape))).argmax(1)


def _labels(targets: Any, n: int, who: str) -> Tensor:
    """Return the one tensor in ``targets``, on the host."""
    found: list[Tensor] = []
    apply_to_collection(targets, Tensor, found.append)
    if len(found) != 1 or found[0].ndim == 0 or len(found[0]) != n:
        got = ", ".join(f"{t.dtype} of shape {tuple(t.shape)}" for t in found) or "no tensor"
        raise ValueError(
            f"{who} expects one target tensor with a row for each of the {n} samples, got {got}. Where there are "
            "several targets, call it from a strategy of your own with the one that it shall go by."
        )
    return found[0].detach().cpu()
