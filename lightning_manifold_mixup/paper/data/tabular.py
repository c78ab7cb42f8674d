"""Tables of numbers with a number to predict: diabetes, and Friedman's function."""

from abc import ABC, abstractmethod
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_manifold_mixup._step.extras import require
from lightning_manifold_mixup.paper.data.base import Split

__all__ = ["DiabetesDataModule", "FriedmanDataModule", "RegressionDataModule"]


class RegressionDataModule(L.LightningDataModule, ABC):
    """Batches of inputs (n, in_features) and targets (n,), both float32 and standardised.

    All splits are shifted and scaled by mean and standard deviation of the training samples: a root mean squared error
    of 1 is about that of predicting the mean, whatever the unit of the targets. Subclasses give ``load``.

    Args:
        batch_size: samples of a training batch; an incomplete last batch is kept.
        eval_batch_size: of a validation, test or prediction batch.
        test_size: test samples: a number, or a share below 1, drawn by ``seed``.
        val_size: validation samples taken out of what is left, likewise; 0 for none.
        seed: of the splits. The order of batches follows ``seed_everything`` instead.

    Attributes:
        in_features: numbers in a sample; what a fully connected network needs to know.
        target_std: standard deviation of the training targets, in their own unit.
    """

    in_features: int

    def __init__(
        self,
        batch_size: int = 32,
        eval_batch_size: int = 500,
        test_size: int | float = 0.25,
        val_size: int | float = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.test_size, self.val_size, self.seed = test_size, val_size, seed
        self._splits: dict[Split, TensorDataset] | None = None

    @abstractmethod
    def load(self) -> tuple[Tensor, Tensor]:
        """All inputs (n, in_features) and targets (n,), in their own units."""

    @property
    def target_std(self) -> float:
        """Standard deviation of the training targets, in their own unit."""
        _ = self.splits
        return self._target_std

    @property
    def splits(self) -> dict[Split, TensorDataset]:
        """The standardised samples of each split; made when first asked for."""
        if self._splits is None:
            inputs, targets = (part.double() for part in self.load())
            order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(self.seed))
            test, order = self._taken(order, self.test_size, "test_size")
            val, train = self._taken(order, self.val_size, "val_size")
            inputs = (inputs - inputs[train].mean(0)) / inputs[train].std(0)
            self._target_std = targets[train].std().item()
            targets = (targets - targets[train].mean()) / self._target_std
            parts: dict[Split, Tensor] = {"train": train, "val": val, "test": test}
            self._splits = {
                name: TensorDataset(inputs[part].float(), targets[part].float()) for name, part in parts.items()
            }
        return self._splits

    def _taken(self, order: Tensor, size: int | float, name: str) -> tuple[Tensor, Tensor]:
        count = round(size * len(order)) if 0 < size < 1 else int(size)
        if not 0 <= count < len(order):
            raise ValueError(
                f"{type(self).__name__}: expected {name} to be a number of samples below {len(order)} or a share "
                f"below 1, got {size}."
            )
        return order[:count], order[count:]

    @override
    def setup(self, stage: str) -> None:
        if stage in ("fit", "validate") and not len(self.splits["val"]):
            # Lightning takes an empty list for a mistake and warns; a hook that is not overridden it does not call.
            self.val_dataloader = super().val_dataloader  # type: ignore[method-assign]

    @override
    def train_dataloader(self) -> Any:
        return DataLoader(self.splits["train"], self.batch_size, shuffle=True)

    @override
    def val_dataloader(self) -> Any:
        return DataLoader(self.splits["val"], self.eval_batch_size)

    @override
    def test_dataloader(self) -> Any:
        return DataLoader(self.splits["test"], self.eval_batch_size)

    @override
    def predict_dataloader(self) -> Any:
        return self.test_dataloader()


class DiabetesDataModule(RegressionDataModule):
    """442 patients, ten measurements, the progression of their diabetes after a year; scikit-learn ships it.

    Args:
        kwargs: the arguments of ``RegressionDataModule``.

    Source: Efron et al., "Least Angle Regression", 2004.

    Example:
        >>> data = DiabetesDataModule(test_size=100, batch_size=16)
        >>> inputs, targets = next(iter(data.train_dataloader()))
        >>> inputs.shape, targets.shape, round(data.target_std)
        (torch.Size([16, 10]), torch.Size([16]), 77)
    """

    in_features = 10

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

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
        kwargs: the arguments of ``RegressionDataModule``; ``seed`` draws the samples too.

    Source: Friedman, "Multivariate Adaptive Regression Splines", 1991, as scikit-learn has it.

    Example:
        >>> data = FriedmanDataModule(num_samples=300, test_size=100, val_size=50)
        >>> {name: len(samples) for name, samples in data.splits.items()}
        {'train': 150, 'val': 50, 'test': 100}
    """

    in_features = 10

    def __init__(
        self, num_samples: int = 2200, noise: float = 1.0, test_size: int | float = 2000, **kwargs: Any
    ) -> None:
        super().__init__(test_size=test_size, **kwargs)
        self.num_samples = num_samples
        self.noise = noise

    @override
    def load(self) -> tuple[Tensor, Tensor]:
        inputs, targets = require("sklearn.datasets", "cli").make_friedman1(
            self.num_samples, n_features=10, noise=self.noise, random_state=self.seed
        )
        return torch.from_numpy(inputs), torch.from_numpy(targets)
