"""Data modules: split by seed, class-balanced subsets, the papers' augmentation, images in memory."""

from lightning_manifold_mixup.paper.data.base import ClassificationDataModule, ImageDataModule
from lightning_manifold_mixup.paper.data.digits import DigitsDataModule
from lightning_manifold_mixup.paper.data.folders import ImageFolderDataModule, TinyImageNetDataModule
from lightning_manifold_mixup.paper.data.images import CIFAR10DataModule, CIFAR100DataModule, SVHNDataModule
from lightning_manifold_mixup.paper.data.semi_supervised import SemiSupervisedDataModule
from lightning_manifold_mixup.paper.data.spirals import SpiralsDataModule

__all__ = [
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "ClassificationDataModule",
    "DigitsDataModule",
    "ImageDataModule",
    "ImageFolderDataModule",
    "SVHNDataModule",
    "SemiSupervisedDataModule",
    "SpiralsDataModule",
    "TinyImageNetDataModule",
]
