import json

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from sklearn.metrics import roc_auc_score
from torchmetrics.functional.classification import multiclass_calibration_error

from lightning_manifold_mixup.evaluation import (
    CalibrationCallback,
    ConfidenceBins,
    brier_score,
    confidence,
    fit_temperature,
    noise_like,
)
from tests.evaluation.classifier import CLASSES, Classifier, loader, normalise, pixels_and_target, trainer


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


def test_noise_by_hand():
    images = 2 + 3 * torch.randn(64, 3, 20, 20)
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
        "accuracy": None, "nll": None, "brier": None, "ece": None, "temperature": None, "auroc": None,
    }  # fmt: skip
    assert noise["auroc"] == pytest.approx(
        roc_auc_score([1] * 48 + [0] * 48, torch.cat([logits.softmax(1).amax(1), torch.cat(sure_noise)])), abs=1e-6
    )
    assert noise["confidence"] == pytest.approx(torch.cat(sure_noise).mean().item(), abs=1e-6)
    assert None in result["bins"]["data"]["accuracy"]  # an empty bin, not the NaN that JSON does not have
    assert {name: sum(bins["count"]) for name, bins in result["bins"].items()} == {
        "data": 48, "interpolation": 48, "noise": 48,
    }  # fmt: skip


def test_lams_are_checked():
    with pytest.raises(ValueError, match=r"expected lams in \[0, 1\], got \[2\]"):
        CalibrationCallback(lams=[2])


@pytest.mark.parametrize("scale", [0.2, 1.0, 30.0])
def test_temperature_is_where_scipy_finds_it(scale):
    logits, target = torch.randn(200, 5), torch.randint(5, (200,))
    logits[torch.arange(200), target] += 1.5
    logits *= scale

    def nll(log_temperature):
        return F.cross_entropy(logits.double() / np.exp(log_temperature), target).item()

    expected = np.exp(minimize_scalar(nll, bounds=(-4.6, 4.6), method="bounded", options={"xatol": 1e-9}).x)
    with torch.inference_mode():  # as in an evaluation loop
        assert fit_temperature(logits.clone(), target) == pytest.approx(expected, rel=1e-4)


def test_temperature_at_its_bounds():
    logits, target = torch.eye(4), torch.arange(4)
    assert 0.0099 < fit_temperature(logits, target) < 0.05  # all right: the surer the better
    wrong = fit_temperature(logits, target.flip(0))
    assert F.cross_entropy(logits / wrong, target.flip(0)).item() == pytest.approx(np.log(4), abs=0.01)
    with pytest.raises(ValueError, match="at least one held-out sample, got none"):
        fit_temperature(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))


def test_brier_score_by_hand():
    logits, target = torch.randn(20, 3), torch.randint(3, (20,))
    for row, label, score in zip(logits.numpy(), target.tolist(), brier_score(logits, target), strict=True):
        p = np.exp(row) / np.exp(row).sum()
        assert score.item() == pytest.approx(sum((p[k] - (k == label)) ** 2 for k in range(3)), abs=1e-5)


class Data(L.LightningDataModule):
    """Test data, and (of another seed) held-out data where they are wanted."""

    def __init__(self, validates):
        super().__init__()
        if validates:
            self.val_dataloader = self._val_dataloader

    def test_dataloader(self):
        return loader()

    def _val_dataloader(self):
        return loader(seed=5)


def test_scaled_by_the_validation_data_of_the_data_module(tmp_path):
    module = Classifier().eval()
    callback = CalibrationCallback(lams=[], dirname=str(tmp_path), other_data=loader(seed=9))
    trainer(callback).test(module, datamodule=Data(validates=True), verbose=False)
    rows = {row["inputs"]: row for row in callback.rows}
    assert list(rows) == ["data", "data scaled", "noise", "other data"]
    with torch.no_grad():
        pairs = [pixels_and_target(seed=seed) for seed in (5, 0, 9)]
        held_out, test, other = [(module(normalise(pixels)), target) for pixels, target in pairs]
    temperature = fit_temperature(*held_out)
    assert rows["data scaled"]["temperature"] == pytest.approx(temperature, rel=1e-5)
    for name, t in (("data", 1.0), ("data scaled", temperature)):
        logits, target = test[0] / t, test[1]
        assert rows[name]["nll"] == pytest.approx(F.cross_entropy(logits, target).item(), abs=1e-5)
        assert rows[name]["brier"] == pytest.approx(brier_score(logits, target).mean().item(), abs=1e-5)
        ece = multiclass_calibration_error(logits.softmax(1), target, CLASSES).item()
        assert rows[name]["ece"] == pytest.approx(ece, abs=1e-5)
        assert rows[name]["confidence"] == pytest.approx(confidence(logits).mean().item(), abs=1e-5)
    assert rows["data"]["accuracy"] == rows["data scaled"]["accuracy"]
    sure = torch.cat([confidence(test[0]), confidence(other[0])])
    assert rows["other data"]["auroc"] == pytest.approx(roc_auc_score([1] * 48 + [0] * 48, sure), abs=1e-6)


def test_without_held_out_data_there_is_no_scaled_row(tmp_path, caplog):
    callback = CalibrationCallback(lams=[], dirname=str(tmp_path))
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        trainer(callback).test(Classifier(), datamodule=Data(validates=False), verbose=False)
    assert [row["inputs"] for row in callback.rows] == ["data", "noise"]
    assert "no row after temperature scaling" in caplog.text
    # a second run of the same callback with data forgets the first
    callback.held_out = Data(validates=True)
    trainer(callback).test(Classifier(), loader(), verbose=False)
    assert [row["inputs"] for row in callback.rows] == ["data", "data scaled", "noise"]
    # its temperature must not be that of the data which are evaluated
    trainer(CalibrationCallback(lams=[], dirname=str(tmp_path))).validate(
        Classifier(), datamodule=Data(validates=True), verbose=False
    )
    rows = json.loads((tmp_path / "val_calibration.json").read_text())["rows"]
    assert [row["inputs"] for row in rows] == ["data", "noise"]


def test_the_table_can_be_left_out(tmp_path, capsys):
    trainer(CalibrationCallback(dirname=str(tmp_path), verbose=False)).test(Classifier(), loader(), verbose=False)
    assert "interpolation" not in capsys.readouterr().out
