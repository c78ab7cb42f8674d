import csv

import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from lightning_manifold_mixup.evaluation import DEFORMATIONS, Deformation, DeformationCallback, deform
from tests.evaluation.classifier import Classifier, loader, normalise, pixels_and_target, trainer


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(42)


def test_angles_are_uniform_in_the_range_and_each_image_has_its_own():
    """Recover the angle of each image from where a lone bright pixel went."""
    images = torch.zeros(400, 1, 33, 33)
    images[:, :, 16, 28] = 1.0  # 12 pixels right of the centre
    deformed = deform(images, Deformation(rotation=40), torch.Generator().manual_seed(0))[:, 0]
    offsets = torch.arange(33.0) - 16
    y, x = (deformed * offsets[:, None]).sum((1, 2)), (deformed * offsets).sum((1, 2))
    angles = torch.atan2(y, x).rad2deg()
    assert angles.abs().max() < 41
    assert angles.min() < -36
    assert angles.max() > 36
    assert angles.mean().abs() < 3
    assert angles.std() == pytest.approx(80 / 12**0.5, rel=0.08)  # of U(-40, 40)


def test_shear_moves_rows_by_the_tangent_of_the_angle():
    images = torch.zeros(1, 1, 33, 33)
    images[:, :, 16 + 8, 16] = 1.0  # 8 pixels below the centre
    generator = torch.Generator().manual_seed(0)
    angle = 28.6 * (2 * torch.rand(1, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[0, 1] - 1)
    moved = deform(images, Deformation(shear=28.6), generator)[0, 0]
    column = (moved.sum(0) * torch.arange(33.0)).sum() / moved.sum()
    row = (moved.sum(1) * torch.arange(33.0)).sum() / moved.sum()
    assert abs(column - 16) == pytest.approx(8 * torch.tan(angle.abs().deg2rad()).item(), abs=0.05)
    assert row == pytest.approx(24)


@pytest.mark.parametrize(("zoom", "width"), [(0.5, 16), (2.0, 4)])
def test_zoom_below_one_zooms_in(zoom, width):
    """An 8 pixels wide square looks twice as wide when half of the image is shown, and half as wide when twice is."""
    images = torch.zeros(1, 1, 32, 32)
    images[:, :, 12:20, 12:20] = 1.0
    assert deform(images, Deformation(zoom=zoom))[0, 0, 16].sum() == pytest.approx(width, abs=0.6)


def test_deformation_of_batch_is_torchvisions_of_each_image():
    images = torch.rand(4, 3, 16, 16)
    draws = 2 * torch.rand(4, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64) - 1
    expected = [
        tv.affine(image, 20 * a, [0, 0], 1.0, [0.0, 0.0], tv.InterpolationMode.BILINEAR, [0.5])
        for image, a in zip(images, draws[:, 0].tolist(), strict=True)
    ]
    got = deform(images, Deformation(rotation=20), torch.Generator().manual_seed(5), fill=0.5)
    torch.testing.assert_close(got, torch.stack(expected))
    assert got.min() >= 0  # no bilinear overshoot
    with pytest.raises(AssertionError):
        torch.testing.assert_close(deform(images, Deformation(rotation=20)), torch.stack(expected))


def test_table_has_the_papers_levels():
    levels = {name: (d.rotation, d.shear, d.zoom) for name, d in DEFORMATIONS.items()}
    assert levels == {
        "rotation 20": (20, 0, 1), "rotation 40": (40, 0, 1), "shear 28.6": (0, 28.6, 1), "shear 57.3": (0, 57.3, 1),
        "zoom-in 60": (0, 0, 0.6), "zoom-in 80": (0, 0, 0.8), "zoom-out 120": (0, 0, 1.2), "zoom-out 140": (0, 0, 1.4),
    }  # fmt: skip


def test_callback_reports_what_a_loop_gives(tmp_path):
    module = Classifier()
    for name in "ab":
        trainer(DeformationCallback(seed=3, dirname=str(tmp_path / name))).test(module, loader(), verbose=False)
    table = (tmp_path / "a/test_deformations.csv").read_text()
    assert table == (tmp_path / "b/test_deformations.csv").read_text()
    rows = {row["deformation"]: float(row["accuracy"]) for row in csv.DictReader(table.splitlines())}

    pixels, target = pixels_and_target()
    images, generator = normalise(pixels), torch.Generator().manual_seed(3)
    right = dict.fromkeys(["none", *DEFORMATIONS], 0)
    module.eval()
    for x, y in zip(images.split(16), target.split(16), strict=True):
        for name, deformation in {"none": None, **DEFORMATIONS}.items():
            x_ = x if deformation is None else deform(x, deformation, generator)
            right[name] += (module(x_).argmax(1) == y).sum().item()
    assert rows == pytest.approx({name: count / 48 for name, count in right.items()})
