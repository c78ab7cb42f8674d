"""Tables: the split and the scaling by hand; regression through the callback against a loop by hand."""

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_diabetes, make_friedman1

from lightning_manifold_mixup import ManifoldMixupCallback
from lightning_manifold_mixup.paper.data import DiabetesDataModule, FriedmanDataModule
from lightning_manifold_mixup.paper.models import MLP
from lightning_manifold_mixup.paper.tasks import RegressionModule
from tests.helpers import Draws
from tests.helpers import trainer as make_trainer


def test_diabetes_is_split_and_scaled_by_the_training_samples() -> None:
    data = DiabetesDataModule(test_size=0.25, val_size=50, seed=3)
    inputs, targets = load_diabetes(return_X_y=True)
    order = torch.randperm(442, generator=torch.Generator().manual_seed(3)).numpy()
    parts = {"train": order[160:], "val": order[110:160], "test": order[:110]}
    mean, std = targets[parts["train"]].mean(), targets[parts["train"]].std(ddof=1)
    assert data.target_std == pytest.approx(std)
    for samples, part in zip((data.train_set, data.val_set, data.test_set), parts.values(), strict=True):
        x, y = samples.inputs, samples.labels
        assert x.dtype == y.dtype == torch.float32
        np.testing.assert_allclose(y, (targets[part] - mean) / std, rtol=1e-5, atol=1e-6)
        scaled = (inputs[part] - inputs[parts["train"]].mean(0)) / inputs[parts["train"]].std(0, ddof=1)
        np.testing.assert_allclose(x, scaled, rtol=1e-5, atol=1e-5)


def test_friedman_is_scikit_learns() -> None:
    data = FriedmanDataModule(num_samples=300, test_size=100, noise=0.5, seed=4)
    _, targets = make_friedman1(300, noise=0.5, random_state=4)
    assert (len(data.train_set), data.val_set, len(data.test_set)) == (200, None, 100)
    values = torch.cat([data.train_set.labels, data.test_set.labels])
    # the same numbers, in another order, scaled
    back = np.sort(values.double().numpy()) * data.target_std
    np.testing.assert_allclose(back - back.mean(), np.sort(targets) - targets.mean(), atol=1e-4)


@pytest.mark.parametrize("size", [442, 500, -1])
def test_sizes_that_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=r"expected test_size to be .* below 442 or a share below 1, got"):
        _ = DiabetesDataModule(test_size=size).train_set


def test_rmse_is_that_of_all_test_samples() -> None:
    data = DiabetesDataModule(eval_batch_size=50, val_size=30)  # the last batch is shorter
    module = RegressionModule(MLP(10, 1, widths=[16]))
    trainer = make_trainer(max_epochs=1)
    trainer.test(module, datamodule=data, verbose=False)
    x, y = data.test_set.inputs, data.test_set.labels
    with torch.no_grad():
        expected = F.mse_loss(module(x), y).sqrt().item()
    assert trainer.callback_metrics["test/rmse"].item() == pytest.approx(expected, rel=1e-6)
    trainer.validate(module, datamodule=data, verbose=False)
    x, y = data.val_set.inputs, data.val_set.labels
    with torch.no_grad():
        expected = F.mse_loss(module(x), y).item()
    assert trainer.callback_metrics["val/loss"].item() == pytest.approx(expected, rel=1e-6)
    assert trainer.callback_metrics["val/rmse"].item() == pytest.approx(expected**0.5, rel=1e-6)


@pytest.mark.parametrize("layer", ["input", "model.layer1", "model.layer2"])
def test_a_mixed_step_by_hand(layer: str) -> None:
    data = DiabetesDataModule(batch_size=400)  # one batch an epoch
    module = RegressionModule(MLP(10, 1, widths=[8, 8]))
    seen = {}

    class Spy(L.Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            seen.update(loss=loss.item(), weights=[p.detach().clone() for p in module.parameters()])

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen["batch"] = batch

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen["gradients"] = [p.grad.clone() for p in module.parameters()]

    callback = ManifoldMixupCallback(layers=[layer], seed=1)
    draws = Draws(callback)
    make_trainer(callback, draws, Spy()).fit(module, datamodule=data)
    x, y = seen["batch"]
    [(drawn, lam, partners)] = draws.drawn
    assert drawn == layer
    twin = RegressionModule(MLP(10, 1, widths=[8, 8]))
    for parameter, value in zip(twin.parameters(), seen["weights"], strict=True):
        parameter.data = value
    h = x
    parts = {"input": torch.nn.Identity(), **{f"model.{name}": part for name, part in twin.model.named_children()}}
    for name, part in parts.items():
        h = part(h)
        if name == layer:
            h = lam * h + (1 - lam) * h[partners]
    loss = (h.squeeze(1) - lam * y - (1 - lam) * y[partners]).square().mean()
    assert seen["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for one, other in zip(seen["gradients"], torch.autograd.grad(loss, list(twin.parameters())), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
