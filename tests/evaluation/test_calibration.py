import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchmetrics.functional.classification import multiclass_calibration_error

from lightning_manifold_mixup.evaluation import (
    CalibrationCallback,
    ConfidenceBins,
    confidence,
    interpolate,
    noise_like,
)
from tests.evaluation.classifier import (
    CLASSES,
    Classifier,
    loader,
    normalise,
    pixels_and_target,
    trainer,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(42)


def test_bins_give_the_ece_of_torchmetrics_and_the_histogram_of_numpy():
    logits, target = 3 * torch.randn(500, 4), torch.randint(4, (500,))
    sure, correct = confidence(logits), logits.argmax(1) == target
    bins = ConfidenceBins(15)
    for i in range(0, 500, 90):  # streaming
        bins.update(sure[i : i + 90], correct[i : i + 90])
    result = bins.compute()
    gap = (result["accuracy"] - result["confidence"]).nan_to_num().abs()
    ece = (gap * result["count"]).sum() / result["count"].sum()
    assert ece.item() == pytest.approx(multiclass_calibration_error(logits.softmax(1), target, 4).item(), abs=1e-6)
    assert result["count"].tolist() == np.histogram(sure.numpy(), 15, (0, 1))[0].tolist()


def test_confidence_one_is_in_the_last_bin():
    bins = ConfidenceBins(4)
    bins.update(torch.tensor([0.0, 0.25, 1.0]))
    assert bins.compute()["count"].tolist() == [1, 1, 0, 1]


def test_interpolate_and_noise_by_hand():
    images = 2 + 3 * torch.randn(64, 3, 20, 20)
    partners = torch.randperm(64)
    expected = 0.3 * images + 0.7 * images[partners]
    torch.testing.assert_close(interpolate(images, 0.3, partners), expected)
    images[:, 1] *= 5
    noise = noise_like(images, torch.Generator().manual_seed(0))
    torch.testing.assert_close(noise.mean((0, 2, 3)), images.mean((0, 2, 3)), rtol=0, atol=0.3)
    torch.testing.assert_close(noise.std((0, 2, 3)), images.std((0, 2, 3)), rtol=0.05, atol=0)
    assert abs(np.corrcoef(noise[:, 0].flatten(), images[:, 0].flatten())[0, 1]) < 0.03


def test_callback_reports_what_the_formulas_give(tmp_path):
    module = Classifier()
    trainer(CalibrationCallback(lams=[0.5], seed=3, dirname=str(tmp_path))).validate(module, loader(), verbose=False)
    result = json.loads((tmp_path / "val_calibration.json").read_text())
    data, between, noise = result["rows"]
    pixels, target = pixels_and_target()
    images = normalise(pixels)
    module.eval()
    with torch.no_grad():
        logits = module(images)
        assert data["nll"] == pytest.approx(F.cross_entropy(logits, target).item(), abs=1e-6)
        assert data["accuracy"] == pytest.approx((logits.argmax(1) == target).float().mean().item())
        ece = multiclass_calibration_error(logits.softmax(1), target, CLASSES)
        assert data["ece"] == pytest.approx(ece.item(), abs=1e-6)
        assert data["confidence"] == pytest.approx(logits.softmax(1).amax(1).mean().item(), abs=1e-6)
        generator, sure, sure_noise = torch.Generator().manual_seed(3), [], []
        for x in images.split(16):
            partners = torch.randperm(16, generator=generator)
            sure.append(module((x + x[partners]) / 2).softmax(1).amax(1))
            sure_noise.append(module(noise_like(x, generator)).softmax(1).amax(1))
    assert between == {
        "inputs": "interpolation 0.5", "confidence": pytest.approx(torch.cat(sure).mean().item(), abs=1e-6),
        "accuracy": None, "nll": None, "ece": None,
    }  # fmt: skip
    assert noise["confidence"] == pytest.approx(torch.cat(sure_noise).mean().item(), abs=1e-6)
    assert None in result["bins"]["data"]["accuracy"]  # an empty bin, not the NaN that JSON does not have
    assert {name: sum(bins["count"]) for name, bins in result["bins"].items()} == {
        "data": 48, "interpolation": 48, "noise": 48,
    }  # fmt: skip


def test_lams_are_checked():
    with pytest.raises(ValueError, match=r"expected lams in \[0, 1\], got \[2\]"):
        CalibrationCallback(lams=[2])
