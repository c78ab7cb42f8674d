"""What reaches the loss past layer k and the targets is found before any weight has changed, and named."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from lightning_manifold_mixup import ManifoldMixupCallback, MixingError
from tests.exactness import CLASSES, data, network
from tests.helpers import trainer, weights_of

N = 8


class Base(L.LightningModule):
    """A step on a batch that is a dict; `loss(module, batch)`."""

    def __init__(self, loss, **parts):
        super().__init__()
        self.model = network()
        self.loss = loss
        self.register_buffer("by_position", torch.linspace(0, 1, N, dtype=torch.float64))
        for name, part in parts.items():
            setattr(self, name, part)

    def training_step(self, batch, batch_idx):
        return self.loss(self, batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def batches(n=16, **more):
    x, y = data(n)
    return DataLoader([{"x": x[i], "label": y[i], **{k: v[i] for k, v in more.items()}} for i in range(n)], N)


def refusal(module, loader, layer="model.1", **options):
    """The message of the MixingError that is raised before any weight, buffer or counter has changed."""
    before = weights_of(module)
    callback = ManifoldMixupCallback(layers=[layer], seed=0, **options)
    with pytest.raises(MixingError) as raised:
        trainer(callback).fit(module, loader)
    for name, value in weights_of(module).items():
        assert torch.equal(value, before[name]), name
    message = str(raised.value)
    assert "No weight has changed" in message
    return message


def ce(module, batch, **kwargs):
    return F.cross_entropy(module.model(batch["x"]), batch["label"], **kwargs)


def test_second_label():
    second = data(16, seed=1)[1]
    module = Base(lambda m, b: ce(m, b) + F.cross_entropy(m.model(b["x"]), b["second"]))
    message = refusal(module, batches(second=second), target_key="label")
    assert "The loss also reads batch['second']" in message
    assert "`target_key=['label', 'second']`" in message
    trainer(ManifoldMixupCallback(layers=["model.1"], target_key=["label", "second"], seed=0)).fit(
        module, batches(second=second)
    )


@pytest.mark.parametrize("layer", ["model.1", "input"])
def test_weights_of_samples(layer):
    """A mask or weight beside the labels."""
    weight = torch.rand(16, dtype=torch.float64)
    module = Base(lambda m, b: (ce(m, b, reduction="none") * b["weight"]).mean())
    message = refusal(module, batches(weight=weight), layer, input_key="x", target_key="label")
    assert "The loss also reads batch['weight']" in message
    assert "`target_key=['label', 'weight']`" in message


def test_mask():
    mask = (torch.rand(16) > 0.3).double()
    module = Base(lambda m, b: (ce(m, b, reduction="none") * b["loss_mask"]).mean())
    message = refusal(module, batches(loss_mask=mask), target_key="label")
    assert "The loss also reads batch['loss_mask']" in message
    assert "mask_key=['loss_mask']" in message


def test_lengths():
    length = torch.randint(1, 7, (16,))
    module = Base(lambda m, b: ce(m, b) + (m.model(b["x"])[:, 0] * b["length"]).mean())
    message = refusal(module, batches(length=length), target_key="label")
    assert "The loss also reads batch['length']" in message
    assert "the length of the samples, of which a mixed one needs the larger, `mask_key=['length']`" in message


def test_a_label_inside_the_input():
    x, y = data(16)
    module = Base(lambda m, b: F.cross_entropy(m.model(b[0][0]), b[0][1]))
    message = refusal(module, DataLoader([((x[i], y[i]), i) for i in range(16)], N))
    assert "The loss also reads batch['0.1']" in message


@pytest.mark.parametrize("layers", ["auto", ["input"]])
def test_labels_that_no_loss_uses(layers):
    """Also with layers="auto": the first batch is not mixed, and must not be trained on."""
    module = Base(lambda m, b: m.model(b["x"]).pow(2).mean())
    before = weights_of(module)
    with pytest.raises(MixingError, match=r"no loss with a gradient used the labels.*Set `target_key`.*No weight has"):
        trainer(ManifoldMixupCallback(layers=layers)).fit(module, batches())
    assert all(torch.equal(value, before[name]) for name, value in weights_of(module).items())


def test_two_parts_at_once():
    first, second = torch.rand(16, dtype=torch.float64), torch.rand(16, dtype=torch.float64)
    module = Base(lambda m, b: (ce(m, b, reduction="none") * b["first"] * b["second"]).mean())
    message = refusal(module, batches(first=first, second=second), target_key="label")
    assert "batch['first'], batch['second']" in message


def test_second_input():
    more = torch.randn(16, 6, dtype=torch.float64)
    module = Base(lambda m, b: F.cross_entropy(m.model(b["x"] + b["more"]), b["label"]))
    message = refusal(module, batches(more=more), "input", input_key="x", target_key="label")
    assert "`input_key=['x', 'more']`" in message


@pytest.mark.filterwarnings("ignore:Found .* module.* in eval mode")
def test_teacher():
    def distilled(m, b):
        with torch.no_grad():
            teacher = m.teacher(b["x"])
        z = m.model(b["x"])
        return F.cross_entropy(z, b["label"]) + F.kl_div(z.log_softmax(1), teacher.softmax(1), reduction="batchmean")

    module = Base(distilled, teacher=network(seed=1).requires_grad_(False).eval())
    assert "`target_modules=['teacher']`" in refusal(module, batches(), target_key="label")
    callback = ManifoldMixupCallback(layers=["model.1"], target_key="label", target_modules=["teacher"], seed=0)
    trainer(callback).fit(module, batches())


def test_input_as_target():
    module = Base(
        lambda m, b: ce(m, b) + F.mse_loss(m.decoder(m.model(b["x"])), b["x"]), decoder=nn.Linear(CLASSES, 6).double()
    )
    message = refusal(module, batches(), target_key="label")
    assert "The loss also reads the input batch['x'] past this layer" in message
    assert "set `target_key=['label', 'x']` and `input_key=['x']`" in message
    callback = ManifoldMixupCallback(layers=["model.1"], target_key=["label", "x"], input_key=["x"], seed=0)
    trainer(callback).fit(module, batches())


def test_labels_enter_the_network_before():
    """Class-conditional: the state at k depends on the labels."""
    module = Base(
        lambda m, b: F.cross_entropy(m.model(b["x"] + m.embedding(b["label"]) * 0.1), (b["label"] + 1) % CLASSES),
        embedding=nn.Embedding(CLASSES, 6).double(),
    )
    assert "The targets also enter the network before 'model.1'" in refusal(module, batches(), target_key="label")


def through_numpy(m, b):
    weight = torch.from_numpy(b["x"].numpy() ** 2).mean(1)
    return (ce(m, b, reduction="none") * weight).mean()


def topk_indices(m, b):
    keep = b["x"].norm(dim=1).topk(4).indices
    return ce(m, b, reduction="none")[keep].sum()


@pytest.mark.parametrize("loss", [through_numpy, topk_indices], ids=lambda f: f.__name__)
def test_input_past_the_layer(loss):
    assert "The loss also reads the input batch['x'] past this layer" in refusal(
        Base(loss), batches(), target_key="label"
    )


def buffer_by_position(m, b):
    return (ce(m, b, reduction="none") * m.by_position).mean()


def neighbours(m, b):
    z = m.model(b["x"])
    return F.cross_entropy(z, b["label"]) + (z[:-1] - z[1:]).pow(2).mean()


def first_half(m, b):
    return ce(m, {"x": b["x"], "label": b["label"]}, reduction="none")[:4].mean()


@pytest.mark.parametrize("loss", [buffer_by_position, neighbours, first_half], ids=lambda f: f.__name__)
@pytest.mark.parametrize("layer", ["model.1", "input"])
def test_order_of_the_samples(loss, layer):
    message = refusal(Base(loss), batches(), layer, target_key="label")
    assert "the order of the samples matters" in message
    assert "`with unmixed():`" in message


class Sorted(nn.Module):
    """Sorts its samples after the first layer, and gives them back sorted."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 10).double(), nn.Tanh()
        self.head = nn.Linear(10, CLASSES).double()

    def forward(self, x):
        order = x.sum(1).argsort()
        return self.head(self.second(self.first(x)[order])), order


def test_sorted_inside_the_network():
    def loss(m, b):
        z, order = m.sorts(b["x"])
        return F.cross_entropy(z, b["label"][order])

    message = refusal(Base(loss, sorts=Sorted()), batches(), "sorts.second", target_key="label")
    assert "past this layer" in message or "the order of the samples matters" in message


class TimeMajor(nn.Module):
    """Its states are (time, batch, features), with as many steps as samples."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(6, 10).double(), nn.Linear(10, CLASSES).double()

    def forward(self, x):
        steps = torch.linspace(0.5, 1.5, N, dtype=torch.float64)[:, None, None] * x
        return self.head(self.embed(steps).tanh().cumsum(0).mean(0))


def test_wrong_batch_dimension():
    module = Base(lambda m, b: F.cross_entropy(m.sequences(b["x"]), b["label"]), sequences=TimeMajor())
    message = refusal(module, batches(), "sequences.embed", target_key="label", batch_dim=0)
    assert "set `batch_dim=1`" in message
    callback = ManifoldMixupCallback(layers=["sequences.embed"], target_key="label", batch_dim=1, seed=0)
    trainer(callback).fit(module, batches())
