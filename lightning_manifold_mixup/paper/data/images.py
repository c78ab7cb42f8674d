"""CIFAR-10, CIFAR-100, SVHN, Tiny-ImageNet and any folder of images, with the papers' augmentation."""

import hashlib
import os
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from lightning_manifold_mixup._step.extras import require
from lightning_manifold_mixup.paper.data.base import ImageDataModule, ImageSpec, Split
from lightning_manifold_mixup.paper.data.batches import ImageFiles, read_image

__all__ = [
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "ImageFolderDataModule",
    "SVHNDataModule",
    "TinyImageNetDataModule",
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
    """A data set that torchvision downloads and reads whole: `dataset_name` is its class there, `constants` the rest.

    Args:
        data_dir: where the data is or is to be put.
        download: download it there (in `prepare_data`, once a node) if it is missing.
        kwargs: the arguments of `ImageDataModule`.
    """

    dataset_name: ClassVar[str]
    constants: ClassVar[ImageSpec]

    def __init__(
        self,
        data_dir: str = "data",
        download: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            **kwargs,
        )
        self.data_dir = data_dir
        self.download = download

    @property
    @override
    def spec(self) -> ImageSpec:
        return self.constants

    @override
    def prepare_data(self) -> None:
        if self.download:
            for train in (True, False):
                self._open(train, download=True)

    @override
    def load(self, split: Split) -> tuple[Tensor | ImageFiles, Tensor] | None:
        if split == "val":
            return None
        try:
            dataset = self._open(split == "train", download=False)
        except RuntimeError as error:
            raise FileNotFoundError(
                f"{type(self).__name__}: no {self.dataset_name} in {Path(self.data_dir).resolve()} (or incomplete). "
                f"Set data_dir to the folder that has it, or download=True (YAML: download: true) to download it there."
            ) from error
        images = torch.from_numpy(np.ascontiguousarray(self._channels_first(dataset.data)))
        labels = dataset.labels if hasattr(dataset, "labels") else dataset.targets
        return images, torch.as_tensor(labels, dtype=torch.long)

    def _open(self, train: bool, download: bool) -> Any:
        dataset_class = getattr(require("torchvision.datasets", "cli"), self.dataset_name)
        return dataset_class(self.data_dir, train=train, download=download)

    def _channels_first(self, data: Any) -> Any:
        return data.transpose(0, 3, 1, 2)


class CIFAR10DataModule(_TorchvisionDataModule):
    """CIFAR-10: 50,000 training and 10,000 test images of 32x32 pixels; random flip and crop with padding 2.

    Args:
        data_dir: folder with `cifar-10-batches-py`, or where it is to be put.
        download: download it there if it is missing.
        kwargs: the arguments of `ImageDataModule`. Most other work on CIFAR uses padding 4.

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
        data_dir: folder with `cifar-100-python`, or where it is to be put.
        download: download it there if it is missing.
        kwargs: the arguments of `ImageDataModule`.

    Example:
        >>> CIFAR100DataModule().class_names[:3]
        ('apple', 'aquarium_fish', 'baby')
    """

    dataset_name = "CIFAR100"
    constants = ImageSpec(
        class_names=tuple(_CIFAR100_NAMES.split()),
        image_size=32,
        mean=(0.5071, 0.4867, 0.4408),
        std=(0.2675, 0.2565, 0.2761),
        padding=2,
        flip=True,
    )


class SVHNDataModule(_TorchvisionDataModule):
    """SVHN: 73,257 training and 26,032 test images of 32x32 pixels; random crop with padding 2, no flip.

    Args:
        data_dir: folder with `train_32x32.mat` and `test_32x32.mat`, or where they are to be put.
        download: download them there if they are missing.
        kwargs: the arguments of `ImageDataModule`.

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
    def _open(self, train: bool, download: bool) -> Any:
        datasets = require("torchvision.datasets", "cli")
        return datasets.SVHN(self.data_dir, split="train" if train else "test", download=download)

    @override
    def _channels_first(self, data: Any) -> Any:
        return data


class _FolderDataModule(ImageDataModule):
    """Files `<split>/<class>/**/<image>`.

    Args:
        data_dir: the folder.
        in_memory: decode every image once, to uint8, when the data is set up.
        cache_dir: keep the decoded images there, and read them from there (memory-mapped: the processes of one machine
            share them) as long as the files are the same. Only with `in_memory`.
        kwargs: the arguments of `ImageDataModule`.
    """

    def __init__(
        self,
        data_dir: str,
        in_memory: bool = False,
        cache_dir: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            **kwargs,
        )
        if cache_dir is not None and not in_memory:
            raise ValueError(f"{type(self).__name__}: expected in_memory=True with cache_dir, got in_memory=False.")
        self.data_dir = data_dir
        self.in_memory = in_memory
        self.cache_dir = cache_dir

    @cached_property
    def root(self) -> Path:
        """The folder that has `train`."""
        candidates = self._candidates(Path(self.data_dir).expanduser())
        for root in candidates:
            if (root / "train").is_dir():
                return root
        raise FileNotFoundError(
            f"{type(self).__name__}: no folder {' or '.join(str((root / 'train').resolve()) for root in candidates)}. "
            f"{self._remedy}"
        )

    @cached_property
    def folder_names(self) -> tuple[str, ...]:
        """Names of the folders in `train`, sorted: their positions are the labels."""
        names = tuple(sorted(entry.name for entry in (self.root / "train").iterdir() if entry.is_dir()))
        if not names:
            raise FileNotFoundError(
                f"{type(self).__name__}: expected {self.root / 'train'} to have a folder for each class, found none."
            )
        return names

    @override
    def load(self, split: Split) -> tuple[Tensor | ImageFiles, Tensor] | None:
        folder = self._folder(split)
        if folder is None:
            return None
        paths, labels = self._list(folder)
        return ImageFiles(paths, self.image_size, self._resize), torch.tensor(labels, dtype=torch.long)

    @override
    def decode(self, images: Tensor | ImageFiles, split: str) -> Tensor | ImageFiles:
        if not self.in_memory or isinstance(images, Tensor):
            return images
        return images.decode() if self.cache_dir is None else _cached(images, Path(self.cache_dir).expanduser(), split)

    _resize = True
    _remedy = "Set data_dir to a folder with train/<class>/<image> and test/<class>/<image> (or val/)."

    def _candidates(self, data_dir: Path) -> list[Path]:
        return [data_dir]

    def _folder(self, split: Split) -> Path | None:
        """`split`'s folder. What is held out under one name only, `val` or `test`, is the test set."""
        val, test = self.root / "val", self.root / "test"
        if split == "train":
            return self.root / "train"
        if split == "val":
            return val if val.is_dir() else None
        if not isinstance(self.val_size, str) and self.val_size > 0 and val.is_dir() and test.is_dir():
            raise ValueError(
                f"{type(self).__name__}: expected val_size to be 0, because {self.root} has val and test folders, got "
                f"{self.val_size}."
            )
        if test.is_dir():
            return test
        return val if val.is_dir() else None

    def _list(self, folder: Path) -> tuple[list[str], list[int]]:
        """Image files below `folder/<class>`, in a fixed order, and their labels."""
        number = {name: label for label, name in enumerate(self.folder_names)}
        paths: list[str] = []
        labels: list[int] = []
        for entry in sorted(entry for entry in folder.iterdir() if entry.is_dir()):
            if entry.name not in number:
                near = get_close_matches(entry.name, number)
                raise ValueError(
                    f"{type(self).__name__}: expected the classes of {self.root / 'train'} in {folder}, got "
                    f"{entry.name!r}" + (f"; did you mean {' or '.join(near)}?" if near else ".")
                )
            files = _image_files(entry)
            paths += files
            labels += [number[entry.name]] * len(files)
        if not paths:
            raise FileNotFoundError(
                f"{type(self).__name__}: expected images ({', '.join(_SUFFIXES)}) in {folder}/<class>, found none."
            )
        return paths, labels


class ImageFolderDataModule(_FolderDataModule):
    """Any folder of images: `train/<class>/...`, `val/<class>/...`, `test/<class>/...`.

    Where only one of `val` and `test` is there, it is the test set. A `val` folder is the validation set too; to
    keep it for the test where it is the only one, let `val_size` take validation out of the training images.

    Args:
        data_dir: the folder that has `train`.
        image_size: side in pixels: other images are resized (shorter side) and cropped in the centre. None: the size of
            the first training image, which all must have.
        mean, std: normalisation of each channel, for pixels from 0 to 1.
        in_memory: decode every image once, to uint8, when the data is set up.
        cache_dir: keep the decoded images there, and read them from there (memory-mapped: the processes of one machine
            share them) as long as the files are the same. Only with `in_memory`.
        kwargs: the arguments of `ImageDataModule`. Left alone, `padding` is an eighth of the image, `flip` is on.

    Example:
        >>> ImageFolderDataModule("no/such/folder").setup("fit")
        Traceback (most recent call last):
            ...
        FileNotFoundError: ImageFolderDataModule: no folder ...no/such/folder/train. Set data_dir to a folder with ...
    """

    def __init__(
        self,
        data_dir: str,
        image_size: int | None = None,
        mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
        std: tuple[float, float, float] = (0.5, 0.5, 0.5),
        in_memory: bool = False,
        cache_dir: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            data_dir,
            in_memory,
            cache_dir,
            **kwargs,
        )
        self._image_size = image_size
        self._mean = mean
        self._std = std
        self._resize = image_size is not None

    @cached_property
    def _spec(self) -> ImageSpec:
        size = self._image_size
        if size is None:
            files = _image_files(self.root / "train" / self.folder_names[0])
            size = min(read_image(files[0]).shape[1:]) if files else 0
        return ImageSpec(self.folder_names, size, tuple(self._mean), tuple(self._std), padding=size // 8, flip=True)

    @property
    @override
    def spec(self) -> ImageSpec:
        return self._spec


class TinyImageNetDataModule(_FolderDataModule):
    """Tiny-ImageNet: 200 classes of 500 training images of 64x64 pixels; random flip and crop with padding 4.

    Its test images have no labels: as everywhere, the 10,000 validation images are the test set. They may lie as they
    come (`val/images` and `val/val_annotations.txt`) or sorted into `val/<class>`. They are the validation set
    too, unless `val_size` takes that out of the training images.

    Args:
        data_dir: the folder that has `train`, or has `tiny-imagenet-200`, or where that is to be put.
        download: download it there (237 MB) if it is missing.
        in_memory: decode every image once, to uint8 (1.3 GB), when the data is set up.
        cache_dir: keep the decoded images there, and read them from there (memory-mapped: the processes of one machine
            share them) as long as the files are the same. Only with `in_memory`.
        kwargs: the arguments of `ImageDataModule`.

    Example:
        >>> TinyImageNetDataModule("no/such/folder").setup("fit")
        Traceback (most recent call last):
            ...
        FileNotFoundError: TinyImageNetDataModule: no folder ... Set data_dir to ..., or download=True ...
    """

    _remedy = (
        "Set data_dir to the folder that has tiny-imagenet-200, or download=True (YAML: download: true) to download it "
        "there."
    )
    _url = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
    _md5 = "90528d7ca1a48142e341f4ef8d21d0de"

    def __init__(
        self,
        data_dir: str = "data",
        download: bool = False,
        in_memory: bool = False,
        cache_dir: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            data_dir,
            in_memory,
            cache_dir,
            **kwargs,
        )
        self.download = download

    @property
    def num_classes(self) -> int:
        """Number of classes, known without the data."""
        return 200

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return 64

    @property
    @override
    def spec(self) -> ImageSpec:
        return ImageSpec(self.folder_names, 64, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), padding=4, flip=True)

    @override
    def prepare_data(self) -> None:
        data_dir = Path(self.data_dir).expanduser()
        if self.download and not any((root / "train").is_dir() for root in self._candidates(data_dir)):
            utils = require("torchvision.datasets.utils", "cli")
            utils.download_and_extract_archive(self._url, str(data_dir), md5=self._md5)

    @override
    def _candidates(self, data_dir: Path) -> list[Path]:
        return [data_dir / "tiny-imagenet-200", data_dir]

    @override
    def _folder(self, split: Split) -> Path | None:
        return self.root / ("train" if split == "train" else "val")

    @override
    def _list(self, folder: Path) -> tuple[list[str], list[int]]:
        annotations = folder / "val_annotations.txt"
        if not annotations.is_file():
            return super()._list(folder)
        number = {name: label for label, name in enumerate(self.folder_names)}
        rows = sorted(line.split("\t")[:2] for line in annotations.read_text().splitlines() if line)
        return [str(folder / "images" / file) for file, _ in rows], [number[name] for _, name in rows]


_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def _image_files(folder: Path) -> list[str]:
    """Image files below a folder, sorted."""
    found = (
        os.path.join(where, name)
        for where, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.lower().endswith(_SUFFIXES)
    )
    return sorted(found)


def _cached(images: ImageFiles, folder: Path, split: str) -> Tensor:
    """Decoded images from `folder`, decoding and writing them first if they are not there or the files have changed."""
    digest = hashlib.sha256()
    for path in images.paths:
        stat = os.stat(path)
        digest.update(f"{os.path.abspath(path)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    file = folder / f"{split}-{len(images)}x{images.size}px-{digest.hexdigest()[:16]}.pt"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}.partial")
        try:
            torch.save(images.decode(), partial)
            os.replace(partial, file)  # at once: another process finds a whole file or none
        finally:
            partial.unlink(missing_ok=True)
    cached: Tensor = torch.load(file, mmap=True, weights_only=True)
    return cached
