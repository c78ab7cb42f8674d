"""Where labels that have lost their superposition meet what is trained, and nowhere else."""

import pytest
import torch
import torch.nn.functional as F

from lightning_manifold_mixup import MixedTarget, mixed_loss
from lightning_manifold_mixup._step.leaks import Leaks
from tests.test_targets import HAND_WRITTEN, LAM, PERMUTATION, WEIGHTS, C, N


@pytest.fixture
def mixed():
    y = torch.tensor([0, 1, 2, 3, 4, 2, 0, 1])
    return MixedTarget(y, y[PERMUTATION], LAM)


def looked_up(z, y):
    weights = WEIGHTS[torch.tensor(y) + 0]  # a copy of a copy, and no gradient so far
    return (weights * z.sum(1)).mean()


def chosen(z, y):
    return -z.gather(1, y[:, None]).mean()


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(
    "loss",
    [
        torch.vmap(F.cross_entropy),
        lambda z, y: F.cross_entropy(z, torch.tensor(y)),
        looked_up,
        lambda z, y: torch.jit.script(chosen)(z, y),
    ],
    ids=["vmap", "torch.tensor", "looked up", "script"],
)
def test_found(loss, mixed):
    z = torch.randn(N, C, requires_grad=True)
    with Leaks() as leaks:
        result = loss(z, mixed)
    assert "test_leaks.py" in leaks.found
    torch.testing.assert_close(torch.as_tensor(result), torch.as_tensor(loss(z, mixed.shown)))  # it changes nothing
    with Leaks() as leaks, torch.no_grad():
        loss(z, mixed)
    assert leaks.found is None
    with Leaks() as leaks:
        mixed_loss(loss, z, mixed)
    assert leaks.found is None


@pytest.mark.parametrize("loss", HAND_WRITTEN.values(), ids=HAND_WRITTEN.keys())
def test_exact_losses_are_no_leaks(loss, mixed):
    with Leaks() as leaks:
        loss(torch.randn(N, C, requires_grad=True), mixed)
    assert leaks.found is None
