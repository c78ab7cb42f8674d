"""On a GPU: the callback against the same steps by hand, in each precision, and what only a GPU has."""

import copy
import warnings

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from lightning_manifold_mixup import ManifoldMixupCallback, ManifoldMixupModule
from lightning_manifold_mixup.paper.data import DigitsDataModule
from lightning_manifold_mixup.paper.models import PreActResNet
from tests.helpers import LAYERS, Classifier, ConvNet, Draws, Step, images, loader, trainer
from tests.processes import free_port

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*lr_scheduler.*")]

HALF = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
BATCHES = 6


@pytest.fixture(autouse=True)
def _float32():
    """Convolutions in float32 as the CPU has them, not in TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


class Dropping(ConvNet):
    """With dropout, whose masks come from the generator of the device."""

    def __init__(self):
        super().__init__()
        self.layer2.append(nn.Dropout(0.5))


class Recomputed(ConvNet):
    """With a stage that is computed again in backward."""

    reentrant = False

    def forward(self, x):
        h = checkpoint(self.layer1, self.conv1(x), use_reentrant=self.reentrant)
        return self.fc(self.layer2(h).mean((2, 3)))


class RecomputedReentrant(Recomputed):
    reentrant = True


class Host(Classifier):
    """Reads its labels on the host, where nothing follows them: the step runs twice."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        weights = torch.as_tensor(1.0 + y.cpu().numpy(), dtype=torch.float32, device=x.device)
        loss = (F.cross_entropy(self(x), y, reduction="none") * weights).mean()
        self.losses.append(loss.item())
        return loss

    @staticmethod
    def loss(logits, y):
        return (F.cross_entropy(logits, y, reduction="none") * (1.0 + y)).mean()


class Channels(Classifier):
    def on_fit_start(self):
        self.to(memory_format=torch.channels_last)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return super().training_step((x.to(memory_format=torch.channels_last), y), batch_idx)


def fit(module, **options):
    """Losses, weights and draws of a fit; the generators of host and device begin alike."""
    callback = ManifoldMixupCallback(layers=LAYERS, seed=3)
    draws = Draws(callback)
    torch.manual_seed(11)
    trainer(callback, draws, **({"accelerator": "gpu"} | options)).fit(module, loader(8 * BATCHES))
    return module.losses, module.model.state_dict(), draws.drawn


def by_hand(net, drawn, precision="32-true", loss=F.cross_entropy):
    """The loop as one writes it, with the same draws, on the same device."""
    net, losses = net.cuda().train(), []
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cuda", enabled=precision == "16-mixed")
    torch.manual_seed(11)
    for index, (layer, lam, partners) in enumerate(drawn):
        x, y = (part[8 * index : 8 * index + 8].cuda() for part in images(8 * BATCHES))
        partners, lam = partners.cuda(), lam.cuda()
        with torch.autocast("cuda", HALF.get(precision), enabled=precision in HALF):
            before, after = net.states(x)[layer]
            h = before(x)
            logits = after((lam * h.float() + (1 - lam) * h[partners].float()).to(h.dtype))
            value = lam * loss(logits, y) + (1 - lam) * loss(logits, y[partners])
        optimizer.zero_grad()
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(value.item())
    return losses, net.state_dict()


def assert_same(first, second, rel):
    assert first[0] == pytest.approx(second[0], rel=rel)
    for name, value in second[1].items():
        torch.testing.assert_close(first[1][name].cpu(), value.cpu(), rtol=rel, atol=rel, msg=name)


@pytest.mark.parametrize("kind", [Classifier, Channels])
@pytest.mark.parametrize(("precision", "rel"), [("32-true", 1e-5), ("bf16-mixed", 2e-2), ("16-mixed", 5e-3)])
def test_losses_and_weights_are_those_of_a_loop_by_hand(precision, rel, kind):
    module = kind()
    net = copy.deepcopy(module.model)
    *result, drawn = fit(module, precision=precision)
    assert len({layer for layer, *_ in drawn}) > 1
    assert_same(result, by_hand(net, drawn, precision), rel)


def test_draws_are_those_on_the_cpu():
    (*_, here), (*_, there) = fit(Classifier(), accelerator="cpu"), fit(Classifier())
    for (layer, lam, partners), (other_layer, other_lam, other_partners) in zip(here, there, strict=True):
        assert (layer, lam) == (other_layer, other_lam)
        assert torch.equal(partners, other_partners)


def test_the_check_takes_nothing_from_the_generator_of_the_device():
    """The masks of dropout are those of the loop by hand although the step was tried several times before."""
    module = Classifier(Dropping())
    net = copy.deepcopy(module.model)
    *result, drawn = fit(module)
    assert_same(result, by_hand(net, drawn), 1e-5)


@pytest.mark.parametrize("kind", [Recomputed, RecomputedReentrant])
def test_activation_checkpoints(kind):
    module = Classifier(kind())
    net = copy.deepcopy(module.model)
    *result, drawn = fit(module)
    assert_same(result, by_hand(net, drawn), 1e-5)


def test_a_step_that_reads_labels_on_the_host():
    module = Host()
    net = copy.deepcopy(module.model)
    with pytest.warns(UserWarning, match="twice"):
        _, weights, drawn = fit(module)
    assert_same(([], weights), ([], by_hand(net, drawn, loss=Host.loss)[1]), 1e-5)


def test_compiled_by_inductor():
    torch._dynamo.reset()
    module = Step()
    net = copy.deepcopy(module.model)
    module.model.compile()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Inductor's own, about the card
        *result, drawn = fit(module)
    assert_same(result, by_hand(net, drawn), 1e-4)


class Sharded(Classifier):
    def configure_model(self):
        if self.device_mesh is not None:
            for part in (self.model.layer1, self.model.layer2, self.model):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_nccl_with_one_process(kind, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    module = Sharded() if kind == "fsdp2" else Classifier()
    net = copy.deepcopy(module.model)
    strategy = DDPStrategy() if kind == "ddp" else ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a step that was not checked, a mesh of one
            losses, _, drawn = fit(module, strategy=strategy, use_distributed_sampler=False)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if kind == "fsdp2":  # it has no copies to try the first batch on, which is not mixed
        drawn[0] = ("input", torch.tensor(1.0), torch.arange(8))
    assert losses == pytest.approx(by_hand(net, drawn)[0], rel=1e-4)


class Strict(L.Callback):
    """Any wait of the host for the device is an error, from before a batch until after the optimizer step."""

    def __init__(self):
        self.batches = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step > 1 and trainer.global_step not in (10, 11):  # batch 10 is checked
            torch.cuda.set_sync_debug_mode("error")
            self.batches += 1


class Lenient(L.Callback):
    def on_train_batch_end(self, *args):
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("on_device", [False, True])
def test_nothing_waits_from_the_images_to_the_optimizer(on_device, precision):
    """The whole of ``ManifoldMixupModule``, with accuracy and logging, on images augmented on the host or device."""
    module = ManifoldMixupModule(
        PreActResNet(18, 10, in_channels=1, initial_channels=4), 10, layers=["input", "model.layer1"]
    )
    data, strict = DigitsDataModule(test_size=1000, padding=1, on_device=on_device), Strict()
    t = trainer(strict, accelerator="gpu", precision=precision, max_epochs=2)
    t.callbacks.append(Lenient())
    try:
        t.fit(module, data)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert strict.batches > 8
    assert torch.stack([p.isfinite().all() for p in module.parameters()]).all()
