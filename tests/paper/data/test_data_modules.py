"""What holds for every data module: pickling and YAML."""

import pickle
from collections import Counter

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torchvision.transforms import v2

from lightning_manifold_mixup.paper.data import (
    CIFAR10DataModule,
    CIFAR100DataModule,
    DigitsDataModule,
    ImageFolderDataModule,
    SemiSupervisedDataModule,
    SpiralsDataModule,
    SVHNDataModule,
    TinyImageNetDataModule,
)
from tests.paper.data.samples import trainer


def instantiate(parser, config):
    method = "instantiate" if hasattr(parser, "instantiate") else "instantiate_classes"  # renamed in 2025
    return getattr(parser, method)(config).data


class Keeps(L.LightningModule):
    """Notes the batches of training and test."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.batches = []

    def training_step(self, batch, batch_idx):
        self.batches.append(batch)

    validation_step = test_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)


ALL = [
    DigitsDataModule(labels_per_class=5),
    SpiralsDataModule(num_arms=3),
    CIFAR10DataModule(),
    CIFAR100DataModule(padding=4),
    SVHNDataModule(),
    TinyImageNetDataModule(in_memory=True),
    ImageFolderDataModule("somewhere", image_size=32),
    SemiSupervisedDataModule(DigitsDataModule(), labels_per_class=5),
]


class TestForEveryModule:
    @pytest.mark.parametrize("data", ALL, ids=lambda data: type(data).__name__)
    def test_pickles(self, data):
        copy = pickle.loads(pickle.dumps(data))
        assert type(copy) is type(data)

    def test_pickles_after_setup(self):
        data = DigitsDataModule()
        data.setup("fit")
        assert torch.equal(pickle.loads(pickle.dumps(data)).train_set.images, data.train_set.images)

    @pytest.mark.parametrize("data", ALL, ids=lambda data: type(data).__name__)
    def test_yaml(self, data):
        """What a config file gives arrives, and the arguments of the base are arguments of each."""
        jsonargparse = pytest.importorskip("jsonargparse")
        yaml = pytest.importorskip("yaml")
        parser = jsonargparse.ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(L.LightningDataModule, "data")
        name = type(data).__name__
        args = [f"--data=lightning_manifold_mixup.paper.data.{name}"]
        if name == "SemiSupervisedDataModule":
            args += ["--data.datamodule=DigitsDataModule", "--data.datamodule.seed=3", "--data.labels_per_class=4"]
        else:
            args += ["--data.batch_size=7", "--data.seed=3", "--data.val_size=0.125"]
            args += ["--data.data_dir=here"] if name == "ImageFolderDataModule" else []
        config = parser.parse_args(args)
        built = instantiate(parser, parser.parse_object(yaml.safe_load(parser.dump(config))))
        assert type(built) is type(data)
        if name == "SemiSupervisedDataModule":
            assert (built.labels_per_class, built.datamodule.seed) == (4, 3)
        else:
            assert (built.batch_size, built.seed, built.val_size) == (7, 3, 0.125)

    def test_yaml_transform_and_test_validation(self):
        jsonargparse = pytest.importorskip("jsonargparse")
        parser = jsonargparse.ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(L.LightningDataModule, "data")
        args = ["--data=DigitsDataModule", "--data.val_size=test"]
        args += ["--data.train_transform=torchvision.transforms.v2.RandomVerticalFlip", "--data.train_transform.p=1.0"]
        built = instantiate(parser, parser.parse_args(args))
        assert built.val_size == "test"
        assert isinstance(built.train_transform, v2.RandomVerticalFlip)
        assert built.train_set[0][0].shape == (1, 8, 8)


class TestOnTheTrainersDevice:
    @pytest.mark.parametrize("few_labels", [False, True])
    @pytest.mark.parametrize("accelerator", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu, id="gpu")])
    def test_batches_are_the_same(self, few_labels, accelerator, tmp_path):
        runs = []
        for options in ({}, {"on_device": True}):
            data = DigitsDataModule(test_size=100, padding=1, **options)
            shown = SemiSupervisedDataModule(data, labels_per_class=5) if few_labels else data
            module = Keeps()
            L.seed_everything(3)
            t = trainer(tmp_path, accelerator=accelerator)
            t.fit(module, shown)
            t.test(module, shown, verbose=False)
            runs.append(module.batches)
            devices = Counter(part.images.device.type for part in (data.train_set, data.test_set))
            assert devices == {"cuda" if options and accelerator == "gpu" else "cpu": 2}
        flat = [[part for part in tree_leaves(run) if torch.is_tensor(part)] for run in runs]
        assert len(flat[0]) == len(flat[1]) > 30
        for tensor, other in zip(*flat, strict=True):
            assert other.is_cuda == (accelerator == "gpu")
            torch.testing.assert_close(other.cpu(), tensor.cpu())

    def test_workers_are_refused(self):
        with pytest.raises(ValueError, match=r"DigitsDataModule: expected num_workers=0 with on_device, .* got 2"):
            DigitsDataModule(on_device=True, num_workers=2)

    def test_files_are_refused(self):
        with pytest.raises(ValueError, match="ImageFolderDataModule: expected in_memory=True with on_device"):
            ImageFolderDataModule("somewhere", on_device=True)
