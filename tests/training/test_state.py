"""Steps whose loss reads what the module keeps: memory banks, prototypes, metrics; and steps that change in the run."""

import collections
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_manifold_mixup import ManifoldMixupCallback
from tests.exactness import CLASSES
from tests.formula import Net, assert_formula, pairs
from tests.helpers import trainer

LAYERS = pytest.mark.parametrize("layer", ["auto", "input", "model.1"])


class Buffers(Net):
    """A queue of features and their labels in buffers, as cross-batch memories and supervised MoCo have it."""

    def init(self):
        generator = torch.Generator().manual_seed(1)
        features = torch.randn(16, CLASSES, generator=generator, dtype=torch.float64)
        self.register_buffer("features", F.normalize(features))
        self.register_buffer("labels", torch.randint(CLASSES, (16,), generator=generator))
        self.position = 0

    def loss(self, z, y):
        same = y[:, None] == self.labels[None]
        similarity = F.normalize(z) @ self.features.clone().T
        loss = -(similarity.log_softmax(1) * same).sum(1) / same.sum(1).clamp(min=1)
        rows = slice(self.position, self.position + len(z))
        self.features[rows], self.labels[rows] = F.normalize(z).detach(), y
        self.position = (self.position + len(z)) % 16
        return loss.mean() + F.cross_entropy(z, y)


class Concatenated(Net):
    def init(self):
        self.register_buffer("features", torch.zeros(0, CLASSES, dtype=torch.float64))
        self.register_buffer("labels", torch.zeros(0, dtype=torch.long))

    def loss(self, z, y):
        loss = F.cross_entropy(z, y)
        if len(self.labels):
            same = (y[:, None] == self.labels[None]).double()
            loss = loss + F.binary_cross_entropy_with_logits(z @ self.features.T, same)
        self.features, self.labels = torch.cat([z.detach(), self.features])[:20], torch.cat([y, self.labels])[:20]
        return loss


class Deque(Net):
    def init(self):
        self.queue = collections.deque(maxlen=2)

    def loss(self, z, y):
        loss = F.cross_entropy(z, y)
        for features, labels in self.queue:
            same = (y[:, None] == labels[None]).double()
            loss = loss + F.binary_cross_entropy_with_logits(z @ features.T, same)
        self.queue.append((z.detach(), y))
        return loss


class Copied(Buffers):
    """Written through a view, where superposition cannot go."""

    def loss(self, z, y):
        loss = super().loss(z, y)
        self.labels[:2].copy_(y[:2])
        return loss


@LAYERS
@pytest.mark.parametrize(("kind", "passes"), [(Buffers, 1), (Concatenated, 1), (Deque, 1), (Copied, 2)])
def test_a_memory_bank_gets_the_dominant_labels(kind, passes, layer):
    module = kind()
    assert_formula(module, pairs(), layer, passes=passes)
    labels = [labels for _, labels in module.queue] if kind is Deque else [module.labels]
    assert all(type(part) is torch.Tensor and part.dtype is torch.long for part in labels)


class Prototypes(Net):
    """Written once for each class, in a loop over the labels."""

    def init(self):
        self.register_buffer("centers", torch.zeros(CLASSES, CLASSES, dtype=torch.float64))

    def loss(self, z, y):
        loss = F.cross_entropy(z, y) + (z - self.centers[y]).pow(2).mean()
        for label in y.unique():
            self.centers[label] = 0.9 * self.centers[label] + 0.1 * z[y == label].detach().mean(0)
        return loss


class WrittenInTurn(Net):
    """Several writes into a tensor of its own, with a gradient."""

    def init(self):
        self.register_buffer("counts", torch.zeros(CLASSES, dtype=torch.float64))

    def loss(self, z, y):
        sums = torch.zeros(CLASSES, CLASSES, dtype=torch.float64)
        sums.index_add_(0, y, z)
        sums[y.min()] *= 0.5
        sums[y % 2] += z.detach().sum(0)
        self.counts[y] += 1
        self.counts[y.max()] = 7.0
        self.counts[:] = self.counts.cos()
        return F.cross_entropy(z, y, self.counts + 0.1) + sums.pow(2).mean()


class Decaying(Net):
    """Class counts that are written into, then replaced: what a batch leaves there is written into by the next one."""

    def init(self):
        self.register_buffer("counts", torch.ones(CLASSES, dtype=torch.float64))

    def loss(self, z, y):
        self.counts[y] += 1
        loss = F.cross_entropy(z, y, self.counts)
        self.counts = self.counts * 0.9
        return loss


@LAYERS
@pytest.mark.parametrize(("kind", "passes"), [(Prototypes, 1), (WrittenInTurn, 2), (Decaying, 1)])
def test_what_is_written_into_several_times_keeps_the_last(kind, passes, layer):
    assert_formula(kind(), pairs(), layer, passes=passes)


class Measures(Net):
    def init(self):
        self.accuracy = MulticlassAccuracy(CLASSES, average="micro")
        self.metrics = MetricCollection({"top": MulticlassAccuracy(CLASSES, top_k=2, average="micro")})

    def loss(self, z, y):
        self.log("seen", self.accuracy(z, y))
        self.metrics.update(z, y)
        return F.cross_entropy(z, y)


class Uses(Measures):
    def loss(self, z, y):
        return F.cross_entropy(z, y) * (2 - self.accuracy(z, y))


class UsesLater(Measures):
    def loss(self, z, y):
        self.metrics.update(z, y)
        return F.cross_entropy(z, y) + z.mean() * self.metrics.compute()["top"]


@LAYERS
@pytest.mark.parametrize(("kind", "passes"), [(Measures, 1), (Uses, 2), (UsesLater, 2)])
def test_a_metric_in_the_loss(kind, passes, layer):
    """Both labellings may have the same accuracy in the first batch, and differ in the next."""
    assert_formula(kind(), pairs(), layer, passes=passes)


class Keeps(nn.Module):
    """A criterion that keeps its parts for the step to read."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Module()

    def forward(self, z, y):
        self.hits, self.inner.loss = z.argmax(1) == y, F.cross_entropy(z, y)
        return self.inner.loss * (1 + y.float().mean())


class Reads(Net):
    def init(self):
        self.criterion = Keeps()

    def loss(self, z, y):
        loss = self.criterion(z, y) + self.criterion.hits.double().mean() * z.mean() + self.criterion.inner.loss**2
        self.criterion.inner.loss = self.criterion.inner.loss.detach()
        return loss


@LAYERS
def test_what_a_criterion_keeps(layer):
    module = Reads()
    assert_formula(module, pairs(), layer, passes=1)
    assert type(module.criterion.hits) is torch.Tensor
    assert type(module.criterion.inner.loss) is torch.Tensor


# ------------------------------------------------------------------------------------------- a step that changes


class Changes(Net):
    """From the second batch on, or where it meets a label, the step does what it did not do in the checks."""

    def init(self):
        self.register_buffer("seen", torch.zeros(CLASSES, dtype=torch.float64))
        self.calls = 0

    def loss(self, z, y):
        self.calls += 1
        self.seen += torch.bincount(y, minlength=CLASSES)
        loss = F.cross_entropy(z, y)
        return loss if self.calls == 1 else self.later(z, y, loss)


class Decides(Changes):
    def later(self, z, y, loss):
        return loss * 2 if (z.argmax(1) == y).sum() == 1 else loss


class DecidesInACriterion(Changes):
    def init(self):
        super().init()

        class Differs(nn.Module):
            def forward(self, z, y):
                return (F.cross_entropy(z, y),) * (2 if (z.argmax(1) == y).sum() == 1 else 1)

        self.criterion = Differs()

    def later(self, z, y, loss):
        return sum(self.criterion(z, y))


class ReadsTheHost(Changes):
    def later(self, z, y, loss):
        return loss * (1 + (z.argmax(1) == y).double().mean().item())


class ReadsForTheLogFirst(Changes):
    """The same read was harmless before; another line uses it now."""

    def loss(self, z, y):
        self.log("accuracy", (z.argmax(1) == y).double().mean().item())
        loss = super().loss(z, y) * 1.0
        weight = 1.0
        if self.calls > 1:
            weight = 2 - (z.argmax(1) == y).double().mean().item()
        return loss * weight

    def later(self, z, y, loss):
        return loss


class GoesThroughNumpy(Changes):
    def later(self, z, y, loss):
        return loss * float(1 + np.mean(z.detach().argmax(1).numpy() == y.numpy()))


class GoesThroughNumpyAlone(Changes):
    def later(self, z, y, loss):
        return F.cross_entropy(z, torch.from_numpy(y.numpy()))


class Writes(Changes):
    def later(self, z, y, loss):
        table = torch.zeros(2, len(y), CLASSES, dtype=z.dtype)
        table[0].scatter_(1, y[:, None], 1.0)
        return loss - (table.sum(0) * z).mean()


@LAYERS
@pytest.mark.parametrize(
    "kind",
    [Decides, DecidesInACriterion, ReadsTheHost, ReadsForTheLogFirst, GoesThroughNumpy, GoesThroughNumpyAlone, Writes],
)
def test_what_comes_up_later(kind, layer):
    """Exact from the batch on in which it comes up; the module has run each batch once, random numbers included."""
    warned = assert_formula(kind(), pairs(48), layer, max_epochs=2)
    assert sum("twice" in message and "sees what the step keeps" in message for message in warned) == 1


def test_a_line_that_reads_for_the_log_later_costs_no_second_pass():
    class Logs(Changes):
        def later(self, z, y, loss):
            self.log("accuracy", (z.argmax(1) == y).double().mean().item())
            return loss

    assert_formula(Logs(), pairs(), "model.1", passes=1)


# ------------------------------------------------------------------------------------------------ random numbers


def test_a_small_effect_of_random_numbers_is_no_leak():
    """Virtual adversarial training: the loss hardly changes with the noise, and is no other for it."""

    class Virtual(Net):
        def training_step(self, batch, batch_idx):
            x, y = batch
            z = self.model(x)
            noise = (torch.randn_like(x) * 0.1).requires_grad_()
            target = z.detach().softmax(1)
            distance = F.kl_div(self.model(x + noise).log_softmax(1), target, reduction="batchmean")
            (direction,) = torch.autograd.grad(distance, noise)
            moved = self.model(x + 0.5 * F.normalize(direction))
            return F.cross_entropy(z, y) + F.kl_div(moved.log_softmax(1), target, reduction="batchmean")

    assert_formula(Virtual(), pairs(), "input", passes=1)


OWN = np.random.default_rng(0)


def test_random_numbers_that_nobody_can_repeat(caplog):
    """A generator of the user's file: no oracle has a verdict, and the step runs once."""

    class Augments(Net):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return F.cross_entropy(self.model(x * OWN.uniform(0.5, 2)), y)

    with warnings.catch_warnings(record=True) as warned, caplog.at_level("INFO"):
        warnings.simplefilter("always")
        loader = DataLoader(pairs(), batch_size=None, collate_fn=lambda batch: batch)
        trainer(ManifoldMixupCallback(layers=["model.1"], seed=0)).fit(Augments(), loader)
    assert not any("twice" in str(warning.message) for warning in warned)
    said = [record.message for record in caplog.records if "has no verdict" in record.message]
    assert len(said) == 2
    assert "when it runs again" in said[1]
