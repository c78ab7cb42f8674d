import numpy as np
import segmentation_models_pytorch.losses as smp
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_manifold_mixup import ManifoldMixupCallback
from lightning_manifold_mixup._step.labels.criteria import criterion_candidates
from tests.helpers import Classifier, Draws, images, loader, trainer


class Branches(nn.Module):
    """A criterion that no op-by-op evaluation can follow: numpy, a branch on the labels, a list of them."""

    def forward(self, logits, target):
        weight = float(np.asarray(target).mean()) + (2.0 if target.sum() % 2 == 1 else 1.0)
        rows = [logits[i, label] for i, label in enumerate(target.tolist())]
        return weight * torch.stack(rows).pow(2).mean()


def step_of(criterion, batch, layers):
    module = Classifier(criterion=criterion, lr=0.0)
    callback = ManifoldMixupCallback(layers=layers, seed=0)
    draws = Draws(callback)
    trainer(callback, draws, max_epochs=2).fit(module, batch)
    return module, draws.drawn, callback


def test_whole_criterion_on_both_labellings():
    batches = loader(8)
    module, drawn, _ = step_of(Branches(), batches, ["input"])
    x, y = images(8)
    for loss, (_, lam, partners) in zip(module.losses, drawn, strict=True):
        logits = module.model(lam * x + (1 - lam) * x[partners])
        expected = lam * Branches()(logits, y) + (1 - lam) * Branches()(logits, y[partners])
        torch.testing.assert_close(loss, expected.item(), rtol=1e-5, atol=0)


def test_lovasz_with_ignore_index_and_keywords():
    class Segments(Classifier):
        def training_step(self, batch, batch_idx):
            x, y = batch
            loss = self.criterion(y_pred=self.model(x), y_true=y)
            self.losses.append(loss.item())
            return loss

    x, y = images(4)[0], torch.randint(4, (4, 6, 6))
    criterion = smp.LovaszLoss("multiclass", ignore_index=2, per_image=True)
    module = Segments(nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1)), criterion, lr=0.0)
    callback = ManifoldMixupCallback(layers=["model.0"], seed=0)
    draws = Draws(callback)
    trainer(callback, draws).fit(module, DataLoader(TensorDataset(x, y), 4))
    [(_, lam, partners)] = draws.drawn
    logits = module.model[1](lam * module.model[0](x) + (1 - lam) * module.model[0](x)[partners])
    expected = lam * criterion(logits, y) + (1 - lam) * criterion(logits, y[partners])
    torch.testing.assert_close(module.losses[0], expected.item(), rtol=1e-5, atol=0)


def test_candidates_hold_no_weights():
    module = Classifier(criterion=nn.Sequential(Branches()))
    names = criterion_candidates(module)
    assert "criterion" in names
    assert "criterion.0" not in names
    assert "accuracy" not in names
    assert not any(name.startswith("model.layer1.0") for name in names)
