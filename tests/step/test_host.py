"""The Trainers of `lightning.pytorch` and of `pytorch_lightning`: the same numbers, for callbacks and for modules."""

import copy
import importlib
import subprocess
import sys
import warnings

import lightning.pytorch as current
import pytest
import torch
import torch.nn.functional as F

from lightning_manifold_mixup import ManifoldMixupCallback, ManifoldMixupModule, SemiSupervisedManifoldMixupModule
from lightning_manifold_mixup._step.host import Callback
from lightning_manifold_mixup.evaluation import CalibrationCallback
from tests.helpers import CLASSES, LAYERS, ConvNet, assert_untouched, loader, weights_of
from tests.helpers import Draws as _Draws

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the packages that it looks for
    import pytorch_lightning as twin

HOSTS = {"lightning.pytorch": current, "pytorch_lightning": twin}
OPTIONS = {
    "max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
    "enable_progress_bar": False, "enable_model_summary": False,
}  # fmt: skip


class Draws(_Draws, Callback):
    """A callback under both names, as those of the package."""


class DrawsOfModule(Draws):
    """Of a module whose own callback comes after this one."""

    def on_train_batch_start(self, *args):
        pass

    def on_before_backward(self, *args):
        super().on_train_batch_start(*args, 0)


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.1)


def train(net, drawn):
    """By hand, with what was drawn; returns the losses."""
    optimizer, losses = sgd(net.parameters()), []
    for (x, y), (layer, lam, partners) in zip(len(drawn) // 3 * [*loader()], drawn, strict=True):
        before, after = net.states(x)[layer]
        h = before(x)
        logits = after(lam * h + (1 - lam) * h[partners])
        loss = lam * F.cross_entropy(logits, y) + (1 - lam) * F.cross_entropy(logits, y[partners])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def classifier(host):
    class Net(host.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.losses = ConvNet(), []

        def training_step(self, batch, batch_idx):
            x, y = batch
            loss = F.cross_entropy(self.model(x), y)
            self.log("loss", loss)
            self.losses.append(loss.item())
            return loss

        def forward(self, x):
            return self.model(x)

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", F.cross_entropy(self.model(batch[0]), batch[1]))

        def test_step(self, batch, batch_idx):
            pass

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    return Net()


@pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS.keys())
class TestHost:
    def test_loss_is_that_of_the_formula(self, host):
        module = classifier(host)
        net = ConvNet()
        net.load_state_dict(module.model.state_dict())
        callback = ManifoldMixupCallback(layers=LAYERS, seed=3, log_mixing=True)
        draws = Draws(callback)
        trainer = host.Trainer(callbacks=[callback, draws], **OPTIONS)
        trainer.fit(module, loader(), loader())
        losses = train(net, draws.drawn)
        assert module.losses == pytest.approx(losses, rel=1e-5)
        parameters = {
            name: value for name, value in weights_of(module.model).items() if name in dict(net.named_parameters())
        }
        torch.testing.assert_close(parameters, {name: p.detach() for name, p in net.named_parameters()})
        assert trainer.callback_metrics["manifold_mixup/lam"].item() == pytest.approx(draws.drawn[-1][1].item())
        assert_untouched(module)

    def test_resumed_run_draws_what_the_uninterrupted_one_drew(self, host, tmp_path):
        def fit(epochs, checkpoint=None):
            callback = ManifoldMixupCallback(layers="auto", seed=3)
            draws = Draws(callback)
            trainer = host.Trainer(callbacks=[callback, draws], **(OPTIONS | {"max_epochs": epochs}))
            trainer.fit(module := classifier(host), loader(), ckpt_path=checkpoint)
            return trainer, module, [(layer, lam.item()) for layer, lam, _ in filter(None, draws.drawn)]

        torch.manual_seed(0)
        half, _, drawn = fit(1)
        half.save_checkpoint(tmp_path / "half.ckpt")
        *_, rest = fit(2, tmp_path / "half.ckpt")
        torch.manual_seed(0)
        assert fit(2)[2] == drawn + rest

    def test_callback_that_is_not_in_a_list(self, host):
        callback = ManifoldMixupCallback(layers=LAYERS)
        assert callback in host.Trainer(callbacks=callback, **OPTIONS).callbacks

    def test_evaluation_of_a_data_module_by_a_callback_of_the_user(self, host, tmp_path):
        class Own(CalibrationCallback):
            pass

        class Data(host.LightningDataModule):
            def test_dataloader(self):
                return loader()

        callback, module = Own(lams=[], dirname=str(tmp_path)), classifier(host)
        host.Trainer(callbacks=callback, **OPTIONS).test(module, Data(), verbose=False)
        [row] = [row for row in callback.rows if row["inputs"] == "data"]
        x, y = loader().dataset.tensors
        assert row["nll"] == pytest.approx(F.cross_entropy(module.model.eval()(x), y).item(), rel=1e-5)

    def test_module_of_the_other_name_is_refused_by_the_trainer(self, host):
        [other] = [module for module in HOSTS.values() if module is not host]
        with pytest.raises(TypeError, match="must be a `LightningModule`"):
            host.Trainer(callbacks=[ManifoldMixupCallback()], **OPTIONS).fit(classifier(other), loader())


@pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS.keys())
class TestModule:
    """The complete classifiers, which are no class of either name alone."""

    def test_weights_are_those_of_the_formula(self, host):
        module = ManifoldMixupModule(ConvNet(), CLASSES, layers=LAYERS, mixup={"seed": 3}, optimizer=sgd)
        net = copy.deepcopy(module.model)
        draws = DrawsOfModule(module.mixup)
        trainer = host.Trainer(callbacks=draws, **OPTIONS)
        trainer.fit(module, loader(), loader())
        train(net, draws.drawn)
        torch.testing.assert_close(weights_of(module.model), weights_of(net))
        [values] = trainer.test(module, loader(), verbose=False)
        x, y = loader().dataset.tensors
        module.eval()
        assert values["test/nll"] == pytest.approx(F.cross_entropy(net.eval()(x), y).item(), rel=1e-5)
        torch.testing.assert_close(torch.cat(trainer.predict(module, loader())), net(x).softmax(1))
        assert_untouched(module)

    def test_only_hooks_that_somebody_has_written_are_called(self, host):
        """Lightning tells by the code of a method, which is another one in the other package."""

        class Mine(ManifoldMixupModule):
            def train_dataloader(self):
                return loader()

        trainer = host.Trainer(**OPTIONS)
        trainer.fit(Mine(ConvNet(), CLASSES, optimizer=sgd))
        assert trainer.callback_metrics.keys() == {"train/loss", "train/accuracy"}
        with pytest.raises(Exception, match="val_dataloader"):
            trainer.validate(Mine(ConvNet(), CLASSES))

    def test_few_labels(self, host):
        class Data(host.LightningDataModule):
            def train_dataloader(self):
                return {"labelled": loader(8), "unlabelled": loader()}

        class Late(Data):
            def on_after_batch_transfer(self, batch, dataloader_idx):
                return batch

        losses = {}
        for name in HOSTS:
            torch.manual_seed(0)
            module = SemiSupervisedManifoldMixupModule(ConvNet(), CLASSES, "ema", layers=LAYERS, mixup={"seed": 3})
            trainer = (host if name == host.__name__ else current).Trainer(**OPTIONS)
            data = Data() if name == host.__name__ else Data().train_dataloader()
            trainer.fit(module, data)
            losses[name] = trainer.callback_metrics["train/loss"]
        assert len({loss.item() for loss in losses.values()}) == 1
        with pytest.raises(Exception, match="without `on_after_batch_transfer`, got Late"):
            host.Trainer(**OPTIONS).fit(module, Late())

    def test_copies_and_checkpoints(self, host, tmp_path):
        module = ManifoldMixupModule(ConvNet(), CLASSES, alpha=1.5, mixup={"probability": 0.5}, optimizer=sgd)
        trainer = host.Trainer(**OPTIONS)
        trainer.fit(module, loader())
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        loaded = ManifoldMixupModule.load_from_checkpoint(tmp_path / "a.ckpt", model=ConvNet(), weights_only=False)
        assert (loaded.mixup.alpha, loaded.mixup.probability) == (1.5, 0.5)
        for other in (loaded, copy.deepcopy(module)):
            torch.testing.assert_close(weights_of(other), weights_of(module), rtol=0, atol=0)
            host.Trainer(**OPTIONS).fit(other, loader())

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of jsonargparse, by Lightning
    def test_command_line(self, host, tmp_path, monkeypatch):
        monkeypatch.setattr(sys, "argv", ["fit"])
        importlib.import_module(f"{host.__name__}.cli")
        network = {"class_path": "tests.helpers.ConvNet", "init_args": {"width": 6}}
        arguments = {
            "model": {
                "class_path": "lightning_manifold_mixup.ManifoldMixupModule",
                "init_args": {"model": network, "num_classes": CLASSES, "alpha": 1.5, "layers": LAYERS},
            },
            "trainer": OPTIONS
            | {"callbacks": [{"class_path": "lightning_manifold_mixup.evaluation.CalibrationCallback"}]},
        }
        cli = host.cli.LightningCLI(args=arguments, run=False, save_config_callback=None, seed_everything_default=False)
        cli.trainer.fit(cli.model, loader())
        cli.trainer.save_checkpoint(tmp_path / "a.ckpt")
        loaded = ManifoldMixupModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=False)
        torch.testing.assert_close(weights_of(loaded), weights_of(cli.model), rtol=0, atol=0)
        assert loaded.mixup.alpha == 1.5


def test_one_module_for_both_trainers_in_turn():
    module = ManifoldMixupModule(ConvNet(), CLASSES, layers=LAYERS, mixup={"seed": 3}, optimizer=sgd)
    net, drawn = copy.deepcopy(module.model), []
    for host in (current, twin, current):
        draws = DrawsOfModule(module.mixup)
        host.Trainer(callbacks=draws, **(OPTIONS | {"max_epochs": 1})).fit(module, loader(), loader())
        drawn += draws.drawn
    train(net, drawn)
    torch.testing.assert_close(weights_of(module.model), weights_of(net))


MADE = "made = ManifoldMixupCallback(), ManifoldMixupModule(torch.nn.Linear(4, 2), 2, alpha=0)\n"
ORDERS = {
    "ours last": f"import pytorch_lightning as twin; from lightning_manifold_mixup import *; {MADE}",
    "ours first": "from lightning_manifold_mixup import *; import pytorch_lightning as twin; " + MADE,
    "made before": f"from lightning_manifold_mixup import *; {MADE}from pytorch_lightning.callbacks import Callback\n"
    "import pytorch_lightning as twin",
}
USED = """
import inspect
assert issubclass(ManifoldMixupModule, twin.LightningModule) and issubclass(ManifoldMixupCallback, twin.Callback)
assert inspect.getsource(twin) and find_spec("pytorch_lightning").loader is twin.__loader__
assert "lightning_manifold_mixup" not in type(twin.__loader__).__module__
callback, module = made
trainer = twin.Trainer(callbacks=callback, accelerator="cpu", fast_dev_run=True)
trainer.fit(module, torch.utils.data.DataLoader([(torch.randn(4), i % 2) for i in range(4)], 2))
assert trainer.global_step == 1
"""


# Each in a process of its own, which has the imports behind it that both have in common.
IN_TURN = """
import os, sys, traceback, torch, torchmetrics, warnings
from importlib.util import find_spec
assert not {"lightning", "pytorch_lightning"} & set(sys.modules)
warnings.simplefilter("ignore")
assert find_spec("pytorch_lightning").origin
for order, program in zip(sys.argv[1::2], sys.argv[2::2]):
    if not os.fork():
        try:
            exec(program)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.wait()[1] == 0, order
"""


def test_order_of_imports():
    """From the moment when both are there, also for what was made before, or when a command line asks for the base."""
    programs = [argument for order, made in ORDERS.items() for argument in (order, f"{made}\n{USED}")]
    run = subprocess.run([sys.executable, "-c", IN_TURN, *programs], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_callback_is_one_of_each_name():
    assert isinstance(ManifoldMixupCallback(), (current.Callback, twin.Callback))
    assert Callback.__mro__.index(current.Callback) < Callback.__mro__.index(twin.Callback)
