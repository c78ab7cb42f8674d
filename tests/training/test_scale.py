"""Four processes, and two under `torchrun` that go on from their checkpoint, against the same computed by hand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only

from lightning_manifold_mixup.cli.training import Prepared
from tests.processes import together
from tests.scale import ACCUMULATE, SIZES, batches_of, data, main, network

BATCHES = len(SIZES[0])


def torchrun(processes, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    run = subprocess.run(
        [*command, "-m", "tests.scale", *map(str, arguments)],
        cwd=Path(__file__).parents[2], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]


def started(rank, *arguments):
    main(*arguments)


def results_of(processes, folder):
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(processes)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scale")
    for name in ("four", "two"):
        (folder / name).mkdir()
    together(started, folder / "four", 2, processes=4)
    torchrun(2, folder / "two", 2, folder / "four" / "epoch=0.ckpt")
    return results_of(4, folder / "four"), results_of(2, folder / "two")


def train(net, results, epoch, losses):
    """Trains as the processes did: each mixes its own batch, and gradients are means over processes and batches."""
    drawn = [result["drawn"][BATCHES * (epoch - result["first_epoch"]) :] for result in results]
    x, y = data().tensors
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for number in range(BATCHES):
        for rank in range(len(results)):
            index = torch.tensor(batches_of(rank)[number])
            layer, lam, partners = drawn[rank][number]
            before, after = net.states(x)[layer]
            h, labels = before(x[index]), y[index]
            logits = after(lam * h + (1 - lam) * h[partners])
            loss = lam * F.cross_entropy(logits, labels) + (1 - lam) * F.cross_entropy(logits, labels[partners])
            (loss / len(results) / ACCUMULATE).backward()
            losses[rank].append(loss.item())
        if number % ACCUMULATE == ACCUMULATE - 1:
            optimizer.step()
            optimizer.zero_grad()


def test_four_uneven_processes_and_a_resume_with_two(runs):
    four, two = runs
    assert [len(results[0]["drawn"]) for results in runs] == [2 * BATCHES, BATCHES]
    assert {result["world_size"] for result in four} == {4}
    assert {result["world_size"] for result in two} == {2}
    net, losses = network(), [[] for _ in four]
    train(net, four, 0, losses)
    checkpoint = {name: value.clone() for name, value in net.state_dict().items()}
    train(net, four, 1, losses)
    for rank, result in enumerate(four):
        assert result["losses"] == pytest.approx(losses[rank], rel=1e-4)
        torch.testing.assert_close(result["weights"], dict(net.state_dict()), rtol=1e-4, atol=1e-6)
    net.load_state_dict(checkpoint)
    losses = [[] for _ in two]
    train(net, two, 1, losses)
    for rank, result in enumerate(two):
        assert result["losses"] == pytest.approx(losses[rank], rel=1e-4)
        torch.testing.assert_close(result["weights"], dict(net.state_dict()), rtol=1e-4, atol=1e-6)


def test_layer_is_shared_and_lam_is_each_processs_own(runs):
    four, _ = runs
    for number in range(2 * BATCHES):
        drawn = [result["drawn"][number] for result in four]
        assert len({layer for layer, _, _ in drawn}) == 1
        assert len({lam.item() for _, lam, _ in drawn}) == len(drawn)


def test_a_resumed_run_draws_what_the_uninterrupted_one_drew(runs):
    four, two = runs
    for rank, result in enumerate(two):
        for resumed, uninterrupted in zip(result["drawn"], four[rank]["drawn"][BATCHES:], strict=True):
            assert resumed[:2] == uninterrupted[:2]
            assert resumed[2].tolist() == uninterrupted[2].tolist()


CLUSTERS = {
    "slurm": {
        "SLURM_JOB_ID": 7, "SLURM_JOB_NAME": "train", "SLURM_NTASKS": 8, "SLURM_NTASKS_PER_NODE": 4, "SLURM_PROCID": 5,
        "SLURM_NODEID": 1, "SLURM_LOCALID": 1, "SLURM_NODELIST": "first,second",
    },
    "torchrun": {
        "TORCHELASTIC_RUN_ID": "7", "WORLD_SIZE": 8, "LOCAL_WORLD_SIZE": 4, "RANK": 5, "GROUP_RANK": 1, "LOCAL_RANK": 1,
        "MASTER_ADDR": "first", "MASTER_PORT": 29500,
    },
}  # fmt: skip
"""What a process is told: here the second one on the second of two nodes."""


@pytest.mark.parametrize("name", CLUSTERS)
def test_recipe_of_a_cluster(name, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", rank_zero_only.rank)  # a Trainer sets it: later tests would be silent
    for variable, value in CLUSTERS[name].items():
        monkeypatch.setenv(variable, str(value))
    cli = Prepared(["--config", "digits", "--config", name, "--trainer.accelerator=cpu"], run=False)
    cli.make()
    ranks = (cli.trainer.world_size, cli.trainer.global_rank, cli.trainer.node_rank, cli.trainer.local_rank)
    assert ranks == (8, 5, 1, 1)
    assert isinstance(cli.trainer.strategy, DDPStrategy)
