"""Any LightningModule under the callback, each batch held against its own step run by hand on y and on y[partners].

Value, gradient, and what the dominant labels leave behind: buffers, numbers on the module, random numbers.
"""

import copy
import random
import warnings

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader

from lightning_manifold_mixup import ManifoldMixupCallback
from tests.exactness import data, network
from tests.helpers import trainer


class Net(L.LightningModule):
    """A network of two hidden layers; subclasses say what their step does."""

    def __init__(self):
        super().__init__()
        self.model = network()
        self.init()

    def init(self):
        """For subclasses."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.loss(self.model(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.01)


def pairs(n=32):
    x, y = data(n)
    return [(x[i : i + 8], y[i : i + 8]) for i in range(0, n, 8)]


def dicts(n=32):
    return [{"image": x, "label": y} for x, y in pairs(n)]


class Hand(L.Callback):
    """Runs each batch by hand before it is trained on; put it after the callback."""

    def __init__(self, callback):
        self.callback, self.wanted, self.got = callback, [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        draw, states = self.callback.last_draw, random_states()
        with torch.enable_grad():
            self.wanted.append(by_hand(trainer, pl_module, batch, batch_idx, draw, states))
        set_random_states(states)

    def on_before_backward(self, trainer, pl_module, loss):
        self.loss = loss.detach().clone()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients = {n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.got.append((self.loss, self.gradients, left_behind(pl_module), random_states()))


def by_hand(trainer, module, batch, batch_idx, draw, states):
    """The loss of the formula, its gradients, what the dominant pass leaves behind, and the random states after it."""
    total, gradients, left = 0.0, {}, None
    labellings = [(1.0, None, True)]
    if draw is not None and draw.layer:
        lam = draw.mix.lam.double()
        labellings = [(lam, slice(None), lam >= 0.5), (1 - lam, draw.mix.partners, lam < 0.5)]
    for weight, rows, dominant in labellings:
        set_random_states(states)
        twin = copy.deepcopy(module)
        vars(twin).pop("training_step", None)
        twin._trainer = trainer
        twin.log = twin.log_dict = lambda *args, **kwargs: None
        mine = copy.deepcopy(batch)
        if rows is not None:
            mine = labelled(mine, rows, draw)
            if draw.layer != "input":
                hook = mixes(draw.mix)
                twin.get_submodule(draw.layer).register_forward_hook(hook)
        output = twin.training_step(mine, batch_idx)
        loss = weight * (output["loss"] if isinstance(output, dict) else output)
        total = total + loss.detach()
        parameters = {name: p for name, p in twin.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                gradients[name] = gradients.get(name, 0) + gradient
        if dominant:
            left = left_behind(twin), random_states()
    return total, gradients, *left


def labelled(batch, rows, draw):
    """A batch of pairs or dicts with the labels of some rows; the input is mixed if k is the input."""

    def mix(x):
        return mixed(x, draw.mix) if draw.layer == "input" else x

    if isinstance(batch, dict):
        return batch | {"image": mix(batch["image"]), "label": batch["label"][rows].clone()}
    return mix(batch[0]), batch[1][rows].clone()


def mixed(h, mix):
    lam = mix.lam.double()
    return lam * h + (1 - lam) * h[mix.partners]


def mixes(mix):
    return lambda module, args, output: mixed(output, mix) if torch.is_grad_enabled() and module.training else None


def left_behind(module):
    """Buffers, parameters that are not trained, and numbers."""
    tensors = [*module.named_buffers(), *((n, p) for n, p in module.named_parameters() if not p.requires_grad)]
    numbers = {n: v for n, v in vars(module).items() if type(v) in (int, float) and not n.startswith("_")}
    return {n: t.detach().clone() for n, t in tensors} | {n: torch.tensor(float(v)) for n, v in numbers.items()}


def random_states():
    return torch.get_rng_state(), random.getstate(), np.random.get_state()


def set_random_states(states):
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])


def assert_formula(module, batches, layer, passes=None, left=True, options=None, **trainer_options):
    """Trains, and compares every batch with the formula.

    Args:
        module: any LightningModule with automatic optimization.
        batches: a list of pairs, or of dicts with ``image`` and ``label``.
        layer: k, or ``"auto"``, whose first batch is not mixed.
        passes: how many the steps are to take; None: any number.
        left: whether what is left behind is compared, too.
        options: of the callback.
        trainer_options: of the Trainer.

    Returns:
        The warnings.
    """
    callback = ManifoldMixupCallback(layers=layer if layer == "auto" else [layer], seed=0, **(options or {}))
    hand = Hand(callback)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loader = DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)
        trainer(callback, hand, **trainer_options).fit(module, loader)
    warned = [str(warning.message) for warning in caught]
    if passes is not None:
        assert sum("twice" in message for message in warned) == passes - 1, warned
    assert len(hand.got) == len(batches) * trainer_options.get("max_epochs", 1)
    for got, wanted in zip(hand.got, hand.wanted, strict=True):
        torch.testing.assert_close(got[0], wanted[0], rtol=1e-7, atol=1e-10)
        for name, gradient in wanted[1].items():
            torch.testing.assert_close(got[1][name], gradient, rtol=1e-6, atol=1e-9)
        if left:
            torch.testing.assert_close(got[2], wanted[2])
            assert torch.equal(got[3][0], wanted[3][0])
            assert got[3][1] == wanted[3][1]
    return warned
