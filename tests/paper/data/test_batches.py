"""Augmentation and normalisation of whole batches."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset
from torchvision.transforms import v2

from lightning_manifold_mixup.paper.data.batches import ImageDataset, collate, normalize, random_crop, random_flip
from lightning_manifold_mixup.paper.data.image_files import ImageFiles


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


class TestOnADevice:
    def make(self):
        images = torch.randint(256, (6, 3, 8, 8), generator=torch.Generator().manual_seed(1)).byte()
        return ImageDataset(images, torch.arange(6), [0.5, 0.4, 0.3], [0.2, 0.3, 0.4], padding=2, flip=True)

    def test_everything_is_computed_there(self):
        """A meta tensor, which has no numbers, stands for one on a device: an operation with both would fail."""
        data = self.make()
        data.to(torch.device("meta"))
        x, y = data.__getitems__([4, 0, 3])
        assert (x.device.type, x.shape, x.dtype) == ("meta", (3, 3, 8, 8), torch.float32)
        assert (y.device.type, y.shape, data.labels.device.type) == ("meta", (3,), "cpu")

    def test_files_are_refused(self):
        with pytest.raises(ValueError, match="expected images in memory to keep on a device, got files"):
            ImageDataset(ImageFiles(["a.png"], 4), torch.zeros(1), [0.5], [0.5]).to(torch.device("cpu"))

    @pytest.mark.gpu
    def test_batches_are_those_of_the_host(self):
        here, there = self.make(), self.make()
        there.to(torch.device("cuda"))
        batches = []
        for data in (here, there):
            torch.manual_seed(3)
            batches.append([data.__getitems__([4, 0, 3]) for _ in range(5)])
        for (x, y), (other_x, other_y) in zip(*batches, strict=True):
            assert other_x.is_cuda
            torch.testing.assert_close(other_x.cpu(), x)
            assert torch.equal(other_y.cpu(), y)
