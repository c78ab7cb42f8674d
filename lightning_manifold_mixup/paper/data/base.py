"""What the data modules share: splits by seed, loaders, and the numbers that models and attacks need."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from lightning_manifold_mixup.paper.data.batches import ImageDataset, ImageFiles, LabelledDataset, collate
from lightning_manifold_mixup.paper.data.splits import draw_per_class, split_by_class

__all__ = ["ClassificationDataModule", "ImageDataModule", "ImageSpec", "Split", "SplitDataModule", "check_val_size"]

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
        kwargs: the arguments of ``SplitDataModule``.
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
    """
    if isinstance(val_size, str) and val_size != "test":
        raise ValueError(f'{owner}: expected val_size to be a number or "test", got {val_size!r}.')


@dataclass(frozen=True)
class ImageSpec:
    """Properties of an image data set.

    Args:
        class_names: name of each class, by label.
        image_size: side in pixels.
        mean, std: of each channel, in units where the brightest pixel is 1.
        padding: of the random crop in training.
        flip: whether training images are mirrored at random.
        max_value: the brightest pixel as stored.
    """

    class_names: tuple[str, ...]
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int
    flip: bool
    max_value: float = 255.0


class ImageDataModule(ClassificationDataModule):
    """Images as uint8, split by seed, augmented and normalised a batch at a time.

    Subclasses give a ``spec`` and ``load``.

    Args:
        batch_size: samples of a training batch (on each device).
        eval_batch_size: samples of a validation, test or prediction batch.
        val_size: validation samples taken out of the training split, class-balanced, by ``seed``: a number, or a share
            below 1; 0 for none. ``"test"`` validates on the test set: the papers' "best" error is the lowest of these.
        labels_per_class: train on that many samples of each class only, drawn by ``seed`` from what validation leaves;
            None for all. A smaller number gives a subset of a larger one.
        padding: of the random crop; None for the data set's own (the papers' code), 0 for none.
        flip: whether training images are mirrored at random; None for the data set's own.
        train_transform: in place of crop and flip, a transform of one uint8 image (channels, height, width), such as
            those of ``torchvision.transforms.v2``. Slower: it runs image by image.
        num_workers: worker processes of each loader, kept alive between epochs. For images in memory on two
            cores, 0 is the fastest; files that are decoded on request need more.
        pin_memory: page-locked batches, for faster copies to a GPU; without a GPU it has no effect.
        seed: of the splits and subsets. The order of batches and the augmentation follow ``seed_everything`` instead.

    Attributes:
        num_classes, in_channels, image_size, class_names: what a model needs to know.
        mean, std: normalisation in units where pixels go from 0 to 1; what an attack needs to know.
    """

    def __init__(
        self,
        batch_size: int = 100,
        eval_batch_size: int = 500,
        val_size: int | float | Literal["test"] = 0,
        labels_per_class: int | None = None,
        padding: int | None = None,
        flip: bool | None = None,
        train_transform: Callable[..., Any] | None = None,
        num_workers: int = 0,
        pin_memory: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, pin_memory, seed)
        check_val_size(type(self).__name__, val_size)
        if padding is not None and padding < 0:
            raise ValueError(f"{type(self).__name__}: expected padding of at least 0, got {padding}.")
        if train_transform is not None and (padding or flip):
            raise ValueError(
                f"{type(self).__name__}: expected either train_transform, which takes the place of crop and flip, or "
                f"padding and flip, got padding={padding}, flip={flip} beside it."
            )
        self.val_size = val_size
        self.labels_per_class = labels_per_class
        self.padding = padding
        self.flip = flip
        self.train_transform = train_transform
        self.flatten = False

    @property
    @abstractmethod
    def spec(self) -> ImageSpec:
        """Classes, size, normalisation and usual augmentation."""

    @abstractmethod
    def load(self, split: Split) -> tuple[Tensor | ImageFiles, Tensor] | None:
        """Images (n, channels, height, width) uint8 (or files) and labels (n,) int64; None if there is no such split.

        Raises:
            FileNotFoundError: says where it looked and which option downloads the data.
        """

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each class, by label."""
        return self.spec.class_names

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return self.spec.image_size

    @property
    def in_channels(self) -> int:
        """Channels of the images."""
        return len(self.spec.mean)

    @property
    def in_features(self) -> int:
        """Numbers in an image: what a fully connected network needs to know."""
        return self.in_channels * self.image_size**2

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel that is subtracted, for pixels from 0 to 1."""
        return self.spec.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel that is divided by, for pixels from 0 to 1."""
        return self.spec.std

    @override
    def make_dataset(self, split: Split) -> LabelledDataset | None:
        if split == "test" or (split == "val" and self.val_size == "test"):
            return self._evaluated(self.load("test"), "test")
        if split == "val" and self.val_size == 0:
            return self._evaluated(self.load("val"), "val")
        loaded = self.load("train")
        if loaded is None:
            return None
        images, labels = loaded
        kept, held_out = split_by_class(labels, 0 if self.val_size == "test" else self.val_size, self.generator())
        if split == "val":
            return self._evaluated((_select(images, held_out), labels[held_out]), "val")
        if self.labels_per_class is not None:
            kept = kept[draw_per_class(labels[kept], self.labels_per_class, self.generator())]
        return ImageDataset(
            self.decode(_select(images, kept), "train"),
            labels[kept],
            self.mean,
            self.std,
            max_value=self.spec.max_value,
            padding=self.spec.padding if self.padding is None else self.padding,
            flip=self.spec.flip if self.flip is None else self.flip,
            transform=self.train_transform,
            flatten=self.flatten,
        )

    def decode(self, images: Tensor | ImageFiles, split: str) -> Tensor | ImageFiles:
        """Override this to decode the chosen images of a split once, in advance."""
        return images

    def _evaluated(self, loaded: tuple[Tensor | ImageFiles, Tensor] | None, split: str) -> LabelledDataset | None:
        if loaded is None:
            return None
        images, labels = loaded
        images = self.decode(images, split)
        return ImageDataset(images, labels, self.mean, self.std, max_value=self.spec.max_value, flatten=self.flatten)


def _select(images: Tensor | ImageFiles, indices: Tensor) -> Tensor | ImageFiles:
    return images if len(indices) == len(images) else images.index_select(0, indices)
