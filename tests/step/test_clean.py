"""`log_clean`: the loss and the logged values of the unmixed batch, against the user's own step run on it."""

import copy

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Accuracy

from lightning_manifold_mixup import ManifoldMixupCallback, ManifoldMixupModule, SoftLabelLossMixin
from tests.helpers import trainer


class Logs(SoftLabelLossMixin, L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.0), nn.Linear(8, 3))
        self.accuracy = Accuracy("multiclass", num_classes=3)
        self.steps = 0

    def training_step(self, batch, batch_idx):
        self.steps += 1
        x, y = batch
        logits = self.net(x)
        self.log("train/accuracy", self.soft_label_accuracy(logits, y))
        self.accuracy(logits, y)
        self.log_dict({"train/metric": self.accuracy, "train/norm": logits.norm()})
        return F.cross_entropy(logits, y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Compare(L.Callback):
    """Holds what was logged against the step of a copy, on the plain batch and with the weights after the update."""

    def __init__(self):
        self.seen, self.logged = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        x, y = batch
        plain = copy.deepcopy(pl_module.net)
        with torch.no_grad():
            logits = plain(x)
        values = {
            "loss": F.cross_entropy(logits, y),
            "train/accuracy": (logits.argmax(1) == y).float().mean(),
            "train/metric": (logits.argmax(1) == y).float().mean(),
            "train/norm": logits.norm(),
        }
        self.seen.append(values)
        self.logged.append({k: v for k, v in trainer.callback_metrics.items() if "/clean/" in k})


def data():
    generator = torch.Generator().manual_seed(0)
    return DataLoader(
        TensorDataset(torch.randn(40, 4, generator=generator), torch.arange(40) % 3), batch_size=8, drop_last=True
    )


@pytest.mark.parametrize("layers", ["input", "net.2"])
def test_clean_values_are_those_of_the_plain_batch(layers):
    compare, module = Compare(), Logs()
    callback = ManifoldMixupCallback(layers=layers, seed=0, log_clean=True)
    trainer(callback, compare, log_every_n_steps=2).fit(module, data())
    for step, (expected, logged) in enumerate(zip(compare.seen, compare.logged, strict=True), 1):
        if step % 2 == 0:
            assert set(logged) == {f"manifold_mixup/clean/{name}" for name in expected}
            for name, value in expected.items():
                torch.testing.assert_close(logged[f"manifold_mixup/clean/{name}"], value)


def test_training_is_the_same_with_and_without():
    weights = []
    for log_clean in (False, True):
        torch.manual_seed(0)
        module = Logs()
        callback = ManifoldMixupCallback(layers=["input", "net.2"], seed=0, log_clean=log_clean)
        trainer(callback, log_every_n_steps=1).fit(module, data())
        weights.append(module.state_dict())
        assert module.steps == 5
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_the_module_hands_it_on():
    module = ManifoldMixupModule(nn.Linear(4, 3), 3, layers=["input"], mixup={"log_clean": True})
    t = trainer(log_every_n_steps=1)
    t.fit(module, data())
    assert {"manifold_mixup/clean/loss", "manifold_mixup/clean/train/accuracy"} <= set(t.callback_metrics)


def test_manual_optimization_is_refused():
    class Manual(Logs):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(MisconfigurationException, match="Expected automatic optimization with log_clean=True"):
        trainer(ManifoldMixupCallback(layers="input", log_clean=True)).fit(Manual(), data())
