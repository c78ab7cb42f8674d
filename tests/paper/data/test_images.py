"""CIFAR and SVHN, from small files in their formats."""

import numpy as np
import pytest
import torch

from lightning_manifold_mixup.paper.data import (
    CIFAR10DataModule,
    CIFAR100DataModule,
    SVHNDataModule,
)
from tests.paper.data.samples import write_cifar


class TestTorchvisionData:
    @pytest.mark.parametrize(("module", "classes"), [(CIFAR10DataModule, 10), (CIFAR100DataModule, 100)])
    def test_cifar(self, module, classes, tmp_path, monkeypatch):
        from torchvision import datasets

        written = write_cifar(tmp_path, classes)
        for name in ("CIFAR10", "CIFAR100"):
            monkeypatch.setattr(getattr(datasets, name), "_check_integrity", lambda self: True)
        from torchvision.datasets import cifar

        monkeypatch.setattr(cifar, "check_integrity", lambda path, md5=None: True)
        data = module(str(tmp_path))
        for split, dataset in (("train", data.train_set), ("test", data.test_set)):
            images, labels = written[split]
            assert torch.equal(dataset.images, images)
            assert dataset.labels.tolist() == labels
        assert (data.num_classes, data.in_channels, data.image_size) == (classes, 3, 32)
        assert len(set(data.class_names)) == classes
        assert list(data.class_names) == sorted(data.class_names)
        assert (data.train_set.padding, data.train_set.flip) == (2, True)

    def test_svhn(self, tmp_path, monkeypatch):
        io = pytest.importorskip("scipy.io")
        from torchvision.datasets import svhn

        generator = np.random.default_rng(0)
        images = generator.integers(0, 256, (32, 32, 3, 20), dtype=np.uint8)
        labels = np.array([[1 + index % 10] for index in range(20)])  # 10 stands for 0
        for split in ("train", "test"):
            io.savemat(tmp_path / f"{split}_32x32.mat", {"X": images, "y": labels})
        monkeypatch.setattr(svhn, "check_integrity", lambda path, md5=None: True)
        data = SVHNDataModule(str(tmp_path), val_size=10)
        assert torch.equal(data.test_set.images, torch.from_numpy(images).permute(3, 2, 0, 1))
        assert data.test_set.labels.tolist() == [(1 + index) % 10 for index in range(20)]
        assert (len(data.train_set), len(data.val_set)) == (10, 10)
        assert (data.train_set.padding, data.train_set.flip) == (2, False)

    @pytest.mark.parametrize(
        ("module", "name"), [(CIFAR10DataModule, "CIFAR10"), (CIFAR100DataModule, "CIFAR100"), (SVHNDataModule, "SVHN")]
    )
    def test_download_is_for_prepare_data_and_only_if_asked(self, module, name, tmp_path, monkeypatch):
        from torchvision import datasets

        with pytest.raises(FileNotFoundError, match=rf"no {name} in {tmp_path}.*download: true"):
            module(str(tmp_path)).setup("fit")
        calls = []
        monkeypatch.setattr(datasets, name, lambda root, download, **which: calls.append((download, which)))
        module(str(tmp_path)).prepare_data()
        assert not calls
        module(str(tmp_path), download=True).prepare_data()
        assert [download for download, _ in calls] == [True, True]
        assert calls[0][1] != calls[1][1]
