"""A ghost shares the parameters of a module and nothing else, and what runs on it leaves no trace."""

import builtins
import copy
import logging
import random
import threading
import types

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_manifold_mixup import ManifoldMixupCallback, MixingError
from lightning_manifold_mixup._step.check.ghost import NoGhostError, ghost_of, isolated
from lightning_manifold_mixup._step.check.random_states import random_states, same_random_states
from tests.exactness import CLASSES, Manual, data, network
from tests.helpers import trainer


class Full(L.LightningModule):
    """Keeps whatever a user might keep on a module, and changes all of it in each step."""

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(*network()[:2], nn.BatchNorm1d(10).double(), nn.Linear(10, CLASSES).double())
        self.register_buffer("counts", torch.zeros(CLASSES))
        self.register_buffer("bank", torch.zeros(8, CLASSES, dtype=torch.float64), persistent=False)
        self.steps, self.seen, self.by_name = 0, [], {"losses": [], "nested": {"last": None}}
        self.accuracy = MulticlassAccuracy(CLASSES)
        self.metrics = MetricCollection({"top2": MulticlassAccuracy(CLASSES, top_k=2)})
        self.listed = [MeanMetric()]
        self.center = torch.zeros(CLASSES, dtype=torch.float64)
        self.generator = torch.Generator().manual_seed(3)
        self.numpy_generator = np.random.default_rng(3)
        self.queue = None

    def training_step(self, batch, batch_idx):
        x, y = batch
        z = self.model(x + torch.randn_like(x) * 0.01 * random.random() * np.random.rand())
        loss = F.cross_entropy(z, y)
        self.steps += 1
        self.seen.append(batch_idx)
        self.by_name["losses"].append(loss.detach())
        self.by_name["nested"]["last"] = z.detach().sum().item()
        self.counts += torch.bincount(y, minlength=CLASSES)
        self.bank.copy_(z.detach())
        self.queue = z * 2  # no leaf: with its graph
        self.center = 0.9 * self.center + 0.1 * z.detach().mean(0)
        self.accuracy(z, y)
        self.metrics(z, y)
        self.listed[0].update(loss.detach())
        torch.rand(1, generator=self.generator)
        self.numpy_generator.random()
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"steps": float(self.steps)})
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def contents(module):
    """All that a module holds, in comparable form."""
    own = {
        "state": {name: value.clone() for name, value in module.state_dict().items()},
        "bank": module.bank.clone(),
        "steps": module.steps,
        "seen": list(module.seen),
        "by_name": copy.deepcopy(module.by_name),
        "center": module.center.clone(),
        "generator": module.generator.get_state(),
        "numpy": module.numpy_generator.bit_generator.state["state"]["state"] % 2**62,
        "queue": None if module.queue is None else module.queue.detach().clone(),
        "accuracy": {name: value.clone() for name, value in module.accuracy.metric_state.items()},
        "top2": {name: value.clone() for name, value in module.metrics["top2"].metric_state.items()},
        "mean": module.listed[0].mean_value.clone(),
        "gradients": [None if p.grad is None else p.grad.clone() for p in module.parameters()],
    }
    return own


def assert_same(first, second):
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_shares_parameters_and_nothing_else():
    module = Full()
    module.queue = module.model(data(8)[0])
    ghost = ghost_of(module)
    for name, parameter in module.named_parameters():
        assert ghost.get_parameter(name) is parameter
    for name, buffer in module.named_buffers():
        assert ghost.get_buffer(name) is not buffer
        assert ghost.get_buffer(name).data_ptr() != buffer.data_ptr()
    for name in ("seen", "by_name", "accuracy", "listed", "center", "generator", "numpy_generator", "queue"):
        assert getattr(ghost, name) is not getattr(module, name), name
    assert ghost.by_name["nested"] is not module.by_name["nested"]
    assert ghost.listed[0] is not module.listed[0]
    assert torch.equal(ghost.queue, module.queue)


@pytest.mark.parametrize("train", [True, False])
def test_a_step_leaves_no_trace(train):
    module = Full()
    module.trainer = trainer()
    module.training_step = module.training_step  # as a wrapper would leave it
    del vars(module)["training_step"]
    before, states = contents(module), random_states(module.parameters())
    for _ in range(2):
        ghost = ghost_of(module)
        ghost.train(train)
        with isolated(module):
            ghost.training_step(data(8), 0).backward()
        assert ghost.steps == 1
    assert_same(contents(module), before)
    assert same_random_states(random_states(module.parameters()), states)
    assert module.training
    assert module.model[2].training


class Comparing(L.Callback):
    """Compares the module, the random state and what was logged, before and after the checks of the first batch."""

    def __init__(self):
        self.logged = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        self.contents, self.random = contents(pl_module), random_states([])


def test_checks_leave_no_trace_in_a_fit(tmp_path):
    """With the checks and without them: the same weights, buffers, counters, metrics, logs and random numbers."""
    seen = []
    for check in (True, False):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        module, watch = Full(), Comparing()
        logger = CSVLogger(tmp_path, name=str(check))
        callback = ManifoldMixupCallback(layers=["model.1"], seed=0, self_check=check, passes=2)
        t = trainer(callback, watch, logger=logger, log_every_n_steps=1)
        t.fit(module, DataLoader(TensorDataset(*data()), 8))
        text = (tmp_path / str(check) / "version_0" / "metrics.csv").read_text()
        seen.append((watch, text, t.global_step, t.fit_loop.epoch_loop.batch_progress.total.ready, module.steps))
    (first, *rest), (second, *others) = seen
    assert rest == others
    assert first.logged == second.logged
    assert_same(first.contents, second.contents)
    assert same_random_states(first.random, second.random)


class Data(L.LightningDataModule):
    def __init__(self):
        super().__init__()
        self.lock, self.file = threading.Lock(), open(__file__)  # noqa: SIM115

    def train_dataloader(self):
        return DataLoader(TensorDataset(*data()), 8)


class Keeper(Full):
    """Holds what cannot be copied by itself."""

    def __init__(self, path):
        super().__init__()
        self.lock, self.recursive = threading.Lock(), threading.RLock()
        self.written, self.binary, self.read = open(path, "w"), open(path + "b", "wb"), open(__file__)  # noqa: SIM115
        self.out = logging.getLogger("some")
        self.library = np
        self.function = lambda z: z * 2
        self.local = builtins

    def training_step(self, batch, batch_idx):
        assert self.trainer.datamodule is not None
        assert self.read.readline()
        with self.lock, self.recursive:
            self.written.write("step\n")
            self.binary.write(b"step\n")
            self.out.debug("step")
        self.logger.log_metrics({"hand": 1.0}, step=self.global_step)
        self.logger.experiment.log_metrics({"experiment": 1.0})
        print("step")
        return super().training_step(batch, batch_idx)


def test_things_that_cannot_be_copied(tmp_path, capsys):
    module = Keeper(str(tmp_path / "file"))
    module.queue = module.model(data(8)[0])
    callback = ManifoldMixupCallback(layers=["model.1"], seed=0)
    batches = Data()
    trainer(callback, logger=CSVLogger(tmp_path), log_every_n_steps=1).fit(module, datamodule=batches)
    for file in (module.written, module.binary, module.read, batches.file):
        file.close()
    assert (tmp_path / "file").read_text() == "step\n" * 3
    assert (tmp_path / "fileb").read_bytes() == b"step\n" * 3
    assert capsys.readouterr().out.count("step\n") == 3
    assert callback.last_draw is None


class Uncopyable:
    def __deepcopy__(self, memo):
        raise TypeError("a connection to a database")


def test_a_module_that_cannot_be_copied_trains(caplog):
    """One line says which checks were left out; what is trained on is still the mixed loss."""
    module = Full()
    module.connection = Uncopyable()
    with pytest.raises(NoGhostError, match=r"Full cannot be copied.*a connection to a database"):
        ghost_of(module)
    before = {name: value.clone() for name, value in module.named_parameters()}
    batches = DataLoader(TensorDataset(*data()), 8)
    with caplog.at_level("INFO"):
        trainer(ManifoldMixupCallback(layers=["model.1"], seed=0)).fit(module, batches)
    lines = [record.message for record in caplog.records if "a connection to a database" in record.message]
    assert len(lines) == 1
    assert "the checks on a copy are left out" in lines[0]
    assert module.steps == 3
    assert all(not torch.equal(value, before[name]) for name, value in module.named_parameters())


def test_optimizers_and_schedulers_are_disarmed():
    class Scheduled(Manual):
        def step(self, optimizer):
            self.clip_gradients(optimizer, 0.1, "norm")
            optimizer.step()
            self.lr_schedulers().step()

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

    counts = []

    class Count(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            counts.append((trainer.global_step, trainer.optimizers[0].param_groups[0]["lr"]))

    loader = DataLoader(TensorDataset(*data()), 8)
    trainer(ManifoldMixupCallback(layers=["model.1"], seed=0), Count()).fit(Scheduled(F.cross_entropy), loader)
    assert counts == [(1, 0.05), (2, 0.025), (3, 0.0125)]


class Second(L.LightningModule):
    """Two labels, the second of which is no target."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def two_losses(module, batch):
    return F.cross_entropy(module.net(batch[0]), batch[1]) + F.cross_entropy(module.net(batch[0]), batch[2])


def by_method(module):
    module.training_step = types.MethodType(lambda self, batch, batch_idx: two_losses(self, batch), module)


def by_closure(module):
    module.training_step = lambda batch, batch_idx: two_losses(module, batch)


def by_container(module):
    known = {"modules": [module]}
    module.training_step = lambda batch, batch_idx: two_losses(known["modules"][0], batch)


def by_wrapper(module):
    original = module.training_step

    def training_step(batch, batch_idx):
        return original(batch, batch_idx) + F.cross_entropy(module.net(batch[0]), batch[2])

    module.training_step = training_step


@pytest.mark.parametrize("put", [by_method, by_closure, by_container, by_wrapper])
def test_a_step_set_on_the_module_is_the_one_that_is_checked(put):
    module = Second()
    put(module)
    before = copy.deepcopy(module.state_dict())
    batches = DataLoader(TensorDataset(torch.randn(32, 5), *(torch.randint(3, (32,)) for _ in range(2))), 8)
    with pytest.raises(MixingError, match=r"target_key=\[1, 2\]"):
        trainer(ManifoldMixupCallback(layers=["net.1"], target_key=1)).fit(module, batches)
    assert_same(module.state_dict(), before)


REACHED: list[nn.Module] = []


def test_a_step_that_reaches_the_module_past_its_copy_is_said(caplog):
    module = Second()
    REACHED.append(module)
    module.training_step = lambda batch, batch_idx: F.cross_entropy(REACHED[-1].net(batch[0]), batch[1])
    batches = DataLoader(TensorDataset(torch.randn(32, 5), torch.randint(3, (32,))), 8)
    with caplog.at_level("INFO"):
        trainer(ManifoldMixupCallback(layers=["net.1"])).fit(module, batches)
    assert "calls 'net' by a global name" in caplog.text
