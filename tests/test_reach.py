"""Where the package runs: both names of Lightning, all systems, and what an import of it brings along."""

import ast
import subprocess
import sys
import warnings
from pathlib import Path

import lightning.pytorch as current
import pytest
import torch
import torch.nn.functional as F

import lightning_manifold_mixup
from lightning_manifold_mixup import ManifoldMixupCallback
from lightning_manifold_mixup._step.host import Callback
from lightning_manifold_mixup.evaluation import EvaluationCallback
from tests.helpers import LAYERS, ConvNet, assert_untouched, loader, weights_of
from tests.helpers import Draws as _Draws

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the packages that it looks for
    import pytorch_lightning as twin

ROOT = Path(lightning_manifold_mixup.__file__).parent
PACKAGE = ROOT.name
HOSTS = {"lightning.pytorch": current, "pytorch_lightning": twin}
OPTIONS = {
    "max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
    "enable_progress_bar": False, "enable_model_summary": False,
}  # fmt: skip


class Draws(_Draws, Callback):
    """A callback under both names, as those of the package."""


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

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", F.cross_entropy(self.model(batch[0]), batch[1]))

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
        optimizer, losses = torch.optim.SGD(net.parameters(), 0.1), []
        for (x, y), (layer, lam, partners) in zip([*loader(), *loader()], draws.drawn, strict=True):
            before, after = net.states(x)[layer]
            h = before(x)
            logits = after(lam * h + (1 - lam) * h[partners])
            loss = lam * F.cross_entropy(logits, y) + (1 - lam) * F.cross_entropy(logits, y[partners])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
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

    def test_callbacks_of_the_user_and_evaluations(self, host):
        class Own(ManifoldMixupCallback):
            pass

        class Evaluation(EvaluationCallback):
            family, plot, start, update, compute = "own", None, None, None, None

        host.Trainer(callbacks=[Own(), Evaluation()], **OPTIONS)

    def test_module_of_the_other_name_is_refused_by_the_trainer(self, host):
        [other] = [module for module in HOSTS.values() if module is not host]
        with pytest.raises(TypeError, match="must be a `LightningModule`"):
            host.Trainer(callbacks=[ManifoldMixupCallback()], **OPTIONS).fit(classifier(other), loader())


def test_callback_is_one_of_each_name():
    assert isinstance(ManifoldMixupCallback(), (current.Callback, twin.Callback))
    assert Callback.__mro__.index(current.Callback) < Callback.__mro__.index(twin.Callback)


# ------------------------------------------------------------------------------------------------------------ imports

WINGS = ("paper", "cli", "evaluation")
POSIX = {"fcntl", "grp", "mmap", "posix", "pty", "pwd", "resource", "signal", "syslog", "termios", "tty", "ctypes"}
POSIX_CALLS = {"fork", "forkpty", "dup", "dup2", "kill", "killpg", "getuid", "nice", "mallopt", "sched_getaffinity"}
EXTRAS = ("torchvision", "sklearn", "matplotlib", "rich", "jsonargparse", "timm", "tensorboard", "pytorch_lightning")


def files(*wings):
    """The files of some wings; without any, those of the product."""
    for path in sorted(ROOT.rglob("*.py")):
        wing = path.relative_to(ROOT).parts[0]
        if wing in wings if wings else wing not in (*WINGS, "__main__.py"):
            yield path


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def importers(paths, *forbidden):
    return {
        f"{path.relative_to(ROOT).as_posix()} imports {name}"
        for path in paths
        for name in imports(path)
        if any(name == f"{PACKAGE}.{wing}" or name.startswith(f"{PACKAGE}.{wing}.") for wing in forbidden)
    }


def test_product_imports_no_wing():
    assert not importers(files(), *WINGS)


def test_evaluation_and_paper_import_no_command():
    assert not importers(files("evaluation"), "paper", "cli")
    assert not importers(files("paper"), "cli")


def test_product_needs_no_posix():
    for path in files():
        assert not POSIX.intersection(name.split(".")[0] for name in imports(path)), path
        tree = ast.parse(path.read_text(encoding="utf-8"))
        attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not POSIX_CALLS & attributes, path


def test_import_brings_no_extra_and_no_wing():
    """Compared with what Lightning and torchmetrics themselves import where it is installed."""
    script = (
        "import sys, lightning, torchmetrics; before = set(sys.modules); import lightning_manifold_mixup;"
        "print(*set(sys.modules) - before)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    loaded = run.stdout.split()
    assert f"{PACKAGE}.callback" in loaded
    assert not [name for name in loaded if name.split(".")[0] in EXTRAS]
    assert not [name for name in loaded if name.startswith(tuple(f"{PACKAGE}.{wing}" for wing in WINGS))]
