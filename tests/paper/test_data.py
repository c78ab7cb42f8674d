import json
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

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
from lightning_manifold_mixup.paper.data.batches import ImageDataset, collate, normalize, random_crop, random_flip
from lightning_manifold_mixup.paper.data.semi_supervised import RepeatingSampler
from lightning_manifold_mixup.paper.data.spirals import spirals
from lightning_manifold_mixup.paper.data.splits import draw_per_class, split_by_class

v2 = pytest.importorskip("torchvision.transforms.v2")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("sklearn")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Tiny(L.LightningModule):
    """A linear classifier of flattened inputs."""

    def __init__(self, features, classes, semi_supervised=False):
        super().__init__()
        self.linear = nn.Linear(features, classes)
        self.semi_supervised = semi_supervised
        self.steps = []

    def training_step(self, batch, batch_idx):
        if self.semi_supervised:
            self.steps.append({name: y.clone() for name, (_, y) in batch.items()})
            batch = batch["labelled"]
        x, y = batch
        return nn.functional.cross_entropy(self.linear(x.flatten(1)), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_error", (self.linear(x.flatten(1)).argmax(1) != y).float().mean())

    def test_step(self, batch, batch_idx):
        x, y = batch
        self.log("test_error", (self.linear(x.flatten(1)).argmax(1) != y).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def trainer(tmp_path, **kwargs):
    options = {"max_epochs": 1, "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options |= {"accelerator": "cpu", "default_root_dir": tmp_path, "enable_checkpointing": False}
    return L.Trainer(**(options | kwargs))


class TestSplits:
    @pytest.mark.parametrize("size", [0, 1, 37, 100, 0.25, 0.1])
    def test_keeps_shares(self, size):
        labels = torch.cat([torch.full((count,), label) for label, count in enumerate((50, 100, 7, 200))])
        labels = labels[torch.randperm(len(labels), generator=seeded())]
        first, second = split_by_class(labels, size, seeded(1))
        assert sorted(first.tolist() + second.tolist()) == list(range(len(labels)))
        wanted = round(size * 357) if isinstance(size, float) else size
        assert len(second) == wanted
        for label, count in enumerate((50, 100, 7, 200)):
            assert abs((labels[second] == label).sum().item() - count * wanted / 357) < 1

    def test_follows_the_generator(self):
        labels = torch.arange(100) % 4
        draws = [split_by_class(labels, 20, seeded(seed))[1].tolist() for seed in (0, 0, 1)]
        assert draws[0] == draws[1] != draws[2]

    def test_is_uniform_within_a_class(self):
        labels = torch.arange(20) % 2
        generator = seeded()
        counts = torch.zeros(20)
        for _ in range(2000):
            counts[split_by_class(labels, 6, generator)[1]] += 1
        assert (counts / 2000 - 0.3).abs().max() < 4 * (0.3 * 0.7 / 2000) ** 0.5

    @pytest.mark.parametrize("size", [-1, 100, 101, 1.0, 1.5, 3.7])
    def test_sizes_that_are_refused(self, size):
        if size == 1.0:  # a whole number: one sample
            assert len(split_by_class(torch.zeros(100), size, seeded())[1]) == 1
            return
        with pytest.raises(ValueError, match=r"from 0 to 99 or a share from 0 to below 1, got"):
            split_by_class(torch.zeros(100), size, seeded())

    def test_labels_per_class(self):
        labels = torch.cat([torch.arange(5).repeat(10), torch.arange(2).repeat(50)])
        drawn = draw_per_class(labels, 7, seeded())
        assert labels[drawn].bincount().tolist() == [7] * 5
        assert len(set(drawn.tolist())) == 35
        assert set(draw_per_class(labels, 3, seeded()).tolist()) < set(drawn.tolist())
        with pytest.raises(ValueError, match="at most 10, the training samples of class 2, got 11"):
            draw_per_class(labels, 11, seeded())
        with pytest.raises(ValueError, match="at least 1, got 0"):
            draw_per_class(labels, 0, seeded())


class TestAugmentation:
    def test_crop_at_given_offsets_is_a_slice_of_the_padded_image(self):
        images = torch.randint(256, (12, 3, 6, 5), dtype=torch.uint8)
        offsets = torch.randint(5, (12, 2))
        cropped = random_crop(images, 2, offsets)
        for image, (row, column), result in zip(images, offsets.tolist(), cropped, strict=True):
            padded = np.pad(image.numpy(), ((0, 0), (2, 2), (2, 2)))
            np.testing.assert_array_equal(result.numpy(), padded[:, row : row + 6, column : column + 5])

    def test_same_distribution_as_torchvision_for_each_image(self):
        """Every outcome of v2's crop and flip, equally often, independently for the images of one batch."""
        image = torch.arange(1, 10, dtype=torch.uint8).view(1, 3, 3)
        transform = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomCrop(3, padding=1)])
        theirs = Counter(bytes(transform(image).flatten().tolist()) for _ in range(3000))
        torch.manual_seed(0)
        n = 9000
        batch = random_flip(random_crop(image.expand(n, 1, 3, 3), 1))
        outcomes = [bytes(row) for row in batch.flatten(1).tolist()]
        ours = Counter(outcomes)
        assert set(ours) == set(theirs)
        assert len(ours) == 18
        chi2 = sum((count - n / 18) ** 2 / (n / 18) for count in ours.values())
        assert chi2 < 40.8  # 17 degrees of freedom, p = 0.001
        pairs = Counter(zip(outcomes[::2], outcomes[1::2], strict=True))  # neighbours in the batch are independent
        assert len(pairs) > 0.99 * 18**2
        expected = n / 2 / 18**2
        chi2 = sum((pairs[a, b] - expected) ** 2 / expected for a in ours for b in ours)
        assert chi2 < 408  # 323 degrees of freedom, p = 0.001

    def test_inputs_are_left_as_they_are(self):
        images = torch.randint(256, (8, 3, 4, 4), dtype=torch.uint8)
        copy = images.clone()
        random_flip(random_crop(images, 1))
        normalize(images, [0.5] * 3, [0.5] * 3)
        data = ImageDataset(images, torch.arange(8), [0.5] * 3, [0.5] * 3, padding=1, flip=True)
        data.__getitems__(range(8))
        assert torch.equal(images, copy)

    def test_normalize_is_torchvisions(self):
        images = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
        mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
        theirs = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])(images)
        torch.testing.assert_close(normalize(images, mean, std), theirs, rtol=1e-5, atol=1e-6)

    def test_own_transform_runs_image_by_image(self):
        images = torch.randint(256, (6, 3, 4, 4), dtype=torch.uint8)
        plain = ImageDataset(images, torch.arange(6), [0.0] * 3, [1.0] * 3)
        data = ImageDataset(images, torch.arange(6), [0.0] * 3, [1.0] * 3, transform=v2.RandomVerticalFlip(p=1.0))
        assert torch.equal(data.__getitems__([1, 4])[0], plain.__getitems__([1, 4])[0].flip(-2))

    def test_samples_are_rows_of_batches(self):
        data = ImageDataset(torch.randint(256, (6, 1, 4, 4)).byte(), torch.arange(6), [0.5], [0.5])
        x, y = data.__getitems__([4, 0])
        for row, index in enumerate((4, 0)):
            assert torch.equal(data[index][0], x[row])
            assert data[index][1] == y[row] == index
        loader = DataLoader(Subset(data, [5, 3, 1]), batch_size=2, collate_fn=collate)
        assert [y.tolist() for _, y in loader] == [[5, 3], [1]]

    def test_labels_must_fit(self):
        with pytest.raises(ValueError, match="as many labels as images, got 3 and 2"):
            ImageDataset(torch.zeros(2, 1, 2, 2), torch.zeros(3), [0.5], [0.5])


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


class TestSpirals:
    def test_points_lie_on_their_arm(self):
        points, labels = spirals(200, 3, turns=1.25, noise=0.0, generator=seeded())
        radius = points.norm(dim=1)
        position = (radius - 0.1) / 0.9
        assert 0 <= position.min() < 0.02
        assert 0.98 < position.max() <= 1
        angle = torch.atan2(points[:, 1], points[:, 0])
        expected = 2 * torch.pi * (1.25 * position + labels / 3)
        assert torch.cos(angle - expected).min() > 1 - 1e-5
        assert labels.bincount().tolist() == [200] * 3

    def test_noise(self):
        clean, noisy = (spirals(5000, 2, 1.5, noise, seeded())[0] for noise in (0.0, 0.1))
        assert (noisy - clean).std().item() == pytest.approx(0.1, rel=0.02)

    def test_splits(self):
        data = SpiralsDataModule(samples_per_class=100, test_samples_per_class=40, num_arms=3, val_size=0.2)
        assert (len(data.train_set), len(data.val_set), len(data.test_set)) == (240, 60, 120)
        assert data.val_set.labels.bincount().tolist() == [20] * 3
        assert (data.num_classes, data.class_names, data.in_features) == (3, ("0", "1", "2"), 2)
        longer = SpiralsDataModule(samples_per_class=200, test_samples_per_class=40, num_arms=3, val_size="test")
        assert torch.equal(longer.test_set.inputs, data.test_set.inputs)
        assert torch.equal(longer.val_set.inputs, data.test_set.inputs)
        assert SpiralsDataModule().val_set is None
        assert not torch.equal(SpiralsDataModule(seed=1).train_set.inputs, SpiralsDataModule().train_set.inputs)


COLOURS = {"cat": 0, "dog": 1, "eel": 2}


def draw_images(folder, count, size=(6, 6), suffix="png", seed=0):
    generator = np.random.default_rng(seed)
    for name in COLOURS:
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index:03d}.{suffix}")


@pytest.fixture
def image_folder(tmp_path):
    root = tmp_path / "images"
    draw_images(root / "train", 12)
    draw_images(root / "test", 4, seed=1)
    return root


class TestImageFolder:
    @pytest.mark.parametrize("in_memory", [False, True])
    def test_is_torchvisions_image_folder(self, image_folder, in_memory):
        from torchvision.datasets import ImageFolder

        mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
        data = ImageFolderDataModule(str(image_folder), mean=mean, std=std, in_memory=in_memory, padding=0, flip=False)
        transform = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
        for split, ours in (("train", data.train_set), ("test", data.test_set)):
            theirs = ImageFolder(image_folder / split, transform)
            assert data.class_names == tuple(theirs.classes)
            assert len(ours) == len(theirs)
            for index, (image, label) in enumerate(theirs):
                assert ours[index][1] == label
                torch.testing.assert_close(ours[index][0], image, rtol=1e-5, atol=1e-6)
        assert (data.num_classes, data.in_channels, data.image_size) == (3, 3, 6)
        assert isinstance(data.train_set.images, torch.Tensor) == in_memory
        assert data.val_set is None

    def test_on_request_is_augmented_like_in_memory(self, image_folder):
        batches = []
        for in_memory in (False, True):
            data = ImageFolderDataModule(str(image_folder), in_memory=in_memory, padding=1)
            torch.manual_seed(3)
            batches.append(list(data.train_dataloader()))
        for (x, y), (x2, y2) in zip(*batches, strict=True):
            assert torch.equal(x, x2)
            assert torch.equal(y, y2)

    def test_only_the_subset_is_decoded(self, image_folder, monkeypatch):
        from lightning_manifold_mixup.paper.data import batches

        read = []
        original = batches.read_image
        monkeypatch.setattr(batches, "read_image", lambda path: read.append(path) or original(path))
        data = ImageFolderDataModule(str(image_folder), in_memory=True, labels_per_class=2, val_size=3)
        assert len(data.train_set) == 6
        assert len(read) == 6
        assert len(data.val_set) == 3
        assert len(set(read)) == 9
        list(data.train_dataloader())
        assert len(read) == 9

    def test_default_augmentation(self, image_folder):
        train = ImageFolderDataModule(str(image_folder), image_size=32).train_set
        assert (train.padding, train.flip) == (4, True)

    def test_validation_folders(self, image_folder, tmp_path):
        draw_images(image_folder / "val", 2, seed=2)
        data = ImageFolderDataModule(str(image_folder))
        assert [len(s) for s in (data.train_set, data.val_set, data.test_set)] == [36, 6, 12]
        with pytest.raises(ValueError, match=r"expected val_size to be 0, because .* got 6"):
            ImageFolderDataModule(str(image_folder), val_size=6).setup("test")
        (image_folder / "test").rename(tmp_path / "gone")
        data = ImageFolderDataModule(str(image_folder))
        assert [len(s) for s in (data.train_set, data.val_set, data.test_set)] == [36, 6, 6]
        data = ImageFolderDataModule(str(image_folder), val_size=0.25)
        assert [len(s) for s in (data.train_set, data.val_set, data.test_set)] == [27, 9, 6]
        (image_folder / "val").rename(tmp_path / "gone2")
        with pytest.raises(ValueError, match="there is no test set"):
            _ = ImageFolderDataModule(str(image_folder)).test_set

    def test_other_sizes(self, image_folder):
        Image.new("RGB", (9, 7), (10, 20, 30)).save(image_folder / "train" / "dog" / "odd.png")
        data = ImageFolderDataModule(str(image_folder), in_memory=True)
        with pytest.raises(ValueError, match=r"6x6 pixels like the first one, got 9x7 in .*odd\.png; set image_size"):
            data.setup("fit")
        data = ImageFolderDataModule(str(image_folder), image_size=4, padding=0, flip=False)
        x, _ = data.train_set[0]
        pixels = v2.functional.pil_to_tensor(Image.open(image_folder / "train" / "cat" / "000.png"))
        expected = v2.Compose([v2.Resize(4, antialias=True), v2.CenterCrop(4)])(pixels)
        torch.testing.assert_close(x, (expected / 255 - 0.5) / 0.5)
        odd = data.train_set[24][0]  # the last dog
        torch.testing.assert_close(odd[:, 0, 0], (torch.tensor([10, 20, 30]) / 255 - 0.5) / 0.5)

    def test_formats(self, tmp_path):
        for name, mode, suffix in (("a", "L", "png"), ("c", "RGBA", "png"), ("d", "CMYK", "jpg"), ("e", "RGB", "bmp")):
            (tmp_path / "train" / name).mkdir(parents=True)
            Image.new("RGB", (4, 4), (7, 7, 7)).convert(mode).save(tmp_path / "train" / name / f"x.{suffix}")
            (tmp_path / "train" / name / "notes.txt").write_text("not an image")
        data = ImageFolderDataModule(str(tmp_path), in_memory=True)
        assert len(data.train_set) == 4
        assert (data.train_set.images == 7).all()

    def test_cache(self, image_folder, tmp_path, monkeypatch):
        from lightning_manifold_mixup.paper.data import batches

        before = set(tmp_path.rglob("*"))
        plain = ImageFolderDataModule(str(image_folder), in_memory=True)
        plain.setup("fit")
        assert set(tmp_path.rglob("*")) == before  # nothing is written unless asked for

        def cached():
            cache_dir = str(tmp_path / "cache")
            return ImageFolderDataModule(str(image_folder), in_memory=True, cache_dir=cache_dir).train_set

        assert torch.equal(cached().images, plain.train_set.images)
        assert len(list((tmp_path / "cache").iterdir())) == 1
        read = []
        original = batches.read_image
        monkeypatch.setattr(batches, "read_image", lambda path: read.append(path) or original(path))
        again = cached()
        assert torch.equal(again.images, plain.train_set.images)
        assert not read
        again.__getitems__([0, 1])
        Image.new("RGB", (6, 6), (1, 2, 3)).save(image_folder / "train" / "cat" / "000.png")
        assert cached().images[0, :, 0, 0].tolist() == [1, 2, 3]
        with pytest.raises(ValueError, match="expected in_memory=True with cache_dir"):
            ImageFolderDataModule(str(image_folder), cache_dir="cache")

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere/train\. Set data_dir to a folder with"):
            ImageFolderDataModule(str(tmp_path / "nowhere")).setup("fit")
        (tmp_path / "train").mkdir()
        with pytest.raises(FileNotFoundError, match="to have a folder for each class, found none"):
            ImageFolderDataModule(str(tmp_path)).setup("fit")
        (tmp_path / "train" / "cat").mkdir()
        with pytest.raises(FileNotFoundError, match=r"expected images \(\.jpg, .*\) in .*train/<class>, found none"):
            ImageFolderDataModule(str(tmp_path)).setup("fit")

    def test_classes_that_differ(self, image_folder):
        (image_folder / "test" / "dog").rename(image_folder / "test" / "dogs")
        with pytest.raises(ValueError, match=r"expected the classes of .*, got 'dogs'; did you mean dog\?"):
            ImageFolderDataModule(str(image_folder)).setup("test")


def draw_tiny_imagenet(root, sort_val):
    generator = np.random.default_rng(0)
    names = ["n02", "n01", "n03"]
    for name in names:
        (root / "train" / name / "images").mkdir(parents=True)
        for index in range(3):
            pixels = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "train" / name / "images" / f"{name}_{index}.JPEG")
        (root / "train" / name / f"{name}_boxes.txt").write_text("0 0 0 0")
    (root / "test" / "images").mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(root / "test" / "images" / "test_0.JPEG")
    lines = []
    for index in range(6):
        name = names[index % 3]
        folder = root / "val" / (f"{name}/images" if sort_val else "images")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"val_{index}.JPEG")
        lines.append(f"val_{index}.JPEG\t{name}\t0\t32\t44\t62\n")
    if not sort_val:
        (root / "val" / "val_annotations.txt").write_text("".join(lines))


class TestTinyImageNet:
    def test_both_layouts_of_the_validation_images(self, tmp_path):
        draw_tiny_imagenet(tmp_path / "a" / "tiny-imagenet-200", sort_val=False)
        draw_tiny_imagenet(tmp_path / "b", sort_val=True)
        original, sorted_ = (TinyImageNetDataModule(str(tmp_path / name), in_memory=True) for name in "ab")
        assert len(original.train_set) == len(sorted_.train_set) == 9
        assert original.class_names == ("n01", "n02", "n03")
        for split in ("val_set", "test_set"):
            sets = [getattr(data, split) for data in (original, sorted_)]
            rows = [sorted((int(y), x.sum().item()) for x, y in zip(s.images, s.labels, strict=True)) for s in sets]
            assert rows[0] == rows[1]
            assert len(rows[0]) == 6
        assert original.test_set.labels.tolist() == [1, 0, 2, 1, 0, 2]  # in the order of n02, n01, n03
        assert (original.num_classes, original.image_size, original.train_set.padding) == (200, 64, 4)
        assert original.train_set.flip
        held_out = TinyImageNetDataModule(str(tmp_path / "b"), val_size=3)
        assert [len(s) for s in (held_out.train_set, held_out.val_set, held_out.test_set)] == [6, 3, 6]

    def test_download_is_for_prepare_data_and_only_if_asked(self, tmp_path, monkeypatch):
        from torchvision.datasets import utils

        calls = []

        def fake(url, root, md5):
            calls.append(url)
            draw_tiny_imagenet(Path(root) / "tiny-imagenet-200", sort_val=False)

        monkeypatch.setattr(utils, "download_and_extract_archive", fake)
        data = TinyImageNetDataModule(str(tmp_path))
        data.prepare_data()
        with pytest.raises(FileNotFoundError, match=r"tiny-imagenet-200/train or .*/train\. .*download=True"):
            data.setup("fit")
        data = TinyImageNetDataModule(str(tmp_path), download=True)
        with pytest.raises(FileNotFoundError):
            data.setup("fit")
        assert not calls
        data.prepare_data()
        data.prepare_data()
        data.setup("fit")
        assert len(calls) == 1
        assert len(data.train_set) == 9


def write_cifar(root, classes):
    """The files of CIFAR with a few random images; returns images and labels of both splits."""
    generator = np.random.default_rng(classes)

    def batch(count):
        labels = [index % classes for index in range(count)]
        return generator.integers(0, 256, (count, 3072), dtype=np.uint8), labels

    key = "labels" if classes == 10 else "fine_labels"
    if classes == 10:
        folder = root / "cifar-10-batches-py"
        files = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
        meta = ("batches.meta", {"label_names": list(CIFAR10DataModule.constants.class_names)})
    else:
        folder = root / "cifar-100-python"
        files = {"train": ["train"], "test": ["test"]}
        meta = ("meta", {"fine_label_names": list(CIFAR100DataModule.constants.class_names)})
    folder.mkdir(parents=True)
    (folder / meta[0]).write_bytes(pickle.dumps(meta[1]))
    written = {}
    for split, names in files.items():
        parts = [batch(2 * classes) for _ in names]
        for name, (images, labels) in zip(names, parts, strict=True):
            (folder / name).write_bytes(pickle.dumps({"data": images, key: labels}))
        images = torch.from_numpy(np.concatenate([p[0] for p in parts])).view(-1, 3, 32, 32)
        written[split] = images, [label for _, labels in parts for label in labels]
    return written


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


def instantiate(parser, config):
    method = "instantiate" if hasattr(parser, "instantiate") else "instantiate_classes"  # renamed in 2025
    return getattr(parser, method)(config).data


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


class TestSemiSupervised:
    def data(self, **options):
        settings = {"labels_per_class": 5, "labelled_batch_size": 20, "unlabelled_batch_size": 64}
        return SemiSupervisedDataModule(
            DigitsDataModule(val_size=100, seed=options.pop("seed", 0)), **settings | options
        )

    def test_labelled_samples_are_those_of_the_supervised_run(self):
        data = self.data()
        supervised = DigitsDataModule(val_size=100, labels_per_class=5).train_set
        assert torch.equal(data.datamodule.train_set.images[data.labelled_indices], supervised.images)

    def test_epoch(self):
        data = self.data()
        torch.manual_seed(0)
        loader = data.train_dataloader()
        epochs = [[batch for batch, *_ in loader] for _ in range(2)]
        for batches in epochs:
            assert len(batches) == len(loader) == 15  # 900 unlabelled samples in batches of 64
            assert all(batch["labelled"][0].shape == (20, 1, 8, 8) for batch in batches)
            x = torch.cat([batch["unlabelled"][0] for batch in batches])
            rows = Counter(bytes(image.flatten().view(torch.uint8).tolist()) for image in x)
            every, _ = data.datamodule.train_set.__getitems__(range(900))
            assert rows == Counter(bytes(image.flatten().view(torch.uint8).tolist()) for image in every)
            labelled = torch.cat([batch["labelled"][0] for batch in batches])
            seen = Counter(bytes(image.flatten().view(torch.uint8).tolist()) for image in labelled)
            assert sorted(seen.values()) == [6] * 50  # 300 draws: six passes over fifty samples
            y = torch.cat([batch["labelled"][1] for batch in batches])
            assert y.bincount().tolist() == [30] * 10
        orders = [torch.cat([batch[name][1] for batch in batches]) for name in batches[0] for batches in epochs]
        assert not torch.equal(orders[0][:50], orders[0][50:100])  # each pass in a new order
        assert not torch.equal(orders[2], orders[3])

    def test_every_epoch_has_a_new_order_of_both(self, tmp_path):
        model = Tiny(64, 10, semi_supervised=True)
        trainer(tmp_path, max_epochs=2).fit(model, datamodule=self.data())
        assert len(model.steps) == 30
        for name in ("labelled", "unlabelled"):
            first, second = (torch.cat([step[name] for step in half]) for half in (model.steps[:15], model.steps[15:]))
            assert torch.equal(first.bincount(), second.bincount())
            assert not torch.equal(first, second)

    @pytest.mark.parametrize("name", ["spirals", "cifar10", "folder in memory", "folder on request"])
    def test_any_data_module(self, name, tmp_path, monkeypatch):
        if name == "spirals":
            wrapped, shape, classes, n = SpiralsDataModule(samples_per_class=20, val_size=6), (2,), 2, 34
        elif name == "cifar10":
            from torchvision.datasets import cifar

            write_cifar(tmp_path, 10)
            monkeypatch.setattr(cifar, "check_integrity", lambda path, md5=None: True)
            monkeypatch.setattr(cifar.CIFAR10, "_check_integrity", lambda self: True)
            wrapped, shape, classes, n = CIFAR10DataModule(str(tmp_path), val_size=20), (3, 32, 32), 10, 80
        else:
            draw_images(tmp_path / "train", 12)
            in_memory = name.endswith("memory")
            wrapped = ImageFolderDataModule(str(tmp_path), image_size=6, in_memory=in_memory)
            shape, classes, n = (3, 6, 6), 3, 36
        data = SemiSupervisedDataModule(wrapped, 2, labelled_batch_size=2 * classes, unlabelled_batch_size=8)
        batches = [batch for batch, *_ in data.train_dataloader()]
        assert len(batches) == -(-n // 8)
        assert sum(len(batch["unlabelled"][1]) for batch in batches) == n
        for batch in batches:  # each has every labelled sample once
            x, y = batch["labelled"]
            assert x.shape == (2 * classes, *shape)
            assert x.dtype == batch["unlabelled"][0].dtype == torch.float32
            assert y.bincount().tolist() == [2] * classes

    def test_few_unlabelled_steps_govern_too(self):
        data = self.data(labels_per_class=20, labelled_batch_size=10, unlabelled_batch_size=500)
        assert [len(batch["labelled"][1]) for batch, *_ in data.train_dataloader()] == [10, 10]

    @pytest.mark.parametrize(("world", "size", "n"), [(1, 10, 25), (2, 7, 10), (3, 50, 10)])
    def test_sampler_shards_each_pass(self, world, size, n):
        samplers = [RepeatingSampler(range(size), n, world, rank, seed=1) for rank in range(world)]
        orders = []
        for epoch in range(2):
            for sampler in samplers:
                sampler.set_epoch(epoch)
            draws = [list(sampler) for sampler in samplers]
            assert [len(d) for d in draws] == [len(s) for s in samplers] == [n] * world
            stream = [draws[i % world][i // world] for i in range(n * world)]
            for start in range(0, len(stream) - size + 1, size):
                assert sorted(stream[start : start + size]) == list(range(size))
            assert max(Counter(stream).values()) - min(Counter(stream + list(range(size))).values()) <= 1
            orders.append(stream)
        assert orders[0] != orders[1]

    def test_sampler_follows_seed_everything(self, monkeypatch):
        orders = []
        for seed in ("1", "1", "2"):
            monkeypatch.setenv("PL_GLOBAL_SEED", seed)
            orders.append(list(RepeatingSampler(range(50), 50)))
        assert orders[0] == orders[1] != orders[2]

    def test_evaluation_and_attributes_are_those_of_the_data(self):
        data = self.data()
        assert (data.num_classes, data.mean, data.in_channels) == (10, (0.3053,), 1)
        assert len(data.val_dataloader().dataset) == 100
        assert len(data.test_dataloader().dataset) == len(data.predict_dataloader().dataset) == 797
        with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
            _ = data.nonsense
        assert not hasattr(SemiSupervisedDataModule(SpiralsDataModule(), labels_per_class=5), "mean")

    def test_resume_with_the_same_labels(self, tmp_path):
        run = trainer(tmp_path)
        run.fit(Tiny(64, 10, semi_supervised=True), datamodule=self.data())
        checkpoint = tmp_path / "last.ckpt"
        run.save_checkpoint(checkpoint)
        stored = torch.load(checkpoint, weights_only=True)["SemiSupervisedDataModule"]
        assert stored == {"labelled_indices": self.data().labelled_indices.tolist()}
        model = Tiny(64, 10, semi_supervised=True)
        trainer(tmp_path, max_epochs=2).fit(model, datamodule=self.data(), ckpt_path=checkpoint)
        assert len(model.steps) == 15
        for options, message in (
            ({"seed": 1}, r"expected the 50 labelled samples of the checkpoint, got 50, \d+ of them the same"),
            ({"labels_per_class": 10}, r"the 50 labelled samples of the checkpoint, got 100, 50 of them the same"),
        ):
            with pytest.raises(ValueError, match=message):
                trainer(tmp_path, max_epochs=2).fit(model, datamodule=self.data(**options), ckpt_path=checkpoint)
        trainer(tmp_path).test(model, datamodule=self.data(seed=1), ckpt_path=checkpoint, verbose=False)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"labels_per_class": 0}, "expected labels_per_class of at least 1, got 0"),
            ({"labelled_batch_size": 0}, "expected labelled_batch_size of at least 1, got 0"),
            ({"unlabelled_batch_size": 0}, "expected unlabelled_batch_size of at least 1, got 0"),
        ],
    )
    def test_bad_arguments(self, options, message):
        with pytest.raises(ValueError, match=message):
            self.data(**options)

    def test_data_that_is_limited_itself(self):
        with pytest.raises(ValueError, match=r"expected a data module with labels_per_class=None .* got 4"):
            SemiSupervisedDataModule(DigitsDataModule(labels_per_class=4), labels_per_class=4)
        with pytest.raises(ValueError, match=r"at most \d+, the training samples of class"):
            _ = self.data(labels_per_class=500).labelled_indices

    def test_two_processes_share_both_streams(self, tmp_path):
        """A real run of two processes: what each saw of one epoch."""
        script = tmp_path / "run.py"
        script.write_text(TWO_PROCESSES)
        command = [sys.executable, str(script), str(tmp_path)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        seen = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
        for name, batch in (("labelled", 20), ("unlabelled", 64)):
            sizes = [[len(step) for step in rank[name]] for rank in seen]
            assert sizes[0] == sizes[1]
            assert sizes[0][0] == batch
        unlabelled = [{index for step in rank["unlabelled"] for index in step} for rank in seen]
        assert len(seen[0]["unlabelled"]) == len(seen[0]["labelled"]) == 8  # 450 each in batches of 64
        assert not unlabelled[0] & unlabelled[1]
        assert len(unlabelled[0] | unlabelled[1]) == 900
        draws = [[index for step in rank["labelled"] for index in step] for rank in seen]
        stream = [index for pair in zip(*draws, strict=True) for index in pair]
        for start in range(0, 300, 50):
            assert len(set(stream[start : start + 50])) == 50  # each pass is shared out


TWO_PROCESSES = """
import json, sys, torch, lightning as L
from lightning_manifold_mixup.paper.data import SemiSupervisedDataModule, ClassificationDataModule
from lightning_manifold_mixup.paper.data.batches import VectorDataset

class Numbers(ClassificationDataModule):
    class_names = tuple("0123456789")
    def make_dataset(self, split):
        return VectorDataset(torch.arange(900.0).unsqueeze(1), torch.arange(900) % 10) if split == "train" else None

class Spy(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(1, 1)
        self.seen = {"labelled": [], "unlabelled": []}
    def training_step(self, batch, batch_idx):
        for name, (x, _) in batch.items():
            self.seen[name].append(x.flatten().int().tolist())
        return self.linear(batch["labelled"][0]).mean()
    def on_train_end(self):
        with open(f"{sys.argv[1]}/rank{self.global_rank}.json", "w") as file:
            json.dump(self.seen, file)
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)

if __name__ == "__main__":
    torch.set_num_threads(1)
    data = SemiSupervisedDataModule(Numbers(), 5, labelled_batch_size=20, unlabelled_batch_size=64)
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", devices=2, strategy="ddp_fork", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )
    trainer.fit(Spy(), datamodule=data)
"""
