import lightning as L
import pytest
import torch
import torch.nn.functional as F
import torchmetrics.functional as metrics
from torch import nn

from lightning_manifold_mixup import AlphaSchedule, ManifoldMixupCallback, ManifoldMixupModule
from tests.helpers import CLASSES, ConvNet, images, loader, trainer, weights_of


def test_brings_the_callback():
    t = trainer()
    t.fit(ManifoldMixupModule(ConvNet(), CLASSES, alpha=AlphaSchedule(1.0, 2.0, 3), layers=["input"]), loader())
    [callback] = [c for c in t.callbacks if isinstance(c, ManifoldMixupCallback)]
    assert callback.alpha == AlphaSchedule(1.0, 2.0, 3)
    assert callback.layers == ["input"]


def test_leaves_the_trainers_own():
    callback = ManifoldMixupCallback(alpha=0.5)
    t = trainer(callback)
    t.fit(ManifoldMixupModule(ConvNet(), CLASSES, alpha=2.0), loader())
    assert [c for c in t.callbacks if isinstance(c, ManifoldMixupCallback)] == [callback]


def test_alpha_zero_is_the_baseline():
    L.seed_everything(1)
    module = ManifoldMixupModule(ConvNet(), CLASSES, alpha=0.0, optimizer=lambda p: torch.optim.SGD(p, 0.1))
    net = ConvNet()
    net.load_state_dict(module.model.state_dict())
    trainer().fit(module, loader())
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for x, y in loader():
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    torch.testing.assert_close(weights_of(module.model), weights_of(net), rtol=0, atol=0)


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_evaluation(stage):
    classes = 7
    net = nn.Sequential(nn.Flatten(), nn.Linear(108, classes))
    module = ManifoldMixupModule(net, classes)
    results = getattr(trainer(), stage)(module, loader(), verbose=False)[0]
    x, y = images(24)
    with torch.no_grad():
        logits = net(x)
    prefix = "val" if stage == "validate" else "test"
    assert results[f"{prefix}/error"] == pytest.approx((logits.argmax(1) != y).float().mean().item())
    top5 = (logits.topk(5).indices == y[:, None]).any(1).float().mean().item()
    assert results[f"{prefix}/top5_error"] == pytest.approx(1 - top5)
    assert results[f"{prefix}/nll"] == pytest.approx(F.cross_entropy(logits, y).item())
    ece = metrics.calibration_error(logits.softmax(1), y, task="multiclass", num_classes=classes)
    assert results[f"{prefix}/ece"] == pytest.approx(ece.item())


def test_validation_and_test_share_no_state():
    module = ManifoldMixupModule(ConvNet(), CLASSES)
    assert not set(module.val_metrics.modules()) & set(module.test_metrics.modules())


def test_best_error():
    module = ManifoldMixupModule(ConvNet(), CLASSES, optimizer=lambda p: torch.optim.SGD(p, 0.5))
    errors = []
    module.on_train_epoch_start = lambda: errors.append(trainer_.callback_metrics.get("val/error"))
    trainer_ = trainer(max_epochs=4)
    trainer_.fit(module, loader(), loader())
    errors = [float(e) for e in [*errors, trainer_.callback_metrics["val/error"]] if e is not None]
    assert float(trainer_.callback_metrics["val/error_best"]) == pytest.approx(min(errors[-4:]))


def test_predict():
    module = ManifoldMixupModule(ConvNet(), CLASSES)
    batches = trainer().predict(module, loader())
    module.eval()
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(batches), module(images(24)[0]).softmax(1))


def test_scheduler():
    module = ManifoldMixupModule(
        ConvNet(),
        CLASSES,
        optimizer=lambda p: torch.optim.SGD(p, 1.0),
        lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5),
        lr_interval="step",
    )
    t = trainer()
    t.fit(module, loader())
    assert t.optimizers[0].param_groups[0]["lr"] == 0.5**3


def test_default_optimizer_is_the_papers():
    optimizer = ManifoldMixupModule(ConvNet(), CLASSES).configure_optimizers()
    assert (
        optimizer.defaults | {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4} == optimizer.defaults
    )


def test_wrong_loss():
    with pytest.raises(ValueError, match="Expected loss to be 'cross_entropy' or 'bce', got 'mse'"):
        ManifoldMixupModule(ConvNet(), CLASSES, loss="mse")
