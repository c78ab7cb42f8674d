"""The digits, and what all image data modules share."""

import sys

import pytest
import torch
from torch import nn

from lightning_manifold_mixup.paper.data import (
    DigitsDataModule,
)
from tests.paper.data.samples import Tiny, trainer


class TestDigits:
    def test_is_sklearns_data(self):
        from sklearn.datasets import load_digits

        data = DigitsDataModule()
        x = torch.cat([s.__getitems__(range(len(s)))[0] for s in (data.train_set, data.test_set)])
        y = torch.cat([data.train_set.labels, data.test_set.labels])
        pixels = (x * data.std[0] + data.mean[0]) * 16
        ours = sorted((*row.round().int().tolist(), label) for row, label in zip(pixels.flatten(1), y.tolist()))  # noqa: B905
        digits = load_digits()
        theirs = sorted((*map(int, row), int(label)) for row, label in zip(digits.data, digits.target, strict=True))
        assert ours == theirs
        assert x.mean().item() == pytest.approx(0, abs=1e-3)
        assert x.std().item() == pytest.approx(1, abs=1e-3)

    def test_sizes(self):
        data = DigitsDataModule()
        assert (len(data.train_set), len(data.test_set), data.val_set) == (1000, 797, None)
        counts = data.train_set.labels.bincount()
        assert counts.max() - counts.min() <= 6  # classes have 174 to 183
        assert (data.num_classes, data.in_channels, data.image_size, data.in_features) == (10, 1, 8, 64)
        x, y = next(iter(data.train_dataloader()))
        assert (x.shape, x.dtype, y.shape, y.dtype) == ((100, 1, 8, 8), torch.float32, (100,), torch.int64)
        assert next(iter(DigitsDataModule(flatten=True).test_dataloader()))[0].shape == (500, 64)

    def test_no_last_batch_is_dropped(self):
        data = DigitsDataModule(batch_size=300, eval_batch_size=400)
        assert [len(y) for _, y in data.train_dataloader()] == [300, 300, 300, 100]
        assert [len(y) for _, y in data.test_dataloader()] == [400, 397]
        assert [len(y) for _, y in data.predict_dataloader()] == [400, 397]

    def test_validation_and_subsets(self):
        whole = DigitsDataModule(val_size=200)
        few = DigitsDataModule(val_size=200, labels_per_class=5)
        assert (len(whole.train_set), len(whole.val_set)) == (800, 200)
        assert few.train_set.labels.bincount().tolist() == [5] * 10
        assert torch.equal(few.val_set.images, whole.val_set.images)  # the same whatever the subset

        def rows(dataset):
            return {bytes(image.flatten().tolist()) for image in dataset.images}

        sets = [rows(s) for s in (whole.train_set, whole.val_set, whole.test_set)]
        assert not sets[0] & sets[1]
        assert not sets[0] & sets[2]
        assert not sets[1] & sets[2]
        assert rows(few.train_set) < rows(DigitsDataModule(val_size=200, labels_per_class=10).train_set) < sets[0]
        other = DigitsDataModule(val_size=200, labels_per_class=5, seed=1)
        assert rows(other.train_set) != rows(few.train_set)
        assert rows(other.test_set) != sets[2]

    def test_validate_on_test(self):
        data = DigitsDataModule(val_size="test")
        assert torch.equal(data.val_set.images, data.test_set.images)
        assert len(data.train_set) == 1000
        with pytest.raises(ValueError, match="a number or \"test\", got 'tset'"):
            DigitsDataModule(val_size="tset")

    def test_training_is_shuffled_and_evaluation_is_not(self):
        data = DigitsDataModule(val_size=100)
        torch.manual_seed(0)
        first, second = (torch.cat([y for _, y in data.train_dataloader()]) for _ in range(2))
        assert not torch.equal(first, second)
        assert torch.equal(first.bincount(), second.bincount())
        assert torch.equal(torch.cat([y for _, y in data.val_dataloader()]), data.val_set.labels)

    def test_augmentation_is_of_training_only(self):
        data = DigitsDataModule(val_size=100, padding=1, flip=True)
        for split in (data.val_set, data.test_set):
            assert (split.padding, split.flip, split.transform) == (0, False, None)
        assert (data.train_set.padding, data.train_set.flip) == (1, True)
        assert (DigitsDataModule().train_set.padding, DigitsDataModule().train_set.flip) == (0, False)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"batch_size": 0}, "expected batch_size of at least 1, got 0"),
            ({"eval_batch_size": 0}, "expected eval_batch_size of at least 1, got 0"),
            ({"padding": -1}, "expected padding of at least 0, got -1"),
            ({"train_transform": nn.Identity(), "padding": 2}, "expected either train_transform"),
        ],
    )
    def test_bad_arguments(self, options, message):
        with pytest.raises(ValueError, match=message):
            DigitsDataModule(**options)

    def test_trains_with_and_without_validation(self, tmp_path):
        torch.manual_seed(0)
        for val_size in (0, 100):
            model, data = Tiny(64, 10), DigitsDataModule(val_size=val_size)
            run = trainer(tmp_path, max_epochs=5)
            run.fit(model, datamodule=data)
            assert ("val_error" in run.callback_metrics) == bool(val_size)
            (result,) = run.test(model, datamodule=data, verbose=False)
            assert result["test_error"] < 0.15

    def test_workers_give_the_same_data(self):
        data = DigitsDataModule(num_workers=1, padding=1)
        loader = data.test_dataloader()
        assert loader.persistent_workers
        x, y = next(iter(loader))
        x0, y0 = next(iter(DigitsDataModule().test_dataloader()))
        assert torch.equal(x, x0)
        assert torch.equal(y, y0)

    def test_missing_scikit_learn(self, monkeypatch):
        for module in [key for key in sys.modules if key.partition(".")[0] == "sklearn"]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, "sklearn", None)
        with pytest.raises(ModuleNotFoundError, match=r"`sklearn` is needed here.*lightning-manifold-mixup\[cli\]"):
            DigitsDataModule().setup("fit")
