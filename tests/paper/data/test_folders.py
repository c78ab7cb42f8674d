"""Folders of images, and Tiny-ImageNet."""

from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from PIL import Image
from torchvision.transforms import v2

from lightning_manifold_mixup.paper.data import (
    ImageFolderDataModule,
    TinyImageNetDataModule,
)
from tests.paper.data.samples import draw_images


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
        from lightning_manifold_mixup.paper.data import image_files

        read = []
        original = image_files.read_image
        monkeypatch.setattr(image_files, "read_image", lambda path: read.append(path) or original(path))
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
        with pytest.raises(ValueError, match=r"square images of 6x6 pixels, got 9x7 in .*odd\.png; image_size=6"):
            data.setup("fit")
        data = ImageFolderDataModule(str(image_folder), image_size=4, padding=0, flip=False)
        x, _ = data.train_set[0]
        pixels = v2.functional.pil_to_tensor(Image.open(image_folder / "train" / "cat" / "000.png"))
        expected = v2.Compose([v2.Resize(4, antialias=True), v2.CenterCrop(4)])(pixels)
        torch.testing.assert_close(x, (expected / 255 - 0.5) / 0.5)
        odd = data.train_set[24][0]  # the last dog
        torch.testing.assert_close(odd[:, 0, 0], (torch.tensor([10, 20, 30]) / 255 - 0.5) / 0.5)

    @pytest.mark.parametrize("in_memory", [False, True])
    def test_what_the_test_needs_is_found_before_training(self, image_folder, in_memory):
        def setup(**kwargs):
            data = ImageFolderDataModule(str(image_folder), in_memory=in_memory, **kwargs)
            data.setup("fit")
            return data

        (image_folder / "test" / "fox").mkdir()
        with pytest.raises(ValueError, match=r"expected the classes of .*train in .*test, got 'fox'"):
            setup()
        (image_folder / "test" / "fox").rmdir()
        for file in (image_folder / "test" / "cat").iterdir():
            file.rename(image_folder / file.name)
        with pytest.warns(UserWarning, match="has no images of cat, which are in train"):
            setup()
        (image_folder / "test" / "cat").rmdir()
        with pytest.warns(UserWarning, match="has no images of cat, which are in train"):
            data = setup()
        assert data.test_set.labels.tolist() == [1] * 4 + [2] * 4
        (image_folder / "train" / "ant").mkdir()
        with pytest.raises(FileNotFoundError, match=r"of each class in .*train, found none in ant\."):
            setup()

    @pytest.mark.parametrize("split", ["train", "test"])
    @pytest.mark.parametrize("in_memory", [False, True])
    def test_truncated_files(self, image_folder, in_memory, split):
        broken = image_folder / split / "dog" / "001.png"
        broken.write_bytes(broken.read_bytes()[:60])

        def setup(**kwargs):
            data = ImageFolderDataModule(str(image_folder), in_memory=in_memory, **kwargs)
            data.setup("fit")
            return data

        with pytest.raises(ValueError, match=rf'{split}/dog/001\.png is no readable image .*broken_files="skip"'):
            setup()
        with pytest.warns(UserWarning, match=r"1 of \d+ files in .* cannot be read and are left out: .*001\.png"):
            data = setup(broken_files="skip")
        counts = {"train": [12, 12, 12], "test": [4, 4, 4]}
        counts[split][1] -= 1
        assert data.train_set.labels.bincount().tolist() == counts["train"]
        assert data.test_set.labels.bincount().tolist() == counts["test"]
        assert len(list(data.train_dataloader())) == len(list(data.test_dataloader())) == 1
        with pytest.raises(ValueError, match="to be 'raise', 'skip' or 'unchecked', got 'ignore'"):
            ImageFolderDataModule(str(image_folder), broken_files="ignore")

    def test_what_is_unchecked_is_named_when_it_is_read(self, image_folder):
        broken = image_folder / "train" / "dog" / "001.png"
        broken.write_bytes(broken.read_bytes()[:60])
        data = ImageFolderDataModule(str(image_folder), broken_files="unchecked")
        data.setup("fit")
        with pytest.raises(ValueError, match=r"dog/001\.png is no readable image"):
            list(data.train_dataloader())

    def test_rectangular_images(self, tmp_path):
        draw_images(tmp_path / "train", 4, size=(8, 6))
        draw_images(tmp_path / "test", 4, size=(8, 6))
        with pytest.raises(
            ValueError, match=r"square images where no image_size is set, got \d+x\d+ in .*image_size=6 "
        ):
            ImageFolderDataModule(str(tmp_path)).setup("fit")
        data = ImageFolderDataModule(str(tmp_path), image_size=6, padding=0, flip=False)
        data.setup("fit")
        pixels = v2.functional.pil_to_tensor(Image.open(tmp_path / "train" / "cat" / "000.png"))
        torch.testing.assert_close(data.train_set[0][0], (v2.functional.center_crop(pixels, [6]) / 255 - 0.5) / 0.5)

    def test_without_a_test_set_training_ends_well(self, image_folder, tmp_path):
        (image_folder / "test").rename(tmp_path / "gone")
        data = ImageFolderDataModule(str(image_folder))
        data.setup("fit")
        assert not is_overridden("test_dataloader", data, LightningDataModule)

    def test_formats(self, tmp_path):
        for name, mode, suffix in (("a", "L", "png"), ("c", "RGBA", "png"), ("d", "CMYK", "jpg"), ("e", "RGB", "bmp")):
            (tmp_path / "train" / name).mkdir(parents=True)
            Image.new("RGB", (4, 4), (7, 7, 7)).convert(mode).save(tmp_path / "train" / name / f"x.{suffix}")
            (tmp_path / "train" / name / "notes.txt").write_text("not an image")
        data = ImageFolderDataModule(str(tmp_path), in_memory=True)
        assert len(data.train_set) == 4
        assert (data.train_set.images == 7).all()

    def test_cache(self, image_folder, tmp_path, monkeypatch):
        from lightning_manifold_mixup.paper.data import image_files

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
        original = image_files.read_image
        monkeypatch.setattr(image_files, "read_image", lambda path: read.append(path) or original(path))
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
        with pytest.raises(
            FileNotFoundError, match=r"images \(\.jpg, .*\) of each class in .*train, found none in cat"
        ):
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
