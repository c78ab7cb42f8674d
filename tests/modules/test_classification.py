import copy
import json
from typing import get_type_hints

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchmetrics.functional as metrics
import yaml
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_manifold_mixup import (
    AlphaSchedule,
    ManifoldMixupCallback,
    ManifoldMixupModule,
    SemiSupervisedManifoldMixupModule,
)
from lightning_manifold_mixup.modules.classification import MixupOptions
from lightning_manifold_mixup.paper.data import DigitsDataModule
from lightning_manifold_mixup.partners import ClassBalancedPartners
from tests.helpers import CLASSES, ConvNet, images, loader, trainer, weights_of


def callbacks_of(trainer):
    return [c for c in trainer.callbacks if isinstance(c, ManifoldMixupCallback)]


def test_brings_the_callback():
    t = trainer()
    module = ManifoldMixupModule(
        ConvNet(), CLASSES, AlphaSchedule(1.0, 2.0, 3), ["input"], {"probability": 0.5, "seed": 3}
    )
    t.fit(module, loader())
    assert callbacks_of(t) == [module.mixup]
    assert (module.mixup.alpha, module.mixup.layers) == (AlphaSchedule(1.0, 2.0, 3), ["input"])
    assert (module.mixup.probability, module.mixup.seed) == (0.5, 3)


def test_options_have_their_effect():
    """Without a second callback: lam is logged, and the module's own callback does it."""

    class Values(L.Callback):
        seen = []  # noqa: RUF012

        def on_train_batch_end(self, trainer, pl_module, *args):
            self.seen.append(pl_module.mixup.last_draw.mix.lam.item())

    Values.seen = []
    t = trainer(Values())
    t.fit(ManifoldMixupModule(ConvNet(), CLASSES, layers=["input"], mixup={"log_mixing": True}), loader())
    assert t.callback_metrics["manifold_mixup/lam"].item() == pytest.approx(Values.seen[-1])


def test_options_are_those_of_the_callback():
    parameters = get_type_hints(ManifoldMixupCallback.__init__)
    assert set(MixupOptions.__annotations__) | {"alpha", "layers", "return"} == set(parameters)
    for name, annotation in MixupOptions.__annotations__.items():
        assert annotation == parameters[name], name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.0}, "no 'alpha' in `mixup`"),
        ({"layers": ["input"]}, "no 'layers' in `mixup`"),
        ({"log_mixin": True}, "options of the callback in `mixup` .*log_mixing.* got 'log_mixin'"),
        ({"probability": 2.0}, r"probability to be a number in \[0, 1\], got 2.0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        ManifoldMixupModule(ConvNet(), CLASSES, mixup=options)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of jsonargparse, by Lightning
def test_options_in_yaml():
    """With a strategy, which the parser makes, and with a mistake, which it finds."""

    def module(*arguments):
        parser = LightningArgumentParser(exit_on_error=False)
        parser.add_lightning_class_args(ManifoldMixupModule, "model", subclass_mode=True)
        network = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 2, "out_features": 3}}
        options = ["--model=ManifoldMixupModule", f"--model.model={json.dumps(network)}", "--model.num_classes=3"]
        return parser.instantiate_classes(parser.parse_args([*options, *arguments])).model

    strategy = json.dumps({"class_path": "lightning_manifold_mixup.partners.ClassBalancedPartners"})
    made = module("--model.mixup.log_mixing=true", f"--model.mixup.partners={strategy}").mixup
    assert made.log_mixing
    assert isinstance(made.partners, ClassBalancedPartners)
    with pytest.raises(Exception, match="log_mixin"):
        module("--model.mixup.log_mixin=true")


def test_a_callback_beside_it_is_an_error_that_shows_both():
    with pytest.raises(MisconfigurationException) as error:
        trainer(ManifoldMixupCallback(alpha=0.5)).fit(ManifoldMixupModule(ConvNet(), CLASSES, alpha=2.5), loader())
    for text in ("ManifoldMixupModule", "alpha 0.5", "alpha 2.5", "alpha=0"):
        assert text in str(error.value)


def test_alpha_zero_leaves_the_mixing_to_the_trainers():
    callback = ManifoldMixupCallback(alpha=0.5)
    t = trainer(callback)
    t.fit(ManifoldMixupModule(ConvNet(), CLASSES, alpha=0.0), loader())
    assert callbacks_of(t) == [callback]
    assert callback.layers_ is not None  # it has mixed


def test_one_trainer_for_several_modules_and_stages():
    modules = [ManifoldMixupModule(ConvNet(), CLASSES, layers=["input"]) for _ in range(2)]
    modules.append(copy.deepcopy(modules[0]))
    t = trainer()
    for module in modules:
        t.fit_loop.epoch_progress.reset()
        t.fit(module, loader(), loader())
        assert callbacks_of(t) == [module.mixup]
        t.test(module, loader(), verbose=False)
        assert callbacks_of(t) == [module.mixup]
    with pytest.raises(MisconfigurationException, match="one in the Trainer"):
        trainer(ManifoldMixupCallback()).fit(modules[0], loader())


class Mine(ManifoldMixupModule):
    """A subclass with arguments of its own, of which one compares with nothing."""

    def __init__(self, model, weights):
        super().__init__(model, CLASSES, alpha=AlphaSchedule(1.0, 2.0, 3), loss="bce", mixup={"probability": 0.5})
        self.weights = weights


@pytest.mark.parametrize("weights_only", [None, True])
def test_load_from_checkpoint(weights_only, tmp_path):
    given = {"alpha": AlphaSchedule(1.0, 2.0, 3), "layers": ["input"], "mixup": {"probability": 0.5, "seed": 3}}
    module = ManifoldMixupModule(ConvNet(), CLASSES, **given, loss="bce", lr_interval="step")
    t = trainer()
    t.fit(module, loader())
    t.save_checkpoint(tmp_path / "a.ckpt")
    loaded = ManifoldMixupModule.load_from_checkpoint(tmp_path / "a.ckpt", model=ConvNet(), weights_only=weights_only)
    torch.testing.assert_close(weights_of(loaded), weights_of(module), rtol=0, atol=0)
    for name, value in given.items():
        assert loaded.hparams[name] == value
    assert (loaded.mixup.alpha, loaded.mixup.layers, loaded.mixup.seed) == (given["alpha"], ["input"], 3)
    assert (loaded.soft_label_loss_name, loaded.lr_interval) == ("bce", "step")
    with pytest.raises(TypeError, match="'model'"):
        ManifoldMixupModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=weights_only)


def test_load_a_subclass_from_a_checkpoint(tmp_path):
    module = Mine(ConvNet(), np.ones(3))
    t = trainer()
    t.fit(module, loader())
    t.save_checkpoint(tmp_path / "a.ckpt")
    loaded = Mine.load_from_checkpoint(tmp_path / "a.ckpt", model=ConvNet(), weights=np.zeros(3))
    torch.testing.assert_close(weights_of(loaded), weights_of(module), rtol=0, atol=0)
    assert loaded.mixup.probability == 0.5


def test_settings_reach_the_loggers(tmp_path):
    module = ManifoldMixupModule(ConvNet(), CLASSES, alpha=1.5, layers=["input"], mixup={"dominant": True})
    trainer(logger=CSVLogger(tmp_path, "", ""), log_every_n_steps=1).fit(module, loader())
    settings = yaml.safe_load((tmp_path / "hparams.yaml").read_text())
    assert settings["alpha"] == 1.5
    assert settings["layers"] == ["input"]
    assert settings["mixup"] == {"dominant": True}


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
    val, test = (set(module.evaluations[stage].modules()) for stage in ("val", "test"))
    assert not val & test


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


def test_a_wrong_number_of_classes_is_found_before_the_first_update():
    data = DigitsDataModule()
    for classes, outputs, message in (
        (7, 7, "num_classes of at least 10, as DigitsDataModule says, got 7"),
        (10, 12, r"Expected \(n, 10\) logits from the network, as num_classes says, got \(100, 12\)"),
    ):
        module = ManifoldMixupModule(nn.Sequential(nn.Flatten(), nn.Linear(64, outputs)), classes, layers=["input"])
        before = weights_of(module)
        with pytest.raises(ValueError, match=message):
            trainer().fit(module, datamodule=data)
        assert all(torch.equal(value, before[name]) for name, value in weights_of(module).items())


@pytest.mark.filterwarnings("ignore:.*(to_torchscript|TorchScript|torch.jit|torch.export|Metric.updated_called).*")
@pytest.mark.parametrize("method", ["script", "trace"])
@pytest.mark.parametrize(
    "module",
    [
        ManifoldMixupModule(nn.Linear(4, 3), 3),
        SemiSupervisedManifoldMixupModule(nn.Linear(4, 3), num_classes=3, teacher="ema", w_max=10.0),
    ],
    ids=["supervised", "semi-supervised"],
)
def test_torchscript(module, method):
    x = torch.randn(2, 4)
    scripted = module.to_torchscript(method=method, example_inputs=x if method == "trace" else None)
    assert torch.equal(scripted(x), module.model(x))
