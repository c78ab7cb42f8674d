"""What all data modules share: splits by seed, loaders, and the numbers that models need."""

from abc import ABC, abstractmethod
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from lightning_manifold_mixup.paper.data.batches import LabelledDataset, collate

__all__ = ["ClassificationDataModule", "Split", "SplitDataModule", "check_val_size"]

Split = Literal["train", "val", "test"]


class SplitDataModule(L.LightningDataModule, ABC):
    """Loaders of (input, label) batches over a training, a validation and a test set, made when first asked for.

    Training is shuffled, evaluation is not. An incomplete last batch is kept. Under DDP, Lightning adds its distributed
    sampler. Subclasses make the sets (``make_dataset``).

    Args:
        batch_size: samples of a training batch (on each device).
        eval_batch_size: of a validation, test or prediction batch.
        num_workers: worker processes of each loader, kept alive between epochs. For data in memory on two
            cores, 0 is the fastest; files that are decoded on request need more.
        pin_memory: page-locked batches, for faster copies to a GPU; without a GPU it has no effect.
        seed: of the splits and subsets. The order of batches follows ``seed_everything`` instead.

    Raises:
        ValueError: for a batch size below 1.

    Example:
        >>> from lightning_manifold_mixup.paper.data.batches import VectorDataset
        >>> class Squares(SplitDataModule):
        ...     def make_dataset(self, split):
        ...         x = torch.rand({"train": 10, "val": 4, "test": 4}[split], 1, generator=self.generator())
        ...         return VectorDataset(x, x.squeeze(1) ** 2)
        >>> [len(x) for x, y in Squares(batch_size=4).train_dataloader()]
        [4, 4, 2]
    """

    def __init__(
        self,
        batch_size: int = 100,
        eval_batch_size: int = 500,
        num_workers: int = 0,
        pin_memory: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if value < 1:
                raise ValueError(f"{type(self).__name__}: expected {name} of at least 1, got {value}.")
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.seed = seed
        self._datasets: dict[Split, LabelledDataset | None] = {}

    @abstractmethod
    def make_dataset(self, split: Split) -> LabelledDataset | None:
        """Load one of the sets; None if there is no such set."""

    @property
    def train_set(self) -> LabelledDataset:
        """The labelled samples to train on, augmented."""
        return self._needed("train")

    @property
    def val_set(self) -> LabelledDataset | None:
        """The validation samples; None if there are none, and then Lightning skips validation."""
        return self._dataset("val")

    @property
    def test_set(self) -> LabelledDataset:
        """The test samples."""
        return self._needed("test")

    @override
    def setup(self, stage: str) -> None:
        if stage == "fit":
            self._dataset("train")
            if self._dataset("test") is None:  # looked for now, since training takes hours and a test comes after it
                self.test_dataloader = super().test_dataloader  # type: ignore[method-assign]  # as below
        if stage in ("fit", "validate") and self.val_set is None:
            # Lightning warns if this hook returns an empty list, but not if the hook is not overridden.
            self.val_dataloader = super().val_dataloader  # type: ignore[method-assign]
        if stage in ("test", "predict"):
            self._dataset("test")

    @override
    def train_dataloader(self) -> Any:
        return self.loader(self.train_set, self.batch_size, shuffle=True)

    @override
    def val_dataloader(self) -> Any:
        return [] if self.val_set is None else self.loader(self.val_set, self.eval_batch_size)

    @override
    def test_dataloader(self) -> Any:
        return self.loader(self.test_set, self.eval_batch_size)

    @override
    def predict_dataloader(self) -> Any:
        return self.test_dataloader()

    def loader(
        self, dataset: Dataset[tuple[Tensor, Tensor]], batch_size: int, shuffle: bool = False, sampler: Any = None
    ) -> DataLoader[tuple[Tensor, Tensor]]:
        """Make a loader with this module's workers; batches are lists or tuples of (inputs, labels)."""
        return DataLoader(
            dataset,
            batch_size=batch_size,
            shuffle=shuffle if sampler is None else None,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=collate,
            pin_memory=self.pin_memory and torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )

    def generator(self) -> torch.Generator:
        """Make a generator from ``seed``. Each kind of draw uses a new one, so that one does not change another."""
        return torch.Generator().manual_seed(self.seed)

    def _dataset(self, split: Split) -> LabelledDataset | None:
        if split not in self._datasets:
            self._datasets[split] = self.make_dataset(split)
        return self._datasets[split]

    def _needed(self, split: Split) -> LabelledDataset:
        dataset = self._dataset(split)
        if dataset is None:
            raise ValueError(f"{type(self).__name__}: there is no {split} set.")
        return dataset


class ClassificationDataModule(SplitDataModule):
    """A ``SplitDataModule`` whose labels are classes. Subclasses also name these (``class_names``).

    Args:
        batch_size: samples of a training batch (on each device).
        eval_batch_size: of a validation, test or prediction batch.
        num_workers: worker processes of each loader.
        pin_memory: page-locked batches, for faster copies to a GPU.
        seed: of the splits and subsets.

    Attributes:
        num_classes, class_names: what a model needs to know.

    Raises:
        ValueError: for a batch size below 1.

    Example:
        >>> from lightning_manifold_mixup.paper.data.batches import VectorDataset
        >>> class Signs(ClassificationDataModule):
        ...     class_names = ("negative", "positive")
        ...     def make_dataset(self, split):
        ...         x = torch.randn(10, 1, generator=self.generator())
        ...         return VectorDataset(x, (x.squeeze(1) > 0).long())
        >>> Signs().num_classes
        2
    """

    @property
    @abstractmethod
    def class_names(self) -> tuple[str, ...]:
        """Name of each class, by label."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)


def check_val_size(owner: str, val_size: int | float | str) -> None:
    """Refuse a ``val_size`` that is neither a number nor ``"test"``.

    Args:
        owner: the data module, for the message.
        val_size: samples, a share of them, or ``"test"``: validate on the test set.

    Raises:
        ValueError: for another string.

    Example:
        >>> check_val_size("DigitsDataModule", "train")
        Traceback (most recent call last):
            ...
        ValueError: DigitsDataModule: expected val_size to be a number or "test", got 'train'.
    """
    if isinstance(val_size, str) and val_size != "test":
        raise ValueError(f'{owner}: expected val_size to be a number or "test", got {val_size!r}.')
