"""Small modules, data and trainers that the tests share. The modules know nothing of mixup.

On a machine with a GPU, ``TEST_ACCELERATOR=gpu pytest ...`` trains there instead of on the CPU; tests that compare with
tensors of the host are not written for it.
"""

import os

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Accuracy

CLASSES = 4
ACCELERATOR = os.environ.get("TEST_ACCELERATOR", "cpu")


class ConvNet(nn.Module):
    """A plain network with a stem, two stages and a head."""

    def __init__(self, width=8):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.layer1 = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, x):
        return self.fc(self.layer2(self.layer1(self.conv1(x))).mean((2, 3)))

    def states(self, x):
        """x, and what each of the layers that can be mixed makes of it, as (name, rest of the network) pairs."""
        head = lambda h: self.fc(h.mean((2, 3)))  # noqa: E731
        return {
            "input": (lambda x: x, lambda h: head(self.layer2(self.layer1(self.conv1(h))))),
            "model.conv1": (self.conv1, lambda h: head(self.layer2(self.layer1(h)))),
            "model.layer1": (lambda x: self.layer1(self.conv1(x)), lambda h: head(self.layer2(h))),
            "model.layer2": (lambda x: self.layer2(self.layer1(self.conv1(x))), head),
        }


LAYERS = ["input", "model.layer1", "model.layer2"]


class Classifier(L.LightningModule):
    """Somebody's LightningModule: a criterion, a metric on the same labels, logging."""

    def __init__(self, model=None, criterion=None, lr=0.1):
        super().__init__()
        self.model = model or ConvNet()
        self.criterion = criterion or nn.CrossEntropyLoss()
        self.accuracy = Accuracy(task="multiclass", num_classes=CLASSES)
        self.lr = lr
        self.losses = []

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        loss = self.criterion(logits, y)
        self.accuracy(logits, y)
        self.log("accuracy", self.accuracy)
        self.log("loss", loss)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


class Step(Classifier):
    """A training step that a compiler can take whole: nothing but tensors."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.criterion(self(x), y)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())


class Validated(Classifier):
    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y))


def images(n=24, size=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, size, size, generator=generator), torch.randint(CLASSES, (n,), generator=generator)


def loader(n=24, batch_size=8, shuffle=False, **kwargs):
    return DataLoader(TensorDataset(*images(n)), batch_size, shuffle=shuffle, **kwargs)


def trainer(*callbacks, **kwargs):
    defaults = {
        "max_epochs": 1,
        "accelerator": ACCELERATOR,
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(callbacks=list(callbacks), **(defaults | kwargs))


class Draws(L.Callback):
    """Notes what a ManifoldMixupCallback has drawn; put it after that one."""

    def __init__(self, callback):
        self.callback, self.drawn = callback, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        draw = self.callback.last_draw
        self.drawn.append(None if draw is None else (draw.layer, draw.mix.lam.cpu(), draw.mix.partners.cpu()))


def weights_of(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_untouched(module):
    """No hook and no attribute of ours is left anywhere in the module."""
    assert "lightning_manifold_mixup" not in str(type(vars(module).get("training_step")))  # it may be a compiled one
    for part in module.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks):
            assert not [hook for hook in hooks.values() if "lightning_manifold_mixup" in str(type(hook).__module__)]
            assert not [
                hook for hook in hooks.values() if "lightning_manifold_mixup" in str(getattr(hook, "__module__", ""))
            ]
