"""At least 500 random training steps, each held against the formula: none may be wrong without an error."""

import copy
import random
import warnings

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_manifold_mixup import ManifoldMixupCallback, MixingError
from tests.exactness import data, network
from tests.helpers import trainer
from tests.programs import CLASSES, program

X, Y = data(16)
BATCHES = [(X[:8], Y[:8]), (X[8:], Y[8:])]


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


NAMES = {"torch": torch, "F": F, "np": np, "random": random, "C": CLASSES, "F64": torch.float64, "Twice": Twice}


class Programmed(L.LightningModule):
    def __init__(self, source):
        super().__init__()
        names = dict(NAMES)
        exec(source, names)
        self.loss = names["step"]
        self.model = network()
        for name, shape in (("counts", (CLASSES,)), ("table", (CLASSES, CLASSES)), ("bank", (CLASSES, CLASSES))):
            self.register_buffer(name, torch.ones(shape, dtype=torch.float64))
        self.number, self.history = 0, []

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.loss(self, self.model(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


class Record(L.Callback):
    """The module and the random state before each batch; what the batch made of them."""

    def __init__(self, callback):
        self.callback, self.before, self.after = callback, [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        twin = Programmed.__new__(Programmed)
        nn.Module.__init__(twin)
        twin.model = copy.deepcopy(pl_module.model)
        twin.loss = pl_module.loss
        put(twin, state(pl_module))
        self.before.append((self.callback.last_draw, twin, random_state()))

    def on_before_backward(self, trainer, pl_module, loss):
        self.loss = loss.detach().clone()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradients = [None if p.grad is None else p.grad.clone() for p in pl_module.model.parameters()]
        self.after.append((self.loss, gradients, state(pl_module), random_state()))


def state(module):
    values = {name: getattr(module, name).detach().clone() for name in ("counts", "table", "bank")}
    return values | {"number": module.number, "history": [float(value) for value in module.history]}


def put(module, values):
    for name, value in values.items():
        setattr(module, name, copy.deepcopy(value))


def random_state():
    return torch.get_rng_state(), random.getstate()


def by_hand(twin, before, batch, mix, layer):
    """Loss and gradients of the formula, and what the dominant labelling leaves behind."""
    lam, (x, y) = mix.lam.double(), batch
    h = x if layer == "input" else twin.model[:2](x)
    z = (twin.model if layer == "input" else twin.model[2:])(lam * h + (1 - lam) * h[mix.partners])
    values, total, left, histories = state(twin), 0.0, None, []
    for weight, labels, dominant in ((lam, y, lam >= 0.5), (1 - lam, y[mix.partners], lam < 0.5)):
        put(twin, values)
        torch.set_rng_state(before[0])
        random.setstate(before[1])
        total = total + weight * twin.loss(twin, z, labels.clone())
        histories.append(weight * torch.tensor(twin.history, dtype=torch.float64))
        if dominant:
            left = state(twin), random_state()
    gradients = torch.autograd.grad(total, list(twin.model.parameters()), allow_unused=True)
    return total.detach(), gradients, *left, sum(histories).tolist()


def runs(source, layer):
    """Whether the program is one: it runs on plain labels, and its loss and gradient are finite."""
    module = Programmed(source)
    loss = None
    for x, y in BATCHES:
        try:
            loss = module.loss(module, module.model(x), y.clone())
            gradients = torch.autograd.grad(loss, list(module.model.parameters()))
        except Exception:
            return False
        if loss.ndim or not loss.isfinite() or loss.abs() > 1e6 or not all(g.isfinite().all() for g in gradients):
            return False
    return True


def fault(source, layer, seed):
    """What is wrong with the training step under the callback: None, or a text; `"refused: ..."` is no fault."""
    module = Programmed(source)
    callback = ManifoldMixupCallback(layers=[layer], seed=seed)
    record = Record(callback)
    torch.manual_seed(seed)
    random.seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trainer(callback, record).fit(module, DataLoader(TensorDataset(X, Y), 8))
        except MixingError as error:
            return f"refused: {error}"
    for number, ((draw, twin, before), got, batch) in enumerate(zip(record.before, record.after, BATCHES, strict=True)):
        loss, gradients, left, random_after, losses = by_hand(twin, before, batch, draw.mix, layer)
        if not torch.allclose(got[0], loss, rtol=1e-6, atol=1e-9):
            return f"batch {number}: loss {got[0]:.9g}, formula {loss:.9g}"
        for one, other in zip(got[1], gradients, strict=True):
            if not torch.allclose(one, other, rtol=1e-5, atol=1e-8):
                return f"batch {number}: gradient off by {(one - other).abs().max():.3g}"
        if got[2]["history"] and np.allclose(got[2]["history"], losses):
            left["history"] = losses  # a loss in superposition shows its mixed value
        for name, value in left.items():
            if not np.allclose(got[2][name], value):
                return f"batch {number}: {name} is {got[2][name]}, of the dominant labels {value}"
        if not torch.equal(got[3][0], random_after[0]) or got[3][1] != random_after[1]:
            return f"batch {number}: the random generators end otherwise than without the callback"
    return None


def drive(seeds):
    """How many programs were exact, and how many were refused; any other outcome is an error that shows the program."""
    exact, refused = 0, 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in seeds:
            source, layer = program(seed), ("input", "model.1")[seed % 2]
            if not runs(source, layer):
                continue
            found = fault(source, layer, seed)
            assert found is None or found.startswith("refused"), f"seed {seed}, layer {layer}: {found}\n{source}"
            exact, refused = exact + (found is None), refused + (found is not None)
    return exact, refused


@pytest.mark.parametrize("block", range(8))
def test_none_is_wrong_without_an_error(block):
    exact, refused = drive(range(block * 68, block * 68 + 68))
    assert exact + refused >= 60
    assert exact >= 3 * refused


@pytest.mark.slow
@pytest.mark.parametrize("block", range(10))
def test_none_is_wrong_without_an_error_of_many(block):
    exact, refused = drive(range(10_000 + block * 500, 10_000 + block * 500 + 500))
    assert exact >= 3 * refused
