"""Training steps that no rule for tensors can follow: exact all the same, or refused before any weight has changed."""

import logging
import re

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_manifold_mixup import ManifoldMixupCallback, MixingError, mixed_loss
from tests.exactness import CLASSES, Module, assert_exact, by_hand, data, network, train
from tests.helpers import trainer

WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 0.1, 3.0], dtype=torch.float64)


def ce(z, y):
    return F.cross_entropy(z, y, reduction="none")


def counts(z, y):
    c = torch.zeros(CLASSES, dtype=torch.float64)
    for label in y:
        c[label] += 1
    return F.cross_entropy(z, y, 1 / (c + 1))


def counts_of_integers(z, y):
    c = torch.zeros(CLASSES, dtype=torch.long)
    for label in y:
        c[label] += 1
    return (ce(z, y) / c[y]).sum()


def sums_of_classes(z, y):
    s = torch.zeros(CLASSES, CLASSES, dtype=torch.float64)
    for i in range(len(y)):
        s[y[i]] += z[i]
    return (s**2).sum() + F.cross_entropy(z, y)


def margin_in_a_loop(z, y):
    z = z.clone()
    for i in range(len(y)):
        z[i, y[i]] -= 0.35
    return F.cross_entropy(z * 3, y)


def margin_times(z, y):
    z = z.clone()
    for i in range(len(y)):
        z[i, y[i]] *= 0.5
    return F.cross_entropy(z, y)


def one_hot_in_a_loop(z, y):
    o = torch.zeros(len(y), CLASSES, dtype=torch.float64)
    for i in range(len(y)):
        o[i, y[i]] += 1
    return -(o * z.log_softmax(1)).sum() / len(y)


def row_of_a_table(z, y):
    w = torch.ones(CLASSES, CLASSES, dtype=torch.float64)
    for i in range(len(y)):
        row = w[y[i]]
        row.mul_(0.9)
    return (w[y] * z).pow(2).sum()


def confusion(z, y):
    cm = torch.zeros(CLASSES, CLASSES, dtype=torch.float64)
    for t, p in zip(y, z.detach().argmax(1), strict=True):
        cm[t, p] += 1
    return (ce(z, y) * (1 + cm.diag()[y])).mean()


def scatter_into_a_view(z, y):
    target = torch.zeros(2, len(y), CLASSES, dtype=z.dtype)
    target[0].scatter_(1, y[:, None], 1.0)
    return -(target.sum(0) * z.log_softmax(1)).mean()


def view_taken_before(z, y):
    target = torch.zeros(len(y), CLASSES, dtype=z.dtype)
    flat = target.view(-1)
    target.scatter_(1, y[:, None], 1.0)
    return -(flat.view(len(y), CLASSES) * z.log_softmax(1)).mean()


def through_numpy(z, y):
    weight = torch.from_numpy(np.bincount(y.cpu().numpy(), minlength=CLASSES) + 1.0)
    return (ce(z, y) * weight[y.cpu().numpy()]).mean()


def hungarian(z, y):
    cost = -z.detach().log_softmax(1)[:, y]
    rows, columns = linear_sum_assignment(cost.cpu().numpy())
    return F.cross_entropy(z[rows], y[columns])


def branch_on_the_loss(z, y):
    loss = F.cross_entropy(z, y)
    return loss * 2 if loss > 1.6 else loss.pow(2)


def branch_on_its_number(z, y):
    loss = F.cross_entropy(z, y)
    return loss * 2 if float(loss.detach()) > 1.6 else loss.pow(2)


def branch_on_its_item(z, y):
    loss = F.cross_entropy(z, y)
    return loss * loss.item() if loss.item() > 1.0 else loss


def larger_of_two(z, y):
    return max(F.cross_entropy(z, y), F.multi_margin_loss(z, y) * 4)


def hinge_by_max(z, y):
    return max(z.sum() * 0, F.cross_entropy(z, y) - 1.6)


def sorted_losses(z, y):
    return sum(sorted(ce(z, y))[:4])


def while_loop(z, y):
    loss = F.cross_entropy(z, y)
    while loss > 1.2:
        loss = loss * 0.7
    return loss


def count_on_the_host(z, y):
    return ce(z, y).sum() / (1 + int((y == z.argmax(1)).sum()))


def mask_as_a_list(z, y):
    keep = [i for i, label in enumerate(y.tolist()) if label != 2]
    return F.cross_entropy(z[keep], y[keep])


def scripted(z, y):
    return torch.jit.script(_chosen)(z, y)


def _chosen(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return -z.log_softmax(1).gather(1, y[:, None]).mean()


def vmapped(z, y):
    return torch.vmap(F.cross_entropy)(z, y).mean()


def jacobian(z, y):
    return torch.func.vmap(torch.func.grad(lambda a, b: F.cross_entropy(a, b)))(z, y).pow(2).sum()


def one_label(z, y):
    """No sample of the first batch may have it, and then both labellings agree there."""
    total = z.sum() * 0
    for i in range(len(y)):
        if y[i] != 3:
            total = total + ce(z, y)[i]
    return total


def copied_labels(z, y):
    return F.cross_entropy(z, torch.tensor(y)) + F.cross_entropy(z, y)


class Picked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, y):
        ctx.save_for_backward(y)
        ctx.shape = z.shape
        return z.gather(1, y[:, None])

    @staticmethod
    def backward(ctx, gradient):
        (y,) = ctx.saved_tensors
        return torch.zeros(ctx.shape, dtype=gradient.dtype).scatter_(1, y[:, None], gradient), None


def custom_function(z, y):
    return Picked.apply(z.log_softmax(1), y).pow(2).mean()


def data_of_labels(z, y):
    y = y.clone()
    y.data = (y + 1) % CLASSES
    return F.cross_entropy(z, y)


def smoothed_by_scatter(z, y):
    target = torch.full_like(z, 0.1 / (CLASSES - 1)).scatter_(1, y[:, None], 0.9)
    return -(target * z.log_softmax(1)).sum(1).mean()


def confident_only(z, y):
    keep = z.detach().softmax(1).gather(1, y[:, None])[:, 0] > 0.2
    return F.cross_entropy(z[keep], y[keep], reduction="sum") / len(y)


def close_labels(z, y):
    return F.cross_entropy(z, y) * (2.0 if torch.allclose(z.argmax(1).double(), y.double()) else 1.0)


def hook_on_a_loss(z, y):
    loss = ce(z, y)
    loss.register_hook(lambda g: g * torch.linspace(0, 1, len(g), dtype=g.dtype).mean())
    return loss.mean()


def hook_that_reads_labels(z, y):
    if z.requires_grad:
        z.register_hook(lambda g: g * (1 + (y == 1).to(g))[:, None])
    return F.cross_entropy(z, y)


def chunks_in_checkpoints(z, y):
    """As for large vocabularies: the loss of a chunk is computed again in the backward pass."""
    losses = [
        checkpoint(lambda z, y: F.cross_entropy(z, y, reduction="sum"), *chunk, use_reentrant=False)
        for chunk in zip(z.chunk(2), y.chunk(2), strict=True)
    ]
    return sum(losses) / len(y)


def in_a_reentrant_checkpoint(z, y):
    return checkpoint(F.cross_entropy, z, y, use_reentrant=True)


TWICE = [
    counts, counts_of_integers, sums_of_classes, margin_in_a_loop, margin_times, one_hot_in_a_loop, row_of_a_table,
    confusion, scatter_into_a_view, view_taken_before, through_numpy, hungarian, branch_on_the_loss,
    branch_on_its_number, branch_on_its_item, larger_of_two, hinge_by_max, sorted_losses, while_loop,
    count_on_the_host, mask_as_a_list, scripted, vmapped, jacobian, one_label, copied_labels, custom_function,
    data_of_labels, smoothed_by_scatter, confident_only, close_labels, hook_on_a_loss,
    hook_that_reads_labels, chunks_in_checkpoints, in_a_reentrant_checkpoint,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.filterwarnings("ignore:To copy construct")
@pytest.mark.parametrize("loss", TWICE, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("layer", "k"), [("model.1", 2), ("input", 0)])
def test_exact(loss, layer, k):
    assert_exact(loss, layer, k)


def top_losses(z, y):
    return ce(z, y).topk(4).values.mean() + ce(z, y).sort().values[0] + ce(z, y)[None].max(dim=1).values.sum()


def median_and_kth(z, y):
    return ce(z, y).median(dim=0).values + ce(z, y).kthvalue(2).values


def integers_of_one_hot(z, y):
    counts = F.one_hot(y, CLASSES).sum(0)
    assert counts.dtype == torch.long
    counts = counts + (F.one_hot(y, CLASSES) & 1).sum(0)
    return (ce(z, y) / counts[y]).sum()


def rewritten(z, y):
    y = y.clone()
    y[y == 2] = 0
    return F.cross_entropy(z, y)


def ignored(z, y):
    return F.cross_entropy(z, y, WEIGHTS, ignore_index=2, label_smoothing=0.1)


def logged(z, y):
    loss = F.cross_entropy(z, y)
    assert loss.item() < 1e6
    assert not torch.isnan(loss)
    float(loss.detach()), (z.argmax(1) == y).float().mean().item(), y.cpu().numpy()
    assert y.max() < CLASSES
    f"{loss:.3f} {y}", print(y)
    return loss


def by_where(z, y):
    a, b = F.cross_entropy(z, y), F.multi_margin_loss(z, y) * 4
    return torch.where(a < b, a, b * 2)


def shape_in_a_checkpoint(z, y):
    """The backward pass asks for the shape of the labels, and not for what they are."""
    z = checkpoint(lambda z, y: z * len(y) / y.shape[0] * y.dim(), z, y, use_reentrant=False)
    return F.cross_entropy(z, y)


def as_a_whole(z, y):
    return mixed_loss(hungarian, z, y)


def gradient_penalty(z, y):
    (gradient,) = torch.autograd.grad(F.cross_entropy(z, y), z, create_graph=True)
    return F.cross_entropy(z, y) + gradient.pow(2).sum()


ONCE = [
    top_losses, median_and_kth, integers_of_one_hot, rewritten, ignored, logged, by_where, as_a_whole, gradient_penalty,
    shape_in_a_checkpoint,
]  # fmt: skip


@pytest.mark.parametrize("loss", ONCE, ids=lambda f: f.__name__)
def test_exact_in_one_pass(loss, caplog):
    with caplog.at_level(logging.INFO):
        assert_exact(loss, expected_passes=1)
    assert "no verdict" not in caplog.text


def test_one_pass_on_request_is_refused():
    with pytest.raises(MixingError, match=r"cannot follow this training step.*`passes=1`.*No weight has changed"):
        assert_exact(through_numpy, passes=1)


@pytest.mark.parametrize("draws", [torch.rand_like, lambda t: F.dropout(t, 0.5)], ids=["rand_like", "dropout"])
def test_random_numbers_where_labels_go(draws):
    """Both labellings see the same ones, and the global generators end as without the callback."""
    states = []

    def loss(z, y):
        states.append(torch.get_rng_state())
        noise = draws(F.one_hot(y, CLASSES).double())
        return (ce(z, y) * noise.sum(1)).mean()

    module = Module(loss)
    x, y = data(8)
    callback = ManifoldMixupCallback(layers=["input"], seed=0)
    [(draw, weights, value, _)], warned = train(module, DataLoader(TensorDataset(x, y), 8), callback)
    after = torch.get_rng_state()
    assert any("twice" in message for message in warned)
    lam, partners = draw.mix.lam.double(), draw.mix.partners
    module.load_state_dict(weights)
    z = module.model(lam * x + (1 - lam) * x[partners])
    expected = 0
    for weight, labels in ((lam, y), (1 - lam, y[partners])):
        torch.set_rng_state(states[-1])
        expected = expected + weight * loss(z, labels)
    torch.testing.assert_close(value, expected.detach())
    assert torch.equal(torch.get_rng_state(), after)


def test_two_passes_on_request():
    assert_exact(ignored, expected_passes=1, passes=2)  # no warning: it was asked for


class Recomputed(nn.Module):
    """A layer in an activation checkpoint of the older kind, which ``torch.autograd.grad`` refuses."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return checkpoint(self.layer, x, use_reentrant=True)


@pytest.mark.parametrize("automatic", [True, False])
def test_oracles_see_through_reentrant_checkpoints(automatic, caplog):
    def layers():
        first, *between, last = network()
        return nn.Sequential(first, *map(Recomputed, between), last)

    class Manual(Module):
        automatic_optimization = automatic

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if automatic:
                return loss
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            return self.optimizers().step()

    with caplog.at_level(logging.INFO):
        fit(Manual(F.cross_entropy, layers()))
        with pytest.raises(MixingError, match="permuted alike, the loss changes"):
            fit(Manual(lambda z, y: F.cross_entropy(z, y.roll(1)), layers()))
    assert "no verdict" not in caplog.text


def fit(module, n=24):
    batches = DataLoader(TensorDataset(*data(n)), 8)
    return train(module, batches, ManifoldMixupCallback(layers=["model.1"], seed=0))[1]


def uncopied(loss):
    module = Module(loss, network())
    module.numbers = (i for i in range(9))  # a generator, as an iterator over further data is, cannot be copied
    return module


def test_a_module_without_a_copy_is_told_of_reads_that_nobody_can_check():
    reads = r"test_hostile\.py, line \d+, reads what depends on the labels.*mixed_loss"
    assert sum(re.search(reads, message) is not None for message in fit(uncopied(branch_on_its_number))) == 1
    assert not any("reads what" in message for message in fit(uncopied(F.cross_entropy)))


def test_a_module_without_a_copy_is_refused_a_step_that_needs_one():
    def doubled(z, y):
        return F.cross_entropy(z, y) * (2 if y[0] < y[1] else 1)

    with pytest.raises(MixingError, match=r"cannot go on with both\. .*mixed_loss"):
        fit(uncopied(doubled), n=96)


class ScalesGradients(Module):
    """Weighs the gradient of a hidden state by class, far below the last layers, whose gradients the oracles see."""

    def __init__(self):
        first, *middle, last = network()
        more = [layer for _ in range(3) for layer in (nn.Linear(10, 10), nn.Tanh())]
        super().__init__(F.cross_entropy, nn.Sequential(first, *middle, *more, last).double())

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.weighed(self.model[:2](x), y)

    def weighed(self, h, y):
        if h.requires_grad:
            h.register_hook(lambda g: g * (1 + y.to(g))[:, None])
        return self.loss(self.model[2:](h), y)


@pytest.mark.parametrize("layer", ["model.1", "input"])
def test_labels_read_far_back_in_the_backward_pass(layer):
    """Refused before the optimizer steps; exact in two passes."""
    module = ScalesGradients()
    weights = [parameter.clone() for parameter in module.parameters()]
    with pytest.raises(MixingError, match=r"code that runs in the backward pass.*Set `passes=2`"):
        train(module, DataLoader(TensorDataset(*data()), 8), ManifoldMixupCallback(layers=[layer], seed=0))
    assert all(map(torch.equal, module.parameters(), weights))

    callback, batches = ManifoldMixupCallback(layers=[layer], seed=0, passes=2), DataLoader(TensorDataset(*data()), 8)
    seen, _ = train(module, batches, callback)

    def step(twin, batch, choose, mix):
        x, y = batch
        return twin.weighed(twin.model[:2](mix(x)) if layer == "input" else mix(twin.model[:2](x)), choose(y))

    for (draw, weights, value, grads), batch in zip(seen, batches, strict=True):
        wanted, wanted_grads = by_hand(module, step, batch, draw, weights)
        torch.testing.assert_close(value, wanted)
        for name, grad in wanted_grads.items():
            torch.testing.assert_close(grads[name], grad)


@pytest.mark.parametrize("automatic", [True, False])
def test_labels_that_a_step_keeps_are_plain_when_the_batch_is_over(automatic):
    """For callbacks before ours, too, where the step has had its backward pass itself."""

    class Keeps(Module):
        automatic_optimization = automatic

        def training_step(self, batch, batch_idx):
            self.kept = batch[1]
            loss = super().training_step(batch, batch_idx)
            if automatic:
                return loss
            self.manual_backward(loss)
            return self.optimizers().step()

        def on_train_batch_end(self, outputs, batch, batch_idx):
            assert type(self.kept) is torch.Tensor

    class Before(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            assert type(pl_module.kept) is torch.Tensor

    callback = ManifoldMixupCallback(layers=["model.1"], seed=0)
    trainer(Before(), callback).fit(Keeps(F.cross_entropy), DataLoader(TensorDataset(*data()), 8))
