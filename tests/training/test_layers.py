"""Layers found in a fit, `layers="auto"`: LightningModules of all kinds, and a first batch that is as without."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning import LightningModule, seed_everything
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import WarningCache
from lightning.pytorch.loops.optimization.automatic import Closure
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset

from lightning_manifold_mixup import ManifoldMixupCallback
from tests import helpers, zoo

BATCH = 5


class Batches(IterableDataset):
    def __init__(self, make, number=3):
        self.batches = [make() for _ in range(number)]

    def __iter__(self):
        return iter(self.batches)


def fit(module, make, layers="auto", **kwargs):
    callback = ManifoldMixupCallback(layers=layers, seed=0)
    helpers.trainer(callback, **kwargs).fit(module, DataLoader(Batches(make), batch_size=None))
    helpers.assert_untouched(module)
    return callback.state_dict()


# -------------------------------------------------------------------------------- the first batch is as without


class Checkpointed(helpers.ConvNet):
    def forward(self, x):
        h = self.conv1(x)
        for layer in (self.layer1, self.layer2):
            h = checkpoint(layer, h, use_reentrant=self.reentrant)
        return self.fc(F.dropout(h.mean((2, 3)), 0.5, self.training))

    reentrant = False


class CheckpointedReentrant(Checkpointed):
    reentrant = True


class Ensemble(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer1, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, helpers.CLASSES)
        self.members = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        parameters, buffers = torch.func.stack_module_state(list(self.members))

        def member(parameters, buffers, h):
            return torch.func.functional_call(self.members[0], (parameters, buffers), (h,))

        h = self.layer1(x).mean((2, 3))
        return self.fc(torch.vmap(member, (0, 0, None))(parameters, buffers, h).mean(0))


@pytest.mark.parametrize(
    ("network", "precision"),
    [
        (helpers.ConvNet, "32-true"),
        (helpers.ConvNet, "64-true"),
        (helpers.ConvNet, "bf16-mixed"),
        (Checkpointed, "bf16-mixed"),
        (CheckpointedReentrant, "bf16-mixed"),
        (Ensemble, "32-true"),
    ],
)
def test_a_fit_of_the_first_batch_is_bitwise_that_without_the_callback(network, precision):
    """It is observed, and not mixed: weights, statistics, metrics, logs and generators."""
    torch.manual_seed(0)
    module = helpers.Classifier(network())
    traces = []
    for callbacks in ([], [ManifoldMixupCallback(seed=0)]):
        own = copy.deepcopy(module)
        seed_everything(1, verbose=False)
        trainer = helpers.trainer(*callbacks, precision=precision, limit_train_batches=1, log_every_n_steps=1)
        trainer.fit(own, helpers.loader())
        traces.append(
            {
                **helpers.weights_of(own),
                **{f"gradient of {name}": parameter.grad for name, parameter in own.named_parameters()},
                **{f"logged {name}": value for name, value in trainer.logged_metrics.items()},
                "torch": torch.get_rng_state(),
                "numpy": torch.from_numpy(np.random.get_state()[1].astype(np.int64)),
                "python": torch.tensor(random.getstate()[1][:-1]),
                "losses": torch.tensor(own.losses),
            }
        )
    without, observed = traces
    assert without.keys() == observed.keys()
    assert {"logged loss", "logged accuracy"} <= without.keys()
    assert [key for key, value in without.items() if not _same(value, observed[key])] == []


def _same(a, b):
    return (a is None and b is None) or torch.equal(a, b)


# ------------------------------------------------------------------------------------- modules of all kinds


class Module(LightningModule):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


def vectors():
    return torch.randn(BATCH, 8), torch.randint(4, (BATCH,))


def mlp(classes=4):
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, classes))


class FrozenInEvalMode(Module):
    def __init__(self, gradients=True):
        super().__init__()
        self.backbone = zoo.ResidualNet(zoo.PreActBlock, "layer", 3, classes=8).requires_grad_(False).eval()
        self.head = mlp()
        self.gradients = gradients

    def training_step(self, batch, batch_idx):
        x, y = batch
        with torch.set_grad_enabled(self.gradients):
            h = self.backbone(x)
        return F.cross_entropy(self.head(h), y)


class FrozenInTrainMode(FrozenInEvalMode):
    def __init__(self):
        super().__init__()
        self.backbone.train()


class TwoHeads(Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.second = mlp()[:4], nn.Linear(16, 2)
        self.first = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))

    def training_step(self, batch, batch_idx):
        x, (first, second) = batch
        h = self.trunk(x)
        return F.cross_entropy(self.first(h), first) + F.cross_entropy(self.second(h), second)


class Autoencoder(Module):
    """With a sampled code, and a penalty on it."""

    def __init__(self):
        super().__init__()
        self.enc, self.mean, self.scale = nn.Sequential(nn.Linear(8, 16), nn.ReLU()), nn.Linear(16, 4), nn.Linear(16, 4)
        self.dec = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8))

    def training_step(self, batch, batch_idx):
        x, y = batch
        h = self.enc(x)
        mean, scale = self.mean(h), self.scale(h)
        code = mean + torch.randn_like(mean) * scale.exp()
        return F.mse_loss(self.dec(code), y) + (mean.square() + scale.exp() - scale).mean()


class TwoPasses(Module):
    """R-Drop: two passes, two losses of the labels, and one between them."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def training_step(self, batch, batch_idx):
        x, y = batch
        a, b = self.net(x), self.net(-x)
        between = F.kl_div(a.log_softmax(1), b.softmax(1), reduction="batchmean")
        return F.cross_entropy(a, y) + F.cross_entropy(b, y) + between


class StackedViews(TwoPasses):
    """Two views of each sample as one batch of twice the size: nobody can tell which rows belong together."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self.net(torch.cat([x, -x]))
        return F.cross_entropy(logits, torch.cat([y, y]))


class Triplets(TwoPasses):
    """Metric learning, with the hardest pairs found by the labels."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        z = F.normalize(self.net(x))
        distance, same = torch.cdist(z, z), (y[:, None] == y[None]).float()
        return F.relu((distance * same).amax(1) - (distance + 1e3 * same).amin(1) + 0.2).mean()


class Prototypes(TwoPasses):
    """Logits are similarities with class vectors, which are weights: the embedding can be mixed."""

    def __init__(self):
        super().__init__()
        self.prototypes = nn.Parameter(torch.randn(4, 4))

    def training_step(self, batch, batch_idx):
        x, y = batch
        cosine = F.linear(F.normalize(self.net(x)), F.normalize(self.prototypes))
        return F.cross_entropy(8 * (cosine - 0.2 * F.one_hot(y, 4)), y)


class SkipsFirst(TwoPasses):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx == 0 else loss


class LateNetwork(TwoPasses):
    def __init__(self):
        super(TwoPasses, self).__init__()

    def configure_model(self):
        self.net = mlp()


class LanguageModel(Module):
    """The labels are the ids, shifted inside."""

    def __init__(self):
        super().__init__()
        self.model = zoo.Gpt()

    def training_step(self, batch, batch_idx):
        logits = self.model(batch["input_ids"])
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


class Output(dict):
    """Neither a dict to PyTorch's trees nor a tensor."""

    def __init__(self, *, loss, logits):
        super().__init__(loss=loss, logits=logits)


class LossInside(Module):
    """The network takes the labels, and returns its loss in an object of its own."""

    class Network(zoo.TransformerClassifier):
        def forward(self, input_ids, attention_mask, labels):
            length = input_ids.shape[1]
            h = self.emb(input_ids) + self.position[:length]
            logits = self.fc(self.encoder(h, src_key_padding_mask=attention_mask == 0).mean(1))
            return Output(loss=F.cross_entropy(logits, labels), logits=logits)

    def __init__(self):
        super().__init__()
        self.model = self.Network()

    def training_step(self, batch, batch_idx):
        return self.model(**batch)["loss"]


def frozen():
    return torch.randn(BATCH, 3, 8, 8), torch.randint(4, (BATCH,))


def text():
    ids = torch.randint(1, 50, (BATCH, 7))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.randint(4, (BATCH,))}


def shifted():
    ids = torch.randint(1, 50, (BATCH, 8))
    return {"input_ids": ids, "labels": ids}


def itself():
    x = torch.randn(BATCH, 8)
    return x, x


MODULES = [
    (FrozenInEvalMode, frozen, ["input", "head.1"]),
    (lambda: FrozenInEvalMode(gradients=False), frozen, ["input", "head.1"]),
    (FrozenInTrainMode, frozen, ["input", "backbone.layer1", "backbone.layer2"]),
    (
        TwoHeads,
        lambda: (torch.randn(BATCH, 8), (torch.arange(BATCH) % 4, torch.arange(BATCH) % 2)),
        ["input", "trunk.1"],
    ),
    (Autoencoder, itself, ["input", "enc"]),
    (TwoPasses, vectors, ["input", "net.1"]),
    (Triplets, vectors, ["input", "net.1"]),
    (Prototypes, vectors, ["input", "net.1", "net.3"]),
    (LateNetwork, vectors, ["input", "net.1"]),
    (LanguageModel, shifted, ["model.wte", "model.h.0", "model.h.1"]),
    (LossInside, text, ["model.emb", "model.encoder.layers.0", "model.encoder.layers.1"]),
]


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
@pytest.mark.parametrize(("build", "make", "chosen"), MODULES)
def test_default_in_a_fit(build, make, chosen):
    """Of the batches after the first each is mixed, or the fit would end with an error."""
    torch.manual_seed(0)
    assert list(fit(build(), make)["layers"]) == chosen
    for name in chosen[1:]:
        assert list(fit(build(), make, layers=[name])["layers"]) == [name]


def test_a_skipped_first_batch_is_not_the_one_to_go_by(monkeypatch):
    monkeypatch.setattr(Closure, "warning_cache", WarningCache())  # it warns once in a process: leave that to others
    with pytest.warns(UserWarning, match="returned `None`"):
        assert list(fit(SkipsFirst(), vectors)["layers"]) == ["input", "net.1"]


def test_only_the_input_is_said():
    with pytest.warns(UserWarning, match="no eligible layer but the input"):
        assert list(fit(StackedViews(), vectors)["layers"]) == ["input"]


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
@pytest.mark.parametrize(
    ("build", "make", "layer", "refusal"),
    [
        (
            FrozenInEvalMode,
            frozen,
            "backbone.layer1",
            "'backbone.layer1' runs in eval mode, in which nothing is mixed.",
        ),
        (TwoHeads, lambda: MODULES[3][1](), "first", "'first' is bypassed: .* Valid before it: 'trunk'."),
        (TwoPasses, vectors, "net.4", "'net.4' gives the final output: .* Valid before it: 'net.3'."),
        (Autoencoder, itself, "mean", "'mean' is bypassed: .* Valid before it: 'enc'."),
        (LateNetwork, vectors, "nets", "Did you mean 'net'?"),
    ],
)
def test_refusals_in_a_fit(build, make, layer, refusal):
    with pytest.raises((MisconfigurationException, ValueError), match=refusal):
        fit(build(), make, layers=[layer])


class Manual(TwoPasses):
    """Returns nothing, as manual optimization may."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        x, y = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self.net(x), y))
        optimizer.step()


class Scripted(Module):
    """TorchScript takes no hooks, not even to find out whether a part is a criterion."""

    def __init__(self):
        super().__init__()
        self.first, self.act, self.rest = nn.Linear(8, 8), torch.jit.script(nn.ReLU()), mlp()

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.rest(self.act(self.first(x))), y)


class SequenceFirst(Module):
    """Its states come with the sequence first, which one sample alone does not tell."""

    def __init__(self):
        super().__init__()
        self.inp, self.rest = nn.Linear(8, 8), mlp()
        self.turned = zoo.Returning(lambda h: (h.transpose(0, 1), h.mean(1)[None]))

    def training_step(self, batch, batch_idx):
        x, y = batch
        h, last = self.turned(self.inp(x))
        return F.cross_entropy(self.rest(h.mean(0) + last[0]), y)


def one_then_more():
    sizes = iter([1, 5, 5, 5])
    return lambda: (torch.randn(n := next(sizes), 3, 8), torch.randint(4, (n,)))


def test_manual_optimization_that_returns_nothing():
    assert list(fit(Manual(), vectors)["layers"]) == ["input", "net.1"]


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_scripted_part():
    assert list(fit(Scripted(), vectors)["layers"]) == ["input", "first", "rest.1"]


def test_first_batch_of_one_sample():
    with pytest.warns(UserWarning, match="the batch has one sample, so there is no partner"):
        assert list(fit(SequenceFirst(), one_then_more(), layers=["turned"])["layers"]) == ["turned"]


def test_layer_without_batch_dimension_is_refused_with_its_neighbours():
    with pytest.raises(
        MisconfigurationException, match=r"'net.1' has rows that are not samples: .* 5 rows.* Valid before it: 'input'."
    ):
        fit(StackedViews(), vectors, layers=["net.1"])
