import lightning as L
import pytest
import torch
import torch.nn.functional as F

from lightning_manifold_mixup import Mix, SoftLabelLossMixin
from lightning_manifold_mixup._step.labels.targets import plain
from lightning_manifold_mixup.modules.losses import label_accuracy, softmax_bce

MIX = Mix(torch.tensor(0.3), torch.tensor([1, 2, 3, 0]))
Y = torch.tensor([0, 2, 1, 2])


def one_hot(y):
    return F.one_hot(y, 3).float()


def soft(y):
    return MIX.lam * one_hot(y) + (1 - MIX.lam) * one_hot(y[MIX.partners])


class Module(SoftLabelLossMixin, L.LightningModule):
    pass


@pytest.mark.parametrize("name", ["cross_entropy", "bce"])
def test_hard_mixed_and_soft_labels_agree(name):
    """Both losses are linear in the label, so that the pair of losses is the loss of the soft label."""
    module, logits = Module(), torch.randn(4, 3, requires_grad=True)
    module.soft_label_loss_name = name
    mixed, probabilities = module.soft_label_loss(logits, MIX.target(Y)), module.soft_label_loss(logits, soft(Y))
    torch.testing.assert_close(plain(mixed), probabilities)
    torch.testing.assert_close(torch.autograd.grad(mixed, logits), torch.autograd.grad(probabilities, logits))
    hard = module.soft_label_loss(logits, Y)
    torch.testing.assert_close(hard, module.soft_label_loss(logits, one_hot(Y)))


def test_softmax_bce_is_the_formula():
    logits = torch.randn(4, 3, dtype=torch.float64)
    p, t = logits.softmax(1), soft(Y).double()
    expected = -(t * p.log() + (1 - t) * (1 - p).log()).mean()
    torch.testing.assert_close(softmax_bce(logits, soft(Y)), expected, check_dtype=False)


def test_softmax_bce_is_float32_under_autocast():
    logits = torch.randn(4, 3, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = softmax_bce(logits, MIX.target(Y))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(plain(loss), plain(softmax_bce(logits.float(), MIX.target(Y))))


def test_accuracy_is_lam_weighted():
    logits = torch.randn(4, 3)
    hits = [(logits.argmax(1) == y).float().mean() for y in (Y, Y[MIX.partners])]
    expected = MIX.lam * hits[0] + (1 - MIX.lam) * hits[1]
    torch.testing.assert_close(label_accuracy(logits, MIX.target(Y)), expected)
    torch.testing.assert_close(label_accuracy(logits, soft(Y)), expected)
    torch.testing.assert_close(label_accuracy(logits, Y), hits[0])
