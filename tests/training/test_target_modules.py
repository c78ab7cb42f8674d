"""Targets that are made inside the step: what a teacher says, and the input itself."""

import pytest
import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_manifold_mixup import ManifoldMixupCallback, MixingError
from tests.exactness import by_hand, train


class Reconstructs(LightningModule):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.Tanh()).double()
        self.decoder, self.head = nn.Linear(8, 6).double(), nn.Linear(8, 3).double()

    def training_step(self, batch, batch_idx):
        x, y = batch
        h = self.encoder(x.view(len(x), -1))
        return F.cross_entropy(self.head(h), y) + F.mse_loss(self.decoder(h), x)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Distils(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        self.teacher = nn.Linear(6, 3).double().requires_grad_(False)

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self.net(x)
        with torch.no_grad():
            soft = self.teacher(x)
        return F.cross_entropy(logits, y) + F.mse_loss(logits, soft)

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), 0.1)


@pytest.fixture
def batches():
    return DataLoader(TensorDataset(torch.randn(24, 6).double(), torch.randint(3, (24,))), 8)


@pytest.mark.parametrize("layer", ["encoder", "input"])
def test_the_input_as_a_target(layer, batches):
    module = Reconstructs()
    callback = ManifoldMixupCallback(layers=[layer], seed=0, target_key=[1, 0], input_key=0)
    seen, _ = train(module, batches, callback)

    def step(twin, batch, choose, mix):
        x, y = batch
        h = mix(twin.encoder(x)) if layer == "encoder" else twin.encoder(mix(x))
        return F.cross_entropy(twin.head(h), choose(y)) + F.mse_loss(twin.decoder(h), mix(x))

    assert_equal(module, step, seen, batches)


@pytest.mark.parametrize("layer", ["net.1", "input"])
def test_a_teacher(layer, batches):
    module = Distils()
    seen, _ = train(module, batches, ManifoldMixupCallback(layers=[layer], seed=0, target_modules=["teacher"]))

    def step(twin, batch, choose, mix):
        x, y = batch
        logits = twin.net[2](mix(twin.net[:2](x))) if layer == "net.1" else twin.net(mix(x))
        soft = (mix(twin.teacher(x)) if layer == "net.1" else twin.teacher(mix(x))).detach()
        return F.cross_entropy(logits, choose(y)) + F.mse_loss(logits, soft)

    assert_equal(module, step, seen, batches)


class OnlyDistils(Distils):
    """Its labels are for validation."""

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            soft = self.teacher(batch[0]).tanh()
        return F.mse_loss(self.net(batch[0]), soft)


@pytest.mark.parametrize("layers", [["net.1"], ["input"], "auto"], ids=str)
def test_a_teacher_alone(layers, batches):
    module = OnlyDistils()
    seen, _ = train(module, batches, ManifoldMixupCallback(layers=layers, seed=0, target_modules=["teacher"]))
    if layers == "auto":
        assert seen[0][0] is None
    batches = list(batches)[len(seen) - sum(draw is not None for draw, *_ in seen) :]
    seen = [mixed for mixed in seen if mixed[0] is not None]
    for mixed, batch in zip(seen, batches, strict=True):

        def step(twin, batch, choose, mix, at_input=mixed[0].layer == "input"):
            x = mix(batch[0]) if at_input else batch[0]
            h, soft = twin.net[:2](x), twin.teacher(x)
            logits = twin.net[2](h if at_input else mix(h))
            return F.mse_loss(logits, (soft if at_input else mix(soft)).tanh().detach())

        assert_equal(module, step, [mixed], [batch])


def assert_equal(module, step, seen, batches):
    for (draw, weights, value, grads), batch in zip(seen, batches, strict=True):
        wanted, wanted_grads = by_hand(module, step, batch, draw, weights)
        torch.testing.assert_close(value, wanted)
        for name, grad in wanted_grads.items():
            if grad is not None:
                torch.testing.assert_close(grads[name], grad)


@pytest.mark.parametrize(
    ("module", "layer", "match"),
    [
        (Reconstructs, "encoder", r"reads the input batch\[0\] past this layer.*`target_key=\[1, 0\]` and `input_key"),
        (Distils, "net.1", r"what 'teacher' makes of the batch.*Set `target_modules=\['teacher'\]`"),
    ],
)
def test_undeclared(module, layer, match, batches):
    module = module()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(MixingError, match=match):
        train(module, batches, ManifoldMixupCallback(layers=[layer], seed=0))
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_unknown_name(batches):
    with pytest.raises(ValueError, match=r"`target_modules`.*got 'teachr'. Did you mean 'teacher'"):
        train(Distils(), batches, ManifoldMixupCallback(layers=["net.1"], target_modules=["teachr"]))
