"""Few labels and many images: a labelled and an unlabelled loader over any of the project's data modules."""

import os
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import DistributedSampler, Subset
from typing_extensions import override

from lightning_manifold_mixup.paper.data.base import ClassificationDataModule
from lightning_manifold_mixup.paper.data.splits import draw_per_class

__all__ = ["RepeatingSampler", "SemiSupervisedDataModule"]


class SemiSupervisedDataModule(L.LightningDataModule):
    """Training batches ``{"labelled": (x, y), "unlabelled": (x, y)}`` of a few labelled samples and of all samples.

    An epoch is one pass over the unlabelled samples: the training split without validation, labelled samples included.
    Each step also has a full batch of labelled samples, which are repeated, each time in a new order. The labels of the
    unlabelled batch serve for measuring, not for training. Validation, test and prediction are those of ``datamodule``.
    Under DDP each process has its own share of both.

    The labelled samples are drawn by the seed of ``datamodule``, as its own ``labels_per_class`` would draw them, so
    that a supervised run has the same ones. Their indices are saved in each checkpoint; resuming with others is an
    error.

    Args:
        datamodule: any of the project's data modules, without ``labels_per_class``. Its ``batch_size`` is not used.
        labels_per_class: labelled samples of each class.
        labelled_batch_size: labelled samples of a step (on each device); may exceed their total number.
        unlabelled_batch_size: unlabelled samples of a step (on each device).

    Raises:
        ValueError: if ``datamodule`` is itself limited by ``labels_per_class``, or has too few samples of a class.

    Source: Verma et al. 2019, semi-supervised experiments (ICLR 2019 version, section 5.2).

    Example:
        >>> from lightning_manifold_mixup.paper.data import DigitsDataModule
        >>> data = SemiSupervisedDataModule(DigitsDataModule(val_size=100), labels_per_class=5)
        >>> train_set = data.datamodule.train_set
        >>> len(train_set), train_set.labels[data.labelled_indices].bincount()
        (900, tensor([5, 5, 5, 5, 5, 5, 5, 5, 5, 5]))
    """

    def __init__(
        self,
        datamodule: ClassificationDataModule,
        labels_per_class: int,
        labelled_batch_size: int = 100,
        unlabelled_batch_size: int = 100,
    ) -> None:
        super().__init__()
        limit = getattr(datamodule, "labels_per_class", None)
        if limit is not None:
            raise ValueError(
                f"SemiSupervisedDataModule: expected a data module with labels_per_class=None (all its samples are the "
                f"unlabelled ones), got {limit}; give labels_per_class to SemiSupervisedDataModule alone."
            )
        for name, value in (
            ("labels_per_class", labels_per_class),
            ("labelled_batch_size", labelled_batch_size),
            ("unlabelled_batch_size", unlabelled_batch_size),
        ):
            if value < 1:
                raise ValueError(f"SemiSupervisedDataModule: expected {name} of at least 1, got {value}.")
        self.datamodule = datamodule
        self.labels_per_class = labels_per_class
        self.labelled_batch_size = labelled_batch_size
        self.unlabelled_batch_size = unlabelled_batch_size
        self._indices: Tensor | None = None
        self._restored: list[int] | None = None

    def __getattr__(self, name: str) -> Any:
        """Look up in the wrapped data module what models and attacks need (``num_classes``, ``mean``, ...)."""
        if name in _FORWARDED and "datamodule" in self.__dict__:
            return getattr(self.datamodule, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def labelled_indices(self) -> Tensor:
        """Positions of the labelled samples in the wrapped module's training set, sorted, int64."""
        if self._indices is None:
            labels = self.datamodule.train_set.labels
            self._indices = draw_per_class(labels, self.labels_per_class, self.datamodule.generator())
        return self._indices

    @override
    def prepare_data(self) -> None:
        self.datamodule.prepare_data()

    @override
    def setup(self, stage: str) -> None:
        self.datamodule.trainer = self.trainer  # which knows the device
        self.datamodule.setup(stage)
        if not is_overridden("test_dataloader", self.datamodule, L.LightningDataModule):
            self.test_dataloader = super().test_dataloader  # type: ignore[method-assign]  # there is no test set
        if stage in ("fit", "validate") and self.datamodule.val_set is None:
            self.val_dataloader = super().val_dataloader  # type: ignore[method-assign]  # as in ClassificationDataModule

    @override
    def train_dataloader(self) -> CombinedLoader:
        indices = self.labelled_indices
        if self._restored is not None and self._restored != indices.tolist():
            raise ValueError(
                f"SemiSupervisedDataModule: expected the {len(self._restored)} labelled samples of the checkpoint, "
                f"got {len(indices)}, {len(set(self._restored) & set(indices.tolist()))} of them the same; resume with "
                "the same data, seed, val_size and labels_per_class."
            )
        unlabelled = self.datamodule.train_set
        ranks: dict[str, Any] = (self.trainer.distributed_sampler_kwargs if self.trainer is not None else None) or {}
        share = -(-len(unlabelled) // ranks.get("num_replicas", 1))
        steps = -(-share // self.unlabelled_batch_size)
        labelled = Subset(unlabelled, indices.tolist())
        sampler = RepeatingSampler(labelled, steps * self.labelled_batch_size, **ranks)
        return CombinedLoader(
            {
                "labelled": self.datamodule.loader(labelled, self.labelled_batch_size, sampler=sampler),
                "unlabelled": self.datamodule.loader(unlabelled, self.unlabelled_batch_size, shuffle=True),
            },
            mode="max_size_cycle",
        )

    @override
    def val_dataloader(self) -> Any:
        return self.datamodule.val_dataloader()

    @override
    def test_dataloader(self) -> Any:
        return self.datamodule.test_dataloader()

    @override
    def predict_dataloader(self) -> Any:
        return self.datamodule.predict_dataloader()

    @override
    def state_dict(self) -> dict[str, Any]:
        indices = self._restored if self._indices is None else self._indices.tolist()
        return {} if indices is None else {"labelled_indices": indices}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict.get("labelled_indices")  # compared when training data is asked for


class RepeatingSampler(DistributedSampler[Any]):
    """Repeats a data set, each pass in a new order, until ``num_samples`` are drawn; under DDP a share of them.

    Lightning's own distributed sampler would repeat one order within an epoch when its loader is cycled.

    Args:
        dataset: anything with a length.
        num_samples: indices that each process draws in an epoch.
        num_replicas, rank: processes, and which one this is.
        seed: of the orders, with the epoch; None follows ``seed_everything``.

    Example:
        >>> sorted(RepeatingSampler(range(3), 6, seed=0))
        [0, 0, 1, 1, 2, 2]
    """

    def __init__(
        self, dataset: Any, num_samples: int, num_replicas: int = 1, rank: int = 0, seed: int | None = None
    ) -> None:
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        super().__init__(dataset, num_replicas, rank, seed=seed)
        self.size = len(dataset)
        self.num_samples = num_samples
        self.total_size = num_samples * num_replicas

    @override
    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        passes = [torch.randperm(self.size, generator=generator) for _ in range(-(-self.total_size // self.size))]
        return iter(torch.cat(passes)[self.rank : self.total_size : self.num_replicas].tolist())


_FORWARDED = ("class_names", "image_size", "in_channels", "in_features", "mean", "num_classes", "std")
