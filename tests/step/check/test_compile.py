"""torch.compile: the losses of the uncompiled run, and no more graphs than there are layers to mix at."""

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.testing import CompileCounter

from lightning_manifold_mixup import ManifoldMixupCallback, Mix, MixingError, mixing
from lightning_manifold_mixup._step.check.compiled import WHOLE_MODULE, limit_of_graphs, torch_version
from lightning_manifold_mixup._step.labels.targets import plain
from tests.helpers import CLASSES, LAYERS, Classifier, Step, Validated, assert_untouched, loader, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.*"),
]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def fit(module, compiled=None, layers=LAYERS, n=24, epochs=3, validate=False):
    callback = ManifoldMixupCallback(layers=layers, seed=3)
    t = trainer(callback, max_epochs=epochs, num_sanity_val_steps=1)
    t.fit(module if compiled is None else compiled, loader(n), *([loader(n)] if validate else []))
    assert_untouched(module)
    return module.losses


def pair(cls=Classifier):
    module, reference = cls(), cls()
    reference.load_state_dict(module.state_dict())
    return module, reference


def rounded_otherwise(losses):
    """A compiled graph has its gradient from plain operations, whose last bit may differ from that of `torch.lerp`."""
    return pytest.approx(losses, rel=1e-6)


@pytest.mark.parametrize(("how", "validate"), [("wrapped", True), ("in place", False)])
def test_inner_network(how, validate):
    module, reference = pair(Validated if validate else Classifier)
    graphs = CompileCounter()
    if how == "wrapped":
        module.model = torch.compile(module.model, backend=graphs, fullgraph=True)
    else:
        module.model.compile(backend=graphs, fullgraph=True)
    n = 21 if validate else 24  # with an odd last batch
    losses = fit(module, n=n, validate=validate)
    assert losses == rounded_otherwise(fit(reference, n=n, validate=validate))
    assert graphs.frame_count <= (2 * len(LAYERS) + 2 if validate else len(LAYERS))


def test_nothing_is_compiled_once_each_layer_was_seen():
    module = Classifier()
    graphs, counts = CompileCounter(), []
    module.model = torch.compile(module.model, backend=graphs)
    module.on_train_epoch_end = lambda: counts.append(graphs.frame_count)
    fit(module, epochs=6)
    assert counts[-1] <= counts[2]


class Three(nn.Module):
    """Where the gradient of a compiled network is looked at: below the layer that is mixed."""

    def __init__(self):
        super().__init__()
        self.below, self.mixed, self.above = nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)

    def forward(self, x):
        return self.above(self.mixed(self.below(x)))


PARTNERS = {"permutation": [2, 0, 1, 3], "repeated": [1, 1, 0, 1]}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("partners", PARTNERS.values(), ids=PARTNERS.keys())
@pytest.mark.parametrize("lam", [0.3, [0.9, 0.2, 0.5, 0.6]], ids=["one lam", "a lam for each"])
def test_gradient(backend, partners, lam):
    """Of torch 2.11 it was zero below the mixed layer, in a compiled network alone."""
    net, mix = Three(), Mix(torch.tensor(lam), torch.tensor(partners))
    x = torch.randn(4, 5, requires_grad=True)
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    with mixing(net.mixed, mix):
        compiled(x).square().sum().backward()
    found = [x.grad, *(p.grad for p in net.parameters())]
    weight = mix.lam.reshape(-1, 1)
    h = torch.tanh(F.linear(x, net.below.weight, net.below.bias))
    logits = F.linear(weight * h + (1 - weight) * h[partners], net.above.weight, net.above.bias)
    expected = torch.autograd.grad(logits.square().sum(), [x, *net.parameters()])
    torch.testing.assert_close(found, list(expected))


@pytest.mark.parametrize("layers", [LAYERS, "auto"])
def test_whole_module(layers):
    module, reference = pair(Step)
    graphs = CompileCounter()
    compiled = torch.compile(module, backend=graphs, fullgraph=True)
    if torch_version() < WHOLE_MODULE:
        with pytest.raises(MisconfigurationException, match="or later for a LightningModule that is compiled"):
            fit(module, compiled, layers=layers)
        return
    assert fit(module, compiled, layers=layers) == rounded_otherwise(fit(reference, layers=layers))
    assert 0 < graphs.frame_count <= 2 * len(LAYERS) + 2


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True])
def test_inductor(whole):
    module, reference = pair(Step)
    if whole:
        losses = fit(module, torch.compile(module), epochs=4)
    else:
        module.model = torch.compile(module.model)
        losses = fit(module, epochs=4)
    assert losses == pytest.approx(fit(reference, epochs=4), rel=1e-4)


def test_more_layers_than_the_limit_of_recompilation():
    class Deep(nn.Sequential):
        def __init__(self):
            super().__init__(
                nn.Flatten(), nn.Linear(108, 6), *(nn.Linear(6, 6) for _ in range(10)), nn.Linear(6, CLASSES)
            )

    module, reference = Classifier(Deep()), Classifier(Deep())
    reference.load_state_dict(module.state_dict())
    layers = [f"model.{i}" for i in range(1, 12)]
    limit = getattr(torch._dynamo.config, limit_of_graphs())
    assert len(layers) > limit
    module.model = torch.compile(module.model, backend="eager", fullgraph=True)
    assert fit(module, layers=layers, epochs=8) == rounded_otherwise(fit(reference, layers=layers, epochs=8))
    assert getattr(torch._dynamo.config, limit_of_graphs()) == limit


def test_network_that_was_compiled_and_run_before_the_fit():
    module, reference = pair()
    module.model = torch.compile(module.model, backend="eager")
    for _ in range(2):
        module.model(next(iter(loader()))[0])  # cached without hooks
    reference.model(next(iter(loader()))[0])
    reference.model(next(iter(loader()))[0])
    assert fit(module) == rounded_otherwise(fit(reference))


LOSSES = {
    "cross_entropy": lambda z, y: F.cross_entropy(z, y),
    "one_hot": lambda z, y: -(F.one_hot(y, 4) * z.log_softmax(1)).sum(),
    "gather": lambda z, y: -z.log_softmax(1).gather(1, y[:, None]).mean(),
    "focal": lambda z, y: (1 - torch.exp(-F.cross_entropy(z, y, reduction="none"))).mul(F.cross_entropy(z, y)).mean(),
    "masked": lambda z, y: (F.cross_entropy(z, y, reduction="none") * (y != 2)).sum() / (y != 2).sum(),
    "criterion": nn.CrossEntropyLoss(label_smoothing=0.1),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_compiled_losses(loss):
    """One graph for all draws, whichever labelling dominates."""
    graphs = CompileCounter()
    compiled = torch.compile(loss, backend=graphs, fullgraph=True)
    y, partners = torch.tensor([0, 1, 2, 3]), torch.tensor([1, 0, 3, 2])
    if torch_version() < WHOLE_MODULE:  # the compiler says so itself
        with pytest.raises(TorchDynamoException):
            compiled(torch.randn(4, 4), Mix(torch.tensor(0.3), partners).target(y))
        return
    for lam in (0.3, 0.6, 0.7):
        z = torch.randn(4, 4, requires_grad=True)
        target = Mix(torch.tensor(lam), partners).target(y)
        ours, expected = compiled(z, target), lam * loss(z, y) + (1 - lam) * loss(z, y[partners])
        torch.testing.assert_close(plain(ours), expected)
        torch.testing.assert_close(plain(torch.autograd.grad(ours, z)), torch.autograd.grad(expected, z))
    assert graphs.frame_count == 1


def test_a_hook_that_a_stale_graph_dropped_is_an_error():
    module = Classifier()
    module.model = torch.compile(module.model, backend="eager")

    class Stale(ManifoldMixupCallback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            if batch_idx == 1:
                for part in pl_module.model.modules():
                    part._forward_hooks.clear()

    with pytest.raises(MixingError, match="was not called"):
        trainer(Stale(layers=["model.layer1"])).fit(module, loader())
