"""Any folder of images, and Tiny-ImageNet, which is one."""

import hashlib
import os
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import Unpack, override

from lightning_manifold_mixup._step.extras import require
from lightning_manifold_mixup.paper.data.base import Split
from lightning_manifold_mixup.paper.data.downloads import downloading
from lightning_manifold_mixup.paper.data.image_base import ImageDataModule, ImageSpec
from lightning_manifold_mixup.paper.data.image_files import SUFFIXES, ImageFiles, find_images, read_image
from lightning_manifold_mixup.paper.data.options import ImageOptions

__all__ = ["ImageFolderDataModule", "TinyImageNetDataModule"]

BrokenFiles = Literal["raise", "skip", "unchecked"]


class _FolderDataModule(ImageDataModule):
    """Files ``<split>/<class>/**/<image>``.

    Args:
        data_dir: the folder.
        in_memory: decode every image once, to uint8, when the data is set up.
        cache_dir: keep the decoded images there, and read them from there (memory-mapped: the processes of one machine
            share them) as long as the files are the same. Only with ``in_memory``.
        broken_files: see ``ImageFolderDataModule``.
        kwargs: the arguments of ``ImageDataModule``.
    """

    def __init__(
        self,
        data_dir: str,
        in_memory: bool = False,
        cache_dir: str | None = None,
        broken_files: BrokenFiles = "raise",
        **kwargs: Unpack[ImageOptions],
    ) -> None:
        super().__init__(**kwargs)
        if broken_files not in ("raise", "skip", "unchecked"):
            raise ValueError(
                f"{type(self).__name__}: expected broken_files to be 'raise', 'skip' or 'unchecked', got "
                f"{broken_files!r}."
            )
        for name, wanted in (("cache_dir", cache_dir is not None), ("on_device", self.on_device)):
            if wanted and not in_memory:
                raise ValueError(f"{type(self).__name__}: expected in_memory=True with {name}, got in_memory=False.")
        self.data_dir = data_dir
        self.in_memory = in_memory
        self.cache_dir = cache_dir
        self.broken_files = broken_files

    @cached_property
    def root(self) -> Path:
        """The folder that has ``train``."""
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
        """Names of the folders in ``train``, sorted: their positions are the labels."""
        names = tuple(sorted(entry.name for entry in (self.root / "train").iterdir() if entry.is_dir()))
        if not names:
            raise FileNotFoundError(
                f"{type(self).__name__}: expected {self.root / 'train'} to have a folder for each class, found none."
            )
        empty = [name for name in names if not find_images(self.root / "train" / name)]
        if empty:
            raise FileNotFoundError(
                f"{type(self).__name__}: expected images ({', '.join(SUFFIXES)}) of each class in "
                f"{self.root / 'train'}, found none in {', '.join(empty)}. Take an empty folder away if it is no class."
            )
        return names

    @override
    def load(self, split: Split) -> tuple[Tensor | ImageFiles, Tensor] | None:
        folder = self._folder(split)
        if folder is None:
            return None
        paths, numbers = self._list(folder)
        images, labels = ImageFiles(paths, self.image_size, self._resize), torch.tensor(numbers, dtype=torch.long)
        if self.broken_files == "skip":
            kept = torch.tensor(images.readable()).nonzero().flatten()
            if len(kept) < len(images):
                left_out = sorted(set(paths) - set(images.index_select(0, kept).paths))
                rank_zero_warn(
                    f"{type(self).__name__}: {len(left_out)} of {len(images)} files in {folder} cannot be read and are "
                    f"left out: {', '.join(left_out[:3])}{', ...' if len(left_out) > 3 else ''}"
                )
                images, labels = images.index_select(0, kept), labels[kept]
        missing = [name for label, name in enumerate(self.folder_names) if not (labels == label).any()]
        if missing and split == "train":
            raise ValueError(f"{type(self).__name__}: no file of {', '.join(missing)} in {folder} can be read.")
        if missing:
            rank_zero_warn(
                f"{type(self).__name__}: {folder} has no images of {', '.join(missing)}, which are in train: its "
                "numbers are of the other classes only."
            )
        return images, labels

    @override
    def decode(self, images: Tensor | ImageFiles, split: str) -> Tensor | ImageFiles:
        if isinstance(images, Tensor):
            return images
        if not self.in_memory:
            if self.broken_files == "raise" or (self.broken_files == "skip" and not self._resize):
                images.check()
            return images
        return images.decode() if self.cache_dir is None else _cached(images, Path(self.cache_dir).expanduser(), split)

    _resize = True
    _remedy = "Set data_dir to a folder with train/<class>/<image> and test/<class>/<image> (or val/)."

    def _candidates(self, data_dir: Path) -> list[Path]:
        return [data_dir]

    def _folder(self, split: Split) -> Path | None:
        """Return the folder of a split. If only one of ``val`` and ``test`` exists, it is the test set."""
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
        """Image files below ``folder/<class>``, in a fixed order, and their labels."""
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
            files = find_images(entry)
            paths += files
            labels += [number[entry.name]] * len(files)
        if not paths:
            raise FileNotFoundError(
                f"{type(self).__name__}: expected images ({', '.join(SUFFIXES)}) in {folder}/<class>, found none."
            )
        return paths, labels


class ImageFolderDataModule(_FolderDataModule):
    """Any folder of images: ``train/<class>/...``, ``val/<class>/...``, ``test/<class>/...``.

    If only one of ``val`` and ``test`` exists, it is the test set. A ``val`` folder is also the validation set; to use
    it for the test alone, take the validation set out of the training images by ``val_size``.

    Args:
        data_dir: the folder that has ``train``.
        image_size: side in pixels: other images are resized (shorter side) and cropped in the centre. None: the size of
            the first training image, which all must have.
        mean, std: normalisation of each channel, for pixels from 0 to 1.
        in_memory: decode every image once, to uint8, when the data is set up.
        cache_dir: keep the decoded images there, and read them from there (memory-mapped: the processes of one machine
            share them) as long as the files are the same. Only with ``in_memory``.
        broken_files: what becomes of files that cannot be read (truncated ones, for instance). ``"raise"`` reads all
            files in ``setup``, before training, and names the first one; ``"skip"`` does so too, leaves them out, and
            says how many; ``"unchecked"`` saves the time of reading all files in advance.
        kwargs: the arguments of ``ImageDataModule``. By default, ``padding`` is an eighth of the side, ``flip`` is on.

    Raises:
        ValueError: for another ``broken_files``, or ``cache_dir`` or ``on_device`` without ``in_memory``. In ``setup``:
            for files that cannot be read or have another size, and classes in ``test`` that ``train`` lacks.
        FileNotFoundError: in ``setup``, if the folder is missing or has no images of a class.

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
        broken_files: BrokenFiles = "raise",
        **kwargs: Unpack[ImageOptions],
    ) -> None:
        super().__init__(data_dir, in_memory, cache_dir, broken_files, **kwargs)
        self._image_size = image_size
        self._mean = mean
        self._std = std
        self._resize = image_size is not None

    @cached_property
    def _spec(self) -> ImageSpec:
        size = self._image_size
        if size is None:
            files = find_images(self.root / "train" / self.folder_names[0])
            height, width = read_image(files[0]).shape[1:]
            if height != width:
                raise ValueError(
                    f"ImageFolderDataModule: expected square images where no image_size is set, got {width}x{height} "
                    f"in {files[0]}; image_size={min(height, width)} (any side in pixels) resizes the shorter side and "
                    "crops, for all images."
                )
            size = height
        return ImageSpec(self.folder_names, size, tuple(self._mean), tuple(self._std), padding=size // 8, flip=True)

    @property
    @override
    def spec(self) -> ImageSpec:
        return self._spec


class TinyImageNetDataModule(_FolderDataModule):
    """Tiny-ImageNet: 200 classes of 500 training images of 64x64 pixels; random flip and crop with padding 4.

    Its test images have no labels, so the 10,000 validation images are the test set, as is usual. They may lie as
    downloaded (``val/images`` and ``val/val_annotations.txt``) or sorted into ``val/<class>``. They are also the
    validation set, unless ``val_size`` takes that out of the training images.

    Args:
        data_dir: the folder that has ``train``, or has ``tiny-imagenet-200``, or where that will be put.
        download: download it there (237 MB) if it is missing.
        in_memory, cache_dir, broken_files: see ``ImageFolderDataModule``; all images take 1.3 GB.
        kwargs: the arguments of ``ImageDataModule``.

    Raises:
        ValueError, FileNotFoundError: as ``ImageFolderDataModule`` does.

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
        broken_files: BrokenFiles = "raise",
        **kwargs: Unpack[ImageOptions],
    ) -> None:
        super().__init__(data_dir, in_memory, cache_dir, broken_files, **kwargs)
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
            with downloading(type(self).__name__, "Tiny-ImageNet", data_dir):
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


def _cached(images: ImageFiles, folder: Path, split: str) -> Tensor:
    """Read decoded images from ``folder``; first decode and write them, if they are missing or files have changed."""
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
            os.replace(partial, file)  # in one step: another process finds a complete file or none
        finally:
            partial.unlink(missing_ok=True)
    cached: Tensor = torch.load(file, mmap=True, weights_only=True)
    return cached
