"""CIFAR-10, CIFAR-100 and SVHN as torchvision reads them, with the papers' augmentation."""

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Unpack, override

from lightning_manifold_mixup._step.extras import require
from lightning_manifold_mixup.paper.data.base import Split
from lightning_manifold_mixup.paper.data.downloads import downloading
from lightning_manifold_mixup.paper.data.image_base import ImageDataModule, ImageSpec
from lightning_manifold_mixup.paper.data.image_files import ImageFiles
from lightning_manifold_mixup.paper.data.options import ImageOptions

__all__ = [
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "SVHNDataModule",
]


_CIFAR100_NAMES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""


class _TorchvisionDataModule(ImageDataModule):
    """A data set that torchvision downloads and reads whole.

    Subclasses give ``dataset_name``, its class in torchvision, and its ``constants``.

    Args:
        data_dir: where the data is or will be put.
        download: download it there (in ``prepare_data``, once a node) if it is missing.
        kwargs: the arguments of ``ImageDataModule``.
    """

    dataset_name: ClassVar[str]
    constants: ClassVar[ImageSpec]

    def __init__(self, data_dir: str = "data", download: bool = False, **kwargs: Unpack[ImageOptions]) -> None:
        super().__init__(**kwargs)
        self.data_dir = data_dir
        self.download = download

    @property
    @override
    def spec(self) -> ImageSpec:
        return self.constants

    @override
    def prepare_data(self) -> None:
        if self.download:
            for split in ("train", "test"):
                with downloading(type(self).__name__, self.dataset_name, Path(self.data_dir)):
                    self._open(split, download=True)

    @override
    def load(self, split: Split) -> tuple[Tensor | ImageFiles, Tensor] | None:
        if split == "val":
            return None
        try:
            dataset = self._open(split)
        except RuntimeError as error:
            raise FileNotFoundError(
                f"{type(self).__name__}: no {self.dataset_name} in {Path(self.data_dir).resolve()} (or incomplete). "
                f"Set data_dir to the folder that has it, or download=True (YAML: download: true) to download it there."
            ) from error
        images = torch.from_numpy(np.ascontiguousarray(self._channels_first(dataset.data)))
        labels = dataset.labels if hasattr(dataset, "labels") else dataset.targets
        return images, torch.as_tensor(labels, dtype=torch.long)

    def _open(self, split: str, download: bool = False) -> Any:
        dataset_class = getattr(require("torchvision.datasets", "cli"), self.dataset_name)
        return dataset_class(self.data_dir, train=split == "train", download=download)

    def _channels_first(self, data: Any) -> Any:
        return data.transpose(0, 3, 1, 2)


class CIFAR10DataModule(_TorchvisionDataModule):
    """CIFAR-10: 50,000 training and 10,000 test images of 32x32 pixels; random flip and crop with padding 2.

    Args:
        data_dir: folder with ``cifar-10-batches-py``, or where it will be put.
        download: download it there if it is missing.
        kwargs: the arguments of ``ImageDataModule``. Most other work on CIFAR uses padding 4.

    Example:
        >>> CIFAR10DataModule("no/such/folder").num_classes
        10
        >>> CIFAR10DataModule("no/such/folder").setup("fit")
        Traceback (most recent call last):
            ...
        FileNotFoundError: CIFAR10DataModule: no CIFAR10 in ...no/such/folder (or incomplete). Set data_dir to ...
    """

    dataset_name = "CIFAR10"
    constants = ImageSpec(
        class_names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        image_size=32,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        padding=2,
        flip=True,
    )


class CIFAR100DataModule(_TorchvisionDataModule):
    """CIFAR-100: as CIFAR-10 with 100 (fine) classes.

    Args:
        data_dir: folder with ``cifar-100-python``, or where it will be put.
        download: download it there if it is missing.
        kwargs: the arguments of ``ImageDataModule``.

    Example:
        >>> CIFAR100DataModule().class_names[:3]
        ('apple', 'aquarium_fish', 'baby')
    """

    dataset_name = "CIFAR100"
    constants = replace(
        CIFAR10DataModule.constants,
        class_names=tuple(_CIFAR100_NAMES.split()),
        mean=(0.5071, 0.4867, 0.4408),
        std=(0.2675, 0.2565, 0.2761),
    )


class SVHNDataModule(_TorchvisionDataModule):
    """SVHN: 73,257 training and 26,032 test images of 32x32 pixels; random crop with padding 2, no flip.

    Args:
        data_dir: folder with ``train_32x32.mat`` and ``test_32x32.mat``, or where they will be put.
        download: download them there if they are missing.
        kwargs: the arguments of ``ImageDataModule``.

    Example:
        >>> SVHNDataModule().mean
        (0.5, 0.5, 0.5)
    """

    dataset_name = "SVHN"
    constants = ImageSpec(
        class_names=tuple("0123456789"),
        image_size=32,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        padding=2,
        flip=False,
    )

    @override
    def _open(self, split: str, download: bool = False) -> Any:
        return require("torchvision.datasets", "cli").SVHN(self.data_dir, split=split, download=download)

    @override
    def _channels_first(self, data: Any) -> Any:
        return data
