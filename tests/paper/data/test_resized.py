import numpy as np
import pytest
import torch
from PIL import Image

from lightning_manifold_mixup.paper.data import DigitsDataModule, ResizedDataModule, ShapesDataModule
from lightning_manifold_mixup.paper.data.resized import resized


def standard(array):
    return (array - array.mean((0, 2, 3), keepdims=True)) / array.std((0, 2, 3), keepdims=True)


@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 8), (8, 8, 32), (12, 20, 7)])
def test_resized_as_pillow_does(height, width, size):
    images = torch.randn(6, 1, height, width)
    pillow = [Image.fromarray(image.numpy()).resize((size, size), Image.Resampling.BILINEAR) for image in images[:, 0]]
    expected = standard(np.stack([np.asarray(image) for image in pillow])[:, None])
    np.testing.assert_allclose(resized(images, size, 1).numpy(), expected, atol=1e-5)


def test_channels():
    colour = torch.rand(9, 3, 8, 8)
    grey = resized(colour, 8, 1)
    np.testing.assert_allclose(grey.numpy(), standard(colour.numpy().mean(1, keepdims=True)), atol=1e-5)
    again = resized(grey, 8, 3)
    assert again.shape == (9, 3, 8, 8)
    torch.testing.assert_close(again, grey.expand(9, 3, 8, 8), rtol=0, atol=1e-5)
    np.testing.assert_allclose(resized(colour, 8, 3).numpy(), standard(colour.numpy()), atol=1e-5)
    with pytest.raises(ValueError, match="expected images of 1 or 4 channels, got 3"):
        resized(colour, 8, 4)


@pytest.mark.parametrize("data", [DigitsDataModule(test_size=97), ShapesDataModule(test_images=97)])
def test_all_test_images_of_the_other_data_in_their_order(data):
    module = ResizedDataModule(data, image_size=16, in_channels=3, batch_size=40)
    module.prepare_data()
    module.setup("test")
    images, labels = map(torch.cat, zip(*module.test_dataloader(), strict=True))
    originals = torch.stack([image for image, _ in data.test_set])
    torch.testing.assert_close(images, resized(originals, 16, 3))
    assert labels.tolist() == [0] * 97
