"""Data modules of images, text and tables: split by seed, class-balanced subsets, the papers' augmentation."""

from lightning_manifold_mixup.paper.data.base import ClassificationDataModule
from lightning_manifold_mixup.paper.data.digits import DigitsDataModule
from lightning_manifold_mixup.paper.data.folders import ImageFolderDataModule, TinyImageNetDataModule
from lightning_manifold_mixup.paper.data.image_base import ImageDataModule
from lightning_manifold_mixup.paper.data.images import CIFAR10DataModule, CIFAR100DataModule, SVHNDataModule
from lightning_manifold_mixup.paper.data.resized import ResizedDataModule
from lightning_manifold_mixup.paper.data.semi_supervised import SemiSupervisedDataModule
from lightning_manifold_mixup.paper.data.shapes import ShapesDataModule
from lightning_manifold_mixup.paper.data.spirals import SpiralsDataModule
from lightning_manifold_mixup.paper.data.tabular import DiabetesDataModule, FriedmanDataModule, RegressionDataModule
from lightning_manifold_mixup.paper.data.text import TextDataModule

__all__ = [
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "ClassificationDataModule",
    "DiabetesDataModule",
    "DigitsDataModule",
    "FriedmanDataModule",
    "ImageDataModule",
    "ImageFolderDataModule",
    "RegressionDataModule",
    "ResizedDataModule",
    "SVHNDataModule",
    "SemiSupervisedDataModule",
    "ShapesDataModule",
    "SpiralsDataModule",
    "TextDataModule",
    "TinyImageNetDataModule",
]
