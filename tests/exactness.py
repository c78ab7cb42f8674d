"""A training step under the callback, held against the same step run by hand on y and on y[partners]."""

import copy
import dataclasses
import warnings

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_manifold_mixup import ManifoldMixupCallback
from tests.helpers import trainer

CLASSES = 5


def network(width=10, seed=0):
    """Two hidden layers, in double precision: what differs from the formula differs visibly."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = nn.Linear(6, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, CLASSES)
        return nn.Sequential(*layers).double()


def data(n=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (n,), generator=generator)


class Module(L.LightningModule):
    """Somebody's module with any loss of (logits, labels)."""

    def __init__(self, loss, model=None):
        super().__init__()
        self.model = model or network()
        self.loss = loss

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.loss(self.model(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


class Manual(Module):
    """Likewise, with manual optimization."""

    def __init__(self, loss):
        super().__init__(loss)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        self.step(optimizer)

    def step(self, optimizer):
        optimizer.step()


class Watch(L.Callback):
    """Notes the loss that is propagated back, the gradients, and the weights they were computed with."""

    def __init__(self, callback):
        self.callback, self.seen = callback, []

    def on_before_backward(self, trainer, pl_module, loss):
        weights = {name: p.detach().cpu().clone() for name, p in pl_module.named_parameters()}
        draw = self.callback.last_draw
        draw = None if draw is None else dataclasses.replace(draw, mix=draw.mix.to("cpu"))
        self.seen.append([draw, weights, loss.detach().cpu().clone(), None])

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        grads = {n: None if p.grad is None else p.grad.cpu().clone() for n, p in pl_module.named_parameters()}
        self.seen[-1][3] = grads


def train(module, batches, callback, **kwargs):
    watch = Watch(callback)
    warned = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(callback, watch, *kwargs.pop("callbacks", ()), **kwargs).fit(module, batches)
        warned = [str(w.message) for w in caught]
    return watch.seen, warned


def by_hand(module, step, batch, draw, weights):
    """Loss and gradients of ``lam * L(y) + (1 - lam) * L(y[partners])``; ``step(module, batch, y, mix_state)``."""
    twin = copy.deepcopy(module)
    twin.load_state_dict(weights, strict=False)
    lam, partners = draw.mix.lam.double(), draw.mix.partners
    total = 0.0
    for weight, choose in ((lam, lambda y: y), (1 - lam, lambda y: y[partners])):
        total = total + weight * step(twin, batch, choose, lambda h: lam * h + (1 - lam) * h[partners])
    twin.zero_grad()
    total.backward()
    return total.detach(), {name: p.grad for name, p in twin.named_parameters() if p.requires_grad}


def assert_exact(loss, layer="model.1", k=2, expected_passes=None, seed=0, model=None, x_y=None, **options):
    """Trains on three batches, and compares each with the formula, value and gradient."""
    module = Module(loss, model)
    x, y = x_y or data()
    callback = ManifoldMixupCallback(layers=[layer], seed=seed, **options)
    seen, warned = train(module, DataLoader(TensorDataset(x, y), 8), callback)
    twice = [message for message in warned if "twice" in message]
    if expected_passes is not None:
        assert len(twice) == expected_passes - 1, warned
    assert len(seen) == 3

    def step(twin, batch, choose, mix):
        inputs, labels = batch
        h = mix(inputs) if layer == "input" else mix(twin.model[:k](inputs))
        return loss(twin.model(h) if layer == "input" else twin.model[k:](h), choose(labels))

    for (draw, weights, value, grads), batch in zip(seen, DataLoader(TensorDataset(x, y), 8), strict=True):
        wanted, wanted_grads = by_hand(module, step, batch, draw, weights)
        torch.testing.assert_close(value.double(), wanted.double(), rtol=1e-6, atol=1e-9)
        for name, grad in wanted_grads.items():
            if grad is not None:
                torch.testing.assert_close(grads[name], grad, rtol=1e-6, atol=1e-9)
    return warned
