"""Tables of numbers with a number to predict: diabetes, and Friedman's function."""

from abc import abstractmethod
from functools import cached_property

import torch
from torch import Tensor
from typing_extensions import override

from lightning_manifold_mixup._step.extras import require
from lightning_manifold_mixup.paper.data.base import Split, SplitDataModule
from lightning_manifold_mixup.paper.data.batches import LabelledDataset, VectorDataset

__all__ = ["DiabetesDataModule", "FriedmanDataModule", "RegressionDataModule"]


class RegressionDataModule(SplitDataModule):
    """Batches of inputs (n, in_features) and targets (n,), both float32 and standardised.

    All splits are shifted and scaled by mean and standard deviation of the training samples: a root mean squared error
    of 1 is about that of predicting the mean, whatever the unit of the targets. Subclasses give ``load``.

    Args:
        batch_size: samples of a training batch; an incomplete last batch is kept.
        test_size: test samples: a number, or a share below 1, drawn by ``seed``.
        val_size: validation samples taken out of what is left, likewise; 0 for none.
        eval_batch_size, num_workers, pin_memory, seed: see ``SplitDataModule``.

    Attributes:
        in_features: numbers in a sample; what a fully connected network needs to know.
        target_std: standard deviation of the training targets, in their own unit.

    Raises:
        ValueError: for a batch size below 1. In ``setup``: if ``test_size`` or ``val_size`` asks for more samples than
            there are.

    Example:
        >>> class Line(RegressionDataModule):
        ...     in_features = 1
        ...     def load(self):
        ...         x = torch.linspace(0, 1, 40)
        ...         return x.unsqueeze(1), 3 * x
        >>> data = Line(batch_size=8, test_size=10)
        >>> inputs, targets = next(iter(data.train_dataloader()))
        >>> inputs.shape, targets.shape, len(data.train_set)
        (torch.Size([8, 1]), torch.Size([8]), 30)
    """

    in_features: int

    def __init__(
        self,
        batch_size: int = 32,
        test_size: int | float = 0.25,
        val_size: int | float = 0,
        eval_batch_size: int = 500,
        num_workers: int = 0,
        pin_memory: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, pin_memory, seed)
        self.test_size, self.val_size = test_size, val_size

    @abstractmethod
    def load(self) -> tuple[Tensor, Tensor]:
        """All inputs (n, in_features) and targets (n,), in their own units."""

    @property
    def target_std(self) -> float:
        """Standard deviation of the training targets, in their own unit."""
        _, targets = self._samples
        return targets[self._indices["train"]].std().item()

    @override
    def make_dataset(self, split: Split) -> LabelledDataset | None:
        train, rows = self._indices["train"], self._indices[split]
        if not len(rows):
            return None
        inputs, targets = ((x - x[train].mean(0)) / x[train].std(0) for x in self._samples)
        return VectorDataset(inputs[rows].float(), targets[rows].float())

    @cached_property
    def _samples(self) -> tuple[Tensor, Tensor]:
        inputs, targets = self.load()
        return inputs.double(), targets.double()

    @cached_property
    def _indices(self) -> dict[Split, Tensor]:
        """The samples of each split."""
        order = torch.randperm(len(self._samples[1]), generator=self.generator())
        test, order = self._taken(order, self.test_size, "test_size")
        val, train = self._taken(order, self.val_size, "val_size")
        return {"train": train, "val": val, "test": test}

    def _taken(self, order: Tensor, size: int | float, name: str) -> tuple[Tensor, Tensor]:
        count = round(size * len(order)) if 0 < size < 1 else int(size)
        if not 0 <= count < len(order):
            raise ValueError(
                f"{type(self).__name__}: expected {name} to be a number of samples below {len(order)} or a share "
                f"below 1, got {size}."
            )
        return order[:count], order[count:]


class DiabetesDataModule(RegressionDataModule):
    """442 patients, ten measurements, the progression of their diabetes after a year; scikit-learn ships it.

    Args:
        batch_size: samples of a training batch; an incomplete last batch is kept.
        test_size: test samples: a number, or a share below 1, drawn by ``seed``.
        val_size: validation samples taken out of what is left, likewise; 0 for none.
        eval_batch_size, num_workers, pin_memory, seed: see ``RegressionDataModule``.

    Source: Efron et al., "Least Angle Regression", 2004.

    Example:
        >>> data = DiabetesDataModule(test_size=100, batch_size=16)
        >>> inputs, targets = next(iter(data.train_dataloader()))
        >>> inputs.shape, targets.shape, round(data.target_std)
        (torch.Size([16, 10]), torch.Size([16]), 77)
    """

    in_features = 10

    @override
    def load(self) -> tuple[Tensor, Tensor]:
        inputs, targets = require("sklearn.datasets", "cli").load_diabetes(return_X_y=True)
        return torch.from_numpy(inputs), torch.from_numpy(targets)


class FriedmanDataModule(RegressionDataModule):
    """Friedman's first function: 10 sin(pi a b) + 20 (c - 1/2)^2 + 10 d + 5 e + noise of ten uniform inputs a, b, ... .

    Five of the ten inputs do not matter.

    Args:
        num_samples: of all splits together.
        noise: standard deviation of the noise.
        test_size, batch_size, val_size, eval_batch_size, num_workers, pin_memory: see ``RegressionDataModule``.
        seed: of the splits, and of the samples.

    Source: Friedman, "Multivariate Adaptive Regression Splines", 1991, as scikit-learn has it.

    Example:
        >>> data = FriedmanDataModule(num_samples=300, test_size=100, val_size=50)
        >>> len(data.train_set), len(data.val_set), len(data.test_set)
        (150, 50, 100)
    """

    in_features = 10

    def __init__(
        self,
        num_samples: int = 2200,
        noise: float = 1.0,
        test_size: int | float = 2000,
        batch_size: int = 32,
        val_size: int | float = 0,
        eval_batch_size: int = 500,
        num_workers: int = 0,
        pin_memory: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, test_size, val_size, eval_batch_size, num_workers, pin_memory, seed)
        self.num_samples = num_samples
        self.noise = noise

    @override
    def load(self) -> tuple[Tensor, Tensor]:
        inputs, targets = require("sklearn.datasets", "cli").make_friedman1(
            self.num_samples, n_features=10, noise=self.noise, random_state=self.seed
        )
        return torch.from_numpy(inputs), torch.from_numpy(targets)
