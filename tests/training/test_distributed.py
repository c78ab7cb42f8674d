"""Two processes with gloo, against one process that computes both shards by hand."""

import copy
import os
import signal

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lightning_manifold_mixup import ManifoldMixupCallback
from tests.helpers import LAYERS, Classifier, ConvNet, Draws, assert_untouched, images, trainer
from tests.processes import CONTEXT, free_port, tell, together

STEPS, BATCH = 20, 4
MODES = ["ddp", "static_graph", "find_unused_parameters", "auto", "fsdp2"]


class Net(ConvNet):
    """Without batch norm, whose running statistics are each process's own."""

    def __init__(self):
        super().__init__()
        self.layer2[1] = nn.Identity()


class Sharded(Classifier):
    def configure_model(self):
        if self.strategy == "fsdp2":
            for part in (self.model.layer1, self.model.layer2, self.model):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])


def strategy_of(mode):
    if mode == "fsdp2":
        return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    options = {mode: True} if mode in ("static_graph", "find_unused_parameters") else {}
    return DDPStrategy(process_group_backend="gloo", **options)


def data():
    return TensorDataset(*images(2 * STEPS * BATCH))


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gradient_of_ones():
    """What FSDP2 makes of a gradient of one in each of two processes: one, or two where gloo takes sums for means.

    It does so in some releases of torch (pytorch/pytorch#162338), with Manifold Mixup and without.
    """
    net = fully_shard(nn.Linear(1, 1, bias=False), mesh=init_device_mesh("cpu", (2,)))
    net(torch.ones(1, 1)).sum().backward()
    return full(net.weight.grad).item()


def worker(rank, net, folder):
    results = {}
    for mode in MODES:
        module = Sharded(copy.deepcopy(net))
        module.strategy = mode
        callback = ManifoldMixupCallback(layers="auto" if mode == "auto" else LAYERS)
        draws = Draws(callback)
        t = trainer(
            callback, draws, strategy=strategy_of(mode), devices=2, max_steps=STEPS, use_distributed_sampler=False
        )
        t.fit(module, DataLoader(data(), BATCH, sampler=range(rank, 2 * STEPS * BATCH, 2)))
        results[mode] = {
            "drawn": draws.drawn,
            "losses": module.losses,
            "weights": {name: full(p.detach()).clone() for name, p in module.model.named_parameters()},
            "layers": callback.state_dict()["layers"],
        }
        assert_untouched(module)
    results["fsdp2"]["gradient"] = gradient_of_ones()
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    torch.manual_seed(0)
    net, folder = Net(), tmp_path_factory.mktemp("ranks")
    together(worker, net, str(folder))
    return net, [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("mode", MODES)
def test_layer_is_shared_lam_and_permutation_are_each_ranks_own(runs, mode):
    first, second = (run[mode]["drawn"] for run in runs[1])
    assert len(first) == STEPS
    drawn = [(a, b) for a, b in zip(first, second, strict=True) if a is not None]
    assert len(drawn) >= STEPS - 1  # "auto" observes one batch
    assert all(a[0] == b[0] for a, b in drawn)
    assert len({layer for (layer, _, _), _ in drawn}) > 1
    assert all(a[1] != b[1] for a, b in drawn)
    assert any(not torch.equal(a[2], b[2]) for a, b in drawn)


@pytest.mark.parametrize("mode", MODES)
def test_weights_are_those_of_both_shards_by_hand(runs, mode):
    net, results = runs
    net = copy.deepcopy(net)
    x, y = data().tensors
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    losses = ([], [])
    for step in range(STEPS):
        for rank in range(2):
            index = torch.arange(rank, len(x), 2)[step * BATCH : (step + 1) * BATCH]
            draw = results[rank][mode]["drawn"][step]
            if draw is None or (mode == "fsdp2" and step == 0):  # observed; FSDP2 has no copies to do it on
                draw = ("input", torch.tensor(1.0), torch.arange(BATCH))
            layer, lam, partners = draw
            before, after = net.states(x)[layer]
            h = before(x[index])
            logits = after(lam * h + (1 - lam) * h[partners])
            labels = y[index]
            loss = lam * F.cross_entropy(logits, labels) + (1 - lam) * F.cross_entropy(logits, labels[partners])
            (loss / 2 * results[rank][mode].get("gradient", 1)).backward()
            losses[rank].append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    for rank in range(2):
        assert results[rank][mode]["losses"] == pytest.approx(losses[rank], rel=1e-4)
        torch.testing.assert_close(results[rank][mode]["weights"], dict(net.named_parameters()), rtol=1e-4, atol=1e-6)


def test_every_rank_has_the_layers_of_rank_zero(runs):
    first, second = (run["auto"]["layers"] for run in runs[1])
    assert list(first) == list(second) == ["input", "model.conv1", "model.layer1"]


class Gathers(Classifier):
    """Compares its samples with those of all processes, as contrastive losses do."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        z = self(x)
        everywhere = self.all_gather(z, sync_grads=True).flatten(0, 1), self.all_gather(y).flatten(0, 1)
        return contrast(z, y, *everywhere)


def contrast(z, y, all_z, all_y):
    same = (y[:, None] == all_y).to(z.dtype)
    return F.cross_entropy(z, y) - (same * (z @ all_z.T).log_softmax(1)).mean()


def gathering_worker(rank, net, folder):
    module, callback = Gathers(copy.deepcopy(net)), ManifoldMixupCallback(layers=LAYERS)
    draws = Draws(callback)
    t = trainer(callback, draws, strategy=strategy_of("ddp"), devices=2, max_steps=3, use_distributed_sampler=False)
    t.fit(module, DataLoader(data(), BATCH, sampler=range(rank, 2 * STEPS * BATCH, 2)))
    torch.save((draws.drawn, module.model.state_dict()), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_labels_that_are_gathered_from_all_processes(tmp_path):
    """The labels of the others are those of the same kind: the dominant ones, or the others of each process."""
    torch.manual_seed(0)
    net = Net()
    together(gathering_worker, net, str(tmp_path))
    runs = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    x, y = data().tensors
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for step in range(3):
        logits, pairs, weights = [], [], []
        for rank in range(2):
            index = torch.arange(rank, len(x), 2)[step * BATCH : (step + 1) * BATCH]
            layer, lam, partners = runs[rank][0][step]
            before, after = net.states(x)[layer]
            h, labels = before(x[index]), y[index]
            logits.append(after(lam * h + (1 - lam) * h[partners]))
            dominant = [(lam, labels), (1 - lam, labels[partners])]
            (first, second) = dominant if lam >= 0.5 else dominant[::-1]
            pairs.append((first[1], second[1]))
            weights.append((first[0], second[0]))
        for rank in range(2):
            for kind in range(2):
                gathered = torch.cat([pair[kind] for pair in pairs])
                loss = contrast(logits[rank], pairs[rank][kind], torch.cat(logits), gathered)
                (weights[rank][kind] * loss / 2).backward(retain_graph=True)
        optimizer.step()
        optimizer.zero_grad()
    for _, weights in runs:
        torch.testing.assert_close(weights, net.state_dict(), rtol=1e-4, atol=1e-6)


class Exchanges(Classifier):
    runs = 0

    def training_step(self, batch, batch_idx):
        type(self).runs += 1  # on ghosts, too
        x, y = batch
        z = self(x)
        everywhere = self.all_gather(z, sync_grads=True).flatten(0, 1)
        return F.cross_entropy(20 * z.float(), y) + 0.1 * everywhere.float().square().mean()


def one_class_worker(rank, folder):
    x, y = data().tensors
    y = torch.zeros_like(y) if rank == 0 else y
    torch.manual_seed(0)
    module, callback = Exchanges(Net()), ManifoldMixupCallback(layers=LAYERS)
    t = trainer(callback, strategy=strategy_of("ddp"), devices=2, max_steps=3, precision="bf16-mixed")
    t.fit(module, DataLoader(TensorDataset(x, y), BATCH))
    torch.save(Exchanges.runs, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_a_rank_where_no_mistake_would_show_runs_the_step_as_often_as_the_others(tmp_path):
    """It has one class only. A step that exchanges something would wait for ever if one rank alone tried again."""
    together(one_class_worker, str(tmp_path))
    runs = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert runs[0] == runs[1] > 3 * len(LAYERS)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`", "ignore::FutureWarning")
def test_fsdp1():
    module = Classifier(Net())
    callback = ManifoldMixupCallback(layers=LAYERS)
    t = trainer(callback, strategy=FSDPStrategy(), accelerator="gpu", max_steps=4)
    t.fit(module, DataLoader(data(), BATCH))
    assert len(module.losses) == 4


class Dies(Classifier):
    def training_step(self, batch, batch_idx):
        if self.dies and batch_idx == 2 and self.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, batch_idx)


def survivor(rank, port, net, folder):
    tell(rank, 2, port)
    module = Dies(copy.deepcopy(net))
    module.dies = True
    t = trainer(ManifoldMixupCallback(layers=LAYERS), strategy=strategy_of("ddp"), devices=2)
    try:
        t.fit(module, DataLoader(data(), BATCH))
    except (RuntimeError, SystemExit) as error:
        assert_untouched(module)
        torch.distributed.destroy_process_group()
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "GROUP_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
            del os.environ[name]
        module.dies = False
        trainer(ManifoldMixupCallback(layers=LAYERS)).fit(module, DataLoader(data(), BATCH))  # fit can be called again
        assert_untouched(module)
        (folder / "survived").write_text(type(error).__name__)


def test_kill_of_one_rank(tmp_path):
    torch.manual_seed(0)
    port = free_port()
    processes = [CONTEXT.Process(target=survivor, args=(rank, port, Net(), tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    assert processes[1].exitcode == -signal.SIGKILL
    assert processes[0].exitcode == 0
    assert (tmp_path / "survived").exists()
