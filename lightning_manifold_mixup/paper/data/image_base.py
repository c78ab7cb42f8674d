"""What the data modules of images share: the description of a data set, splits, augmentation and normalisation."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from typing_extensions import override

from lightning_manifold_mixup.paper.data.base import ClassificationDataModule, Split, check_val_size
from lightning_manifold_mixup.paper.data.batches import ImageDataset, LabelledDataset
from lightning_manifold_mixup.paper.data.image_files import ImageFiles
from lightning_manifold_mixup.paper.data.splits import draw_per_class, split_by_class

__all__ = ["ImageDataModule", "ImageSpec"]


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

    Example:
        >>> ImageSpec(("cat", "dog"), image_size=32, mean=(0.5,), std=(0.5,), padding=4, flip=True).max_value
        255.0
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
        on_device: keep the images on the Trainer's device, as uint8, and crop, flip and normalise there: the fastest
            where a GPU would wait for the host. The batches are the same. Images must be in memory, not files.
        num_workers: worker processes of each loader, kept alive between epochs. For images in memory on two
            cores, 0 is the fastest; files that are decoded on request need more.
        pin_memory: page-locked batches, for faster copies to a GPU; without a GPU it has no effect.
        seed: of the splits and subsets. The order of batches and the augmentation follow ``seed_everything`` instead.

    Attributes:
        num_classes, in_channels, image_size, class_names: what a model needs to know.
        mean, std: normalisation in units where pixels go from 0 to 1; what an attack needs to know.

    Raises:
        ValueError: for a batch size below 1, a negative ``padding``, a ``val_size`` that is neither a number nor
            ``"test"``, a ``train_transform`` beside crop or flip, or ``on_device`` beside ``num_workers``. In
            ``setup``: if ``val_size`` or ``labels_per_class`` asks for more samples than there are.

    Example:
        >>> import torch
        >>> class Stripes(ImageDataModule):
        ...     spec = ImageSpec(("lying", "standing"), image_size=4, mean=(0.5,), std=(0.5,), padding=1, flip=True)
        ...     def load(self, split):
        ...         lying = torch.tensor([0, 255], dtype=torch.uint8).repeat(2).view(1, 4, 1).expand(1, 4, 4)
        ...         return torch.stack([lying, lying.mT] * 10), torch.tensor([0, 1] * 10)
        >>> data = Stripes(batch_size=8, val_size=4)
        >>> images, labels = next(iter(data.train_dataloader()))
        >>> images.shape, len(data.train_set), len(data.val_set), data.num_classes
        (torch.Size([8, 1, 4, 4]), 16, 4, 2)
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
        on_device: bool = False,
        num_workers: int = 0,
        pin_memory: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, pin_memory and not on_device, seed)
        check_val_size(type(self).__name__, val_size)
        if padding is not None and padding < 0:
            raise ValueError(f"{type(self).__name__}: expected padding of at least 0, got {padding}.")
        if train_transform is not None and (padding or flip):
            raise ValueError(
                f"{type(self).__name__}: expected either train_transform, which takes the place of crop and flip, or "
                f"padding and flip, got padding={padding}, flip={flip} beside it."
            )
        if on_device and num_workers:
            raise ValueError(
                f"{type(self).__name__}: expected num_workers=0 with on_device, where batches are made on the device, "
                f"got {num_workers}."
            )
        self.val_size = val_size
        self.labels_per_class = labels_per_class
        self.padding = padding
        self.flip = flip
        self.train_transform = train_transform
        self.on_device = on_device
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
    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.on_device and self.trainer is not None:
            for dataset in self._datasets.values():
                if isinstance(dataset, ImageDataset):
                    dataset.to(self.trainer.strategy.root_device)

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
