"""Steps that change what they are given, the batch or the weights: the checks run them often, and leave no trace."""

import copy
from dataclasses import dataclass

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_manifold_mixup import ManifoldMixupCallback, eligible_layers
from tests.exactness import CLASSES
from tests.formula import Net, assert_formula, dicts, mixed, pairs
from tests.helpers import trainer


def cross_entropy(z, y):
    return F.cross_entropy(z, y)


def through_numpy(z, y):
    return (F.cross_entropy(z, y, reduction="none") * torch.from_numpy(1.0 + y.numpy())).mean()


LOSSES = pytest.mark.parametrize("loss", [cross_entropy, through_numpy], ids=["one pass", "two passes"])
LAYERS = pytest.mark.parametrize("layer", ["auto", "input", "model.1"])


class InPlace(Net):
    def training_step(self, batch, batch_idx):
        x, y = batch
        x -= x.mean(0)
        x.mul_(0.5)
        y += 1
        y %= CLASSES
        return self.loss(self.model(x), y)


class Pops(Net):
    def training_step(self, batch, batch_idx):
        y = batch.pop("label")
        return self.loss(self.model(batch.pop("image")), y)


class Sets(Net):
    def training_step(self, batch, batch_idx):
        batch["image"] = batch["image"] * 0.5
        batch["label"] = (batch["label"] + 1) % CLASSES
        batch["loss"] = self.loss(self.model(batch["image"]), batch["label"])
        return batch


@LAYERS
@LOSSES
@pytest.mark.parametrize(("kind", "batches"), [(InPlace, pairs), (Pops, dicts), (Sets, dicts)])
def test_a_step_may_change_its_batch(kind, batches, loss, layer):
    module = kind()
    module.loss = loss
    assert_formula(module, batches(), layer, passes=1 if loss is cross_entropy else 2)


def test_a_changed_structure_is_checked_on_the_batch_as_it_was():
    """The check after a batch that was built otherwise sees that batch before the step has written into it."""

    class Later(InPlace):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss if batch_idx < 2 else loss * loss.detach()

    module = Later()
    module.loss = cross_entropy
    assert_formula(module, pairs(), "model.1")


def test_the_report_of_layers_leaves_the_batch():
    module, (batch,) = Pops(), dicts(8)
    module.loss = cross_entropy
    assert "model.1" in eligible_layers(module, batch).eligible
    assert set(batch) == {"image", "label"}


@dataclass
class Batch:
    image: Tensor
    label: Tensor


def test_an_object_of_attributes_stays_as_it_was():
    class Assigns(Net):
        def training_step(self, batch, batch_idx):
            batch.label = (batch.label + 1) % CLASSES
            return F.cross_entropy(self.model(batch.image), batch.label)

    batches = [Batch(*pair) for pair in pairs(8)]
    before = copy.deepcopy(batches)
    loader = DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)
    trainer(ManifoldMixupCallback(layers=["model.1"], seed=0)).fit(Assigns(), loader)
    assert torch.equal(batches[0].label, before[0].label)


class Momentum(Net):
    """A momentum encoder that the step itself moves, by ``data`` as MoCo does; its weights are left behind once."""

    def init(self):
        self.encoder = copy.deepcopy(self.model).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        x, y = batch
        for key, query in zip(self.encoder.parameters(), self.model.parameters(), strict=True):
            key.data = key.data * 0.9 + query.data * 0.1
        return self.loss(self.model(x), y) + self.encoder[4].weight.pow(2).sum() * self.model[4].bias.sum()


class MomentumInPlace(Momentum):
    def training_step(self, batch, batch_idx):
        x, y = batch
        with torch.no_grad():
            torch._foreach_mul_(list(self.encoder.parameters()), 0.9)
            for key, query in zip(self.encoder.parameters(), self.model.parameters(), strict=True):
                key.add_(query, alpha=0.1)
        return self.loss(self.model(x), y) + self.encoder[4].weight.pow(2).sum() * self.model[4].bias.sum()


class Normalised(Net):
    """Weights that are trained, and that the step scales first."""

    def training_step(self, batch, batch_idx):
        self.model[4].weight.data.mul_(0.9)
        with torch.no_grad():
            self.model[2].weight.clamp_(-0.2, 0.2)
        return self.loss(self.model(batch[0]), batch[1])


@LAYERS
@LOSSES
@pytest.mark.parametrize("kind", [Momentum, MomentumInPlace, Normalised])
def test_a_step_may_write_into_weights(kind, loss, layer):
    module = kind()
    module.loss = loss
    assert_formula(module, pairs(16), layer)


@pytest.mark.parametrize("passes", ["auto", 2])
def test_weights_written_into_without_the_checks(passes):
    module = Normalised()
    module.loss = cross_entropy
    assert_formula(module, pairs(16), "model.1", options={"self_check": False, "passes": passes})


class ReadsGradients(L.LightningModule):
    """Manual optimization that reads and changes gradients: a norm, sharpness-aware steps (SAM)."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.model = Net().model
        self.norms = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self.model(x), y))
        norm = torch.stack([p.grad.norm() for p in self.parameters()]).norm()
        self.norms.append(norm.item())
        steps = [0.05 * p.grad / norm for p in self.parameters()]
        with torch.no_grad():
            for p, step in zip(self.parameters(), steps, strict=True):
                p.add_(step)
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self.model(x), y))
        with torch.no_grad():
            for p, step in zip(self.parameters(), steps, strict=True):
                p.sub_(step)
        optimizer.step()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("layer", ["input", "model.1"])
def test_manual_optimization_may_read_gradients(layer):
    """Two batches by hand: the norms, and the weights at the end."""
    module, twin, batches = ReadsGradients(), Net().model, pairs(16)
    callback, draws = ManifoldMixupCallback(layers=[layer], seed=0), []

    class Seen(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            draws.append(callback.last_draw.mix)

    trainer(callback, Seen()).fit(module, DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch))
    parameters = list(twin.parameters())
    for (x, y), mix, norm in zip(batches, draws, module.norms, strict=True):

        def gradients(x=x, y=y, mix=mix):
            z = twin(mixed(x, mix)) if layer == "input" else twin[2:](mixed(twin[:2](x), mix))
            lam = mix.lam.double()
            loss = lam * F.cross_entropy(z, y) + (1 - lam) * F.cross_entropy(z, y[mix.partners])
            return torch.autograd.grad(loss, parameters)

        first = gradients()
        wanted = torch.stack([g.norm() for g in first]).norm()
        assert norm == pytest.approx(wanted.item())
        with torch.no_grad():
            for p, g in zip(parameters, first, strict=True):
                p.add_(0.05 * g / wanted)
        second = gradients()
        with torch.no_grad():
            for p, g, h in zip(parameters, first, second, strict=True):
                p.sub_(0.05 * g / wanted).sub_(0.1 * h)
    torch.testing.assert_close(list(module.model.parameters()), parameters)
