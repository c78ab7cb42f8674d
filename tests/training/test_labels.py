"""Batches and labels of many kinds in a fit: loss and gradient are those of the step by hand, on y and y[partners]."""

import itertools

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loops.optimization.automatic import Closure
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import WarningCache
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.classification import BinaryAccuracy

from lightning_manifold_mixup import ManifoldMixupCallback
from tests.graphs import Batch, Data, GCNConv, TensorDict, global_mean_pool, tensorclass
from tests.helpers import Draws, trainer

N, C = 6, 4
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(N, 5, generator=GENERATOR, dtype=torch.float64)
Y, OTHER = torch.tensor([0, 1, 2, 3, 1, 0]), torch.tensor([3, 0, 1, 1, 2, 2])
UNKNOWN = torch.tensor([[1.0, 0, -1, 1], [0, -1, 1, 0], [1, 1, 0, -1]] * 2, dtype=torch.float64)
WEIGHTS, VALUES = torch.rand(N, dtype=torch.float64) + 0.1, torch.randn(N, C, dtype=torch.float64)


@tensorclass
class Sample:
    x: torch.Tensor
    y: torch.Tensor


class Slots:
    __slots__ = ("x", "y")

    def __init__(self, x, y):
        self.x, self.y = x, y


class Step(L.LightningModule):
    """Somebody's module: `loss` takes the head's output and the batch."""

    def __init__(self, loss, state=lambda module, batch: module.body(batch[0])):
        super().__init__()
        torch.manual_seed(0)
        self.conv = GCNConv(5, 5).double()
        self.body = nn.Sequential(nn.Linear(5, 8), nn.Tanh()).double()
        self.head = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, C)).double()
        self.loss, self.state, self.seen = loss, state, []

    def training_step(self, batch, batch_idx):
        return self.loss(self.head(self.state(self, batch)), batch)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        gradients = [p.grad.clone() for p in [*self.body.parameters(), *self.head.parameters()]]
        self.seen.append((outputs["loss"], gradients))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def fit(module, batch, **kwargs):
    """Yields lam, partners, loss and gradients of each batch."""
    callback = ManifoldMixupCallback(layers=["body"], alpha=1.0, seed=3, **kwargs)
    draws = Draws(callback)
    trainer(callback, draws).fit(module, DataLoader([batch] * 3, collate_fn=lambda batches: batches[0]))
    assert len(module.seen) == 3
    for (_, lam, partners), (loss, gradients) in zip(draws.drawn, module.seen, strict=True):
        yield lam.double(), partners, loss, gradients


def graph_state(module, batch):
    return module.body(global_mean_pool(module.conv(batch.x, batch.edge_index), batch.batch))


def attribute(module, batch):
    return module.body(batch.x)


def of_y(loss):
    return lambda z, batch: loss(z, batch.y if hasattr(batch, "y") else batch[1])


def known(z, y):
    return F.binary_cross_entropy_with_logits(z[y >= 0], y[y >= 0])


GRAPHS = Batch.from_data_list(
    [
        Data(
            x=torch.randn(3 + i, 5, generator=GENERATOR, dtype=torch.float64),
            edge_index=torch.randint(3, (2, 4), generator=GENERATOR),
            y=Y[i : i + 1],
        )
        for i in range(N)
    ]
)


def with_y(batch, y):
    new = batch.clone()
    new.y = y
    return new


PAIR = lambda _, p: (X, Y[p])  # noqa: E731
CASES = {
    "pair": (Step(of_y(F.cross_entropy)), (X, Y), PAIR, {}),
    "slots": (Step(of_y(F.cross_entropy), attribute), Slots(X, Y), lambda b, p: Slots(X, Y[p]), {}),
    "tensorclass": (
        Step(of_y(F.cross_entropy), attribute),
        Sample(x=X, y=Y, batch_size=[N]),
        lambda b, p: Sample(x=X, y=Y[p], batch_size=[N]),
        {},
    ),
    "TensorDict": (
        Step(lambda z, b: F.cross_entropy(z, b["n", "label"]), lambda module, b: module.body(b["x"])),
        TensorDict({"x": X, "n": {"label": Y}}, batch_size=[N]),
        lambda b, p: {"x": X, ("n", "label"): Y[p]},
        {"target_key": "n.label"},
    ),
    "graphs": (Step(of_y(F.cross_entropy), graph_state), GRAPHS, lambda b, p: with_y(b, Y[p]), {}),
    "several targets": (
        Step(lambda z, b: F.cross_entropy(z, b[1]) + F.cross_entropy(-z, b[2])),
        (X, Y, OTHER),
        lambda b, p: (X, Y[p], OTHER[p]),
        {"target_key": (1, 2)},
    ),
    "one-hot, argmax": (
        Step(lambda z, b: F.cross_entropy(z, b[1].argmax(1))),
        (X, F.one_hot(Y, C).double()),
        lambda b, p: (X, F.one_hot(Y[p], C).double()),
        {},
    ),
    "indices as floats": (
        Step(lambda z, b: F.cross_entropy(z, b[1].long())), (X, Y.double()), lambda b, p: (X, Y[p].double()), {},
    ),
    "weights": (
        Step(lambda z, b: (F.cross_entropy(z, b[1], reduction="none") * b[2]).sum() / b[2].sum()),
        (X, Y, WEIGHTS),
        lambda b, p: (X, Y[p], WEIGHTS[p]),
        {"target_key": [1, 2]},
    ),
    "values that are not everywhere": (
        Step(lambda z, b: F.l1_loss(z[b[2]], b[1][b[2]])),
        (X, VALUES, UNKNOWN > 0),
        lambda b, p: (X, VALUES[p], UNKNOWN[p] > 0),
        {"target_key": [1, 2]},
    ),
    "unknown labels": (Step(of_y(known)), (X, UNKNOWN), lambda b, p: (X, UNKNOWN[p]), {}),
    "threshold": (
        Step(lambda z, b: F.binary_cross_entropy_with_logits(z[:, 0], (b[1] > 1).double())),
        (X, Y.double()),
        lambda b, p: (X, Y[p].double()),
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient(case):
    module, batch, partnered, kwargs = CASES[case]
    for lam, p, loss, gradients in fit(module, batch, **kwargs):
        h = module.state(module, batch)
        z = module.head(lam * h + (1 - lam) * h[p])
        by_hand = lam * module.loss(z, batch) + (1 - lam) * module.loss(z, partnered(batch, p))
        torch.testing.assert_close(loss, by_hand.detach(), rtol=1e-6, atol=1e-8)
        parameters = [*module.body.parameters(), *module.head.parameters()]
        torch.testing.assert_close(gradients, list(torch.autograd.grad(by_hand, parameters)), rtol=1e-5, atol=1e-8)


def test_values_are_mixed_as_values():
    y = torch.randn(N, generator=GENERATOR, dtype=torch.float64)
    module = Step(lambda z, b: F.smooth_l1_loss(z[:, 0], b[1]))
    for lam, p, loss, _ in fit(module, (X, y)):
        h = module.body(X)
        z = module.head(lam * h + (1 - lam) * h[p])
        by_hand = F.smooth_l1_loss(z[:, 0], lam * y + (1 - lam) * y[p])
        torch.testing.assert_close(loss, by_hand.detach(), rtol=1e-6, atol=1e-8)


def test_time_major_targets():
    """(time, samples) labels of (time, samples, features) inputs."""
    x = torch.randn(3, N, 5, generator=GENERATOR, dtype=torch.float64)
    y = torch.randint(C, (3, N), generator=GENERATOR)
    module = Step(lambda z, b: F.cross_entropy(z.flatten(0, 1), b[1].flatten()))
    for lam, p, loss, _ in fit(module, (x, y), batch_dim=1):
        assert len(p) == N
        h = module.body(x)
        z = module.head(lam * h + (1 - lam) * h[:, p])
        by_hand = lam * module.loss(z, (x, y)) + (1 - lam) * module.loss(z, (x, y[:, p]))
        torch.testing.assert_close(loss, by_hand.detach(), rtol=1e-6, atol=1e-8)


def test_two_loaders_have_partners_of_their_own():
    class Two(Step):
        def training_step(self, batch, batch_idx):
            (x, y), (u, v) = batch
            return F.cross_entropy(self.head(self.body(x)), y) + F.cross_entropy(self.head(self.body(u)), v)

    u, v = torch.randn(4, 5, generator=GENERATOR, dtype=torch.float64), torch.tensor([3, 2, 1, 0])
    module, batch = Two(None), [(X, Y), (u, v)]
    for lam, p, loss, gradients in fit(module, batch, input_key=["0.0", "1.0"], target_key=["0.1", "1.1"]):
        h, g = module.body(X), module.body(u)

        def part(h, y, p, lam=lam):
            z = module.head(lam * h + (1 - lam) * h[p])
            return lam * F.cross_entropy(z, y) + (1 - lam) * F.cross_entropy(z, y[p])

        totals = [part(h, Y, p) + part(g, v, torch.tensor(q)) for q in itertools.permutations(range(4))]
        best = min(totals, key=lambda total: abs(total.item() - loss.item()))
        torch.testing.assert_close(loss, best.detach(), rtol=1e-6, atol=1e-8)
        parameters = [*module.body.parameters(), *module.head.parameters()]
        torch.testing.assert_close(gradients, list(torch.autograd.grad(best, parameters)), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("layers", ["auto", ["body"]])
def test_boxes_are_refused(layers):
    """A class beside values in one row."""
    boxes = torch.cat([Y[:, None].double(), torch.rand(N, 3, generator=GENERATOR, dtype=torch.float64)], 1)
    module = Step(lambda z, b: F.cross_entropy(z, b[1][:, 0].long()) + F.mse_loss(z[:, 1:], b[1][:, 1:]))
    before = [p.clone() for p in module.parameters()]
    with pytest.raises(MisconfigurationException, match=r"got both in one tensor: read as classes by `long` in "):
        trainer(ManifoldMixupCallback(layers=layers)).fit(module, DataLoader([(X, boxes)] * 3, batch_size=None))
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_auto_finds_the_layers_after_pooling():
    module = Step(of_y(F.cross_entropy), graph_state)
    callback = ManifoldMixupCallback(alpha=1.0, seed=3)
    draws = Draws(callback)
    trainer(callback, draws).fit(module, DataLoader([GRAPHS] * 4, collate_fn=lambda batches: batches[0]))
    mixed = [draw for draw in draws.drawn if draw is not None]
    assert mixed
    assert {layer for layer, *_ in mixed} <= {"body.0", "body.1", "head.0", "head.1"}


def test_labels_of_nodes_that_are_not_trained_on_stay_out_of_the_loss():
    """Partners are drawn among the nodes of the mask: class 3, which none of them has, gets no weight in the loss."""
    train = torch.tensor([True, True, True, False, True, False])
    labels = torch.where(train, Y % 3, 3)

    class Nodes(Step):
        def training_step(self, batch, batch_idx):
            mask = batch["train_mask"]
            return F.cross_entropy(self.head(self.body(batch["x"]))[mask], batch["y"][mask])

    batch = {"x": X, "y": labels, "train_mask": train}
    module = Nodes(None)
    for lam, p, loss, gradients in fit(module, batch):
        assert train[p[train]].all()
        h = module.body(X)
        z = module.head(lam * h + (1 - lam) * h[p])[train]
        by_hand = lam * F.cross_entropy(z, labels[train]) + (1 - lam) * F.cross_entropy(z, labels[p][train])
        torch.testing.assert_close(loss, by_hand.detach(), rtol=1e-6, atol=1e-8)
        parameters = [*module.body.parameters(), *module.head.parameters()]
        torch.testing.assert_close(gradients, list(torch.autograd.grad(by_hand, parameters)), rtol=1e-5, atol=1e-8)


@pytest.mark.filterwarnings("ignore:.*returned `None`")
def test_a_first_batch_that_the_step_skips(monkeypatch):
    monkeypatch.setattr(Closure, "warning_cache", WarningCache())  # other tests wait for its warning, given once

    class Skips(Step):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if batch_idx else None

        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx:
                super().on_train_batch_end(outputs, batch, batch_idx)

    module = Skips(of_y(F.cross_entropy))
    callback = ManifoldMixupCallback(layers=["body"], alpha=1.0, seed=3)
    draws = Draws(callback)
    trainer(callback, draws).fit(module, DataLoader([(X, Y)] * 3, collate_fn=lambda batches: batches[0]))
    assert len(module.seen) == 2
    for (_, lam, p), (loss, _) in zip(draws.drawn[1:], module.seen, strict=True):
        z = module.head(lam.double() * module.body(X) + (1 - lam.double()) * module.body(X)[p])
        by_hand = lam.double() * F.cross_entropy(z, Y) + (1 - lam.double()) * F.cross_entropy(z, Y[p])
        torch.testing.assert_close(loss, by_hand.detach())


class Measured(Step):
    """Has a metric of its float labels; ``cast`` makes them what the metric is given."""

    def __init__(self, cast):
        super().__init__(None)
        self.accuracy, self.cast, self.hits = BinaryAccuracy(), cast, []

    def training_step(self, batch, batch_idx):
        z = self.head(self.body(batch[0]))[:, 0]
        self.now = self.accuracy((z > 0).double(), self.cast(batch[1]))
        return F.binary_cross_entropy_with_logits(z, batch[1])

    def on_train_batch_end(self, outputs, batch, batch_idx):
        super().on_train_batch_end(outputs, batch, batch_idx)
        self.hits.append(self.now.item())


@pytest.mark.parametrize("cast", [lambda y: y, torch.Tensor.int], ids=["float", "int"])
def test_metrics_of_zeros_and_ones_see_the_dominant_labels(cast):
    module, y = Measured(cast), (Y > 1).double()
    for (lam, p, loss, _), hits in zip(fit(module, (X, y)), module.hits, strict=True):
        h = module.body(X)
        z = module.head(lam * h + (1 - lam) * h[p])[:, 0]
        first, second = (F.binary_cross_entropy_with_logits(z, labels) for labels in (y, y[p]))
        torch.testing.assert_close(loss, (lam * first + (1 - lam) * second).detach())
        assert hits == pytest.approx(((z > 0) == (y if lam >= 0.5 else y[p])).double().mean().item())
