"""How steps use float targets. Each step is one that a user might write; its verdict is what is right to mix."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics.classification import BinaryAccuracy, MulticlassAccuracy
from torchmetrics.functional.classification import binary_calibration_error
from torchvision.ops import sigmoid_focal_loss

from lightning_manifold_mixup._step.check.usage import LabelUse

N, C = 6, 4
X = torch.randn(N, 8)
LABELS = torch.tensor([0, 1, 2, 3, 1, 0])
CLASSES = LABELS.float()
ONE_HOT = F.one_hot(LABELS, C).float()
SOFT = torch.rand(N, C).softmax(1)
MULTI = torch.tensor([[1.0, 0, -1, 1]] * N)
UNKNOWN = torch.where(MULTI < 0, torch.nan, MULTI)
VALUES = torch.randn(N)
COLUMNS = torch.rand(N, C)
BINARY = (LABELS > 1).float()
BOXES = torch.tensor([[1.0, 0.1, 0.2, 0.3]] * N)
TARGET_MASKS = (torch.rand(N, 1, 4, 4) > 0.5).float()
EDGES = torch.tensor([-1.0, 0.0, 1.0])
NET = nn.Linear(8, C)
PIXELS = nn.Conv2d(1, 1, 1)


class Focal(nn.Module):
    def forward(self, logits, y):
        p = logits.sigmoid()
        right = p * y + (1 - p) * (1 - y)
        return ((1 - right) ** 2 * F.binary_cross_entropy_with_logits(logits, y, reduction="none")).mean()


def huber_by_hand(z, y):
    error = z - y
    return torch.where(error.abs() < 1, 0.5 * error**2, error.abs() - 0.5).mean()


def hard_examples(z, y):
    with torch.no_grad():
        keep = (z - y).abs() > 0.1
    return ((z - y) ** 2 * keep).mean()


def checked(z, y):
    assert y.min() >= 0
    assert bool(torch.isfinite(y).all())
    assert ((y >= 0) & (y <= 1)).all()
    if (y > 0.5).any():
        print(y[0])
    return F.binary_cross_entropy_with_logits(z, y)


def with_metric(z, y):
    hit = (z.argmax(1) == y.argmax(1)).float().mean()
    assert hit <= 1
    MulticlassAccuracy(C)(z, y.argmax(1))
    return F.cross_entropy(z, y)


def with_float_metric(z, y):
    BinaryAccuracy()(z[:, 0].sigmoid(), y.int())
    binary_calibration_error(z[:, 0].sigmoid(), y.int())
    return F.binary_cross_entropy_with_logits(z[:, 0], y)


def with_casting_metric(z, y):
    BinaryAccuracy()(z[:, 0].sigmoid(), y)
    return F.binary_cross_entropy_with_logits(z[:, 0], y)


VALUE_STEPS = {
    "regression": (VALUES, lambda z, y: F.mse_loss(z[:, 0], y)),
    "regression, cast": (VALUES, lambda z, y: F.mse_loss(z[:, 0], y.float().to(z.dtype).to(z.device).view(-1))),
    "huber": (VALUES, lambda z, y: F.huber_loss(z[:, 0], y)),
    "huber module": (VALUES, lambda z, y: nn.SmoothL1Loss()(z[:, 0], y)),
    "huber by hand": (VALUES, lambda z, y: huber_by_hand(z[:, 0], y)),
    "hard examples": (VALUES, lambda z, y: hard_examples(z[:, 0], y)),
    "pinball": (VALUES, lambda z, y: torch.max(0.9 * (y - z[:, 0]), -0.1 * (y - z[:, 0])).mean()),
    "standardised": (VALUES, lambda z, y: F.mse_loss(z[:, 0], (y - y.mean()) / y.std())),
    "logarithm": (VALUES, lambda z, y: F.mse_loss(z[:, 0], y.abs().clamp(min=1e-3).log())),
    "likelihood": (VALUES, lambda z, y: -torch.distributions.Normal(z[:, 0], z[:, 1].exp()).log_prob(y).mean()),
    "gaussian": (VALUES, lambda z, y: F.gaussian_nll_loss(z[:, 0], y, z[:, 1].exp())),
    "soft cross-entropy": (SOFT, F.cross_entropy),
    "smoothed": (ONE_HOT, lambda z, y: F.cross_entropy(z, y * 0.9 + 0.1 / C)),
    "by hand": (SOFT, lambda z, y: -(y * z.log_softmax(1)).sum(1).mean()),
    "divergence": (SOFT, lambda z, y: F.kl_div(z.log_softmax(1), y, reduction="batchmean")),
    "multi-label": (SOFT, F.binary_cross_entropy_with_logits),
    "focal": (SOFT, Focal()),
    "torchvision focal": (SOFT, lambda z, y: sigmoid_focal_loss(z, y, reduction="mean")),
    "checked": (SOFT, checked),
    "metric beside it": (SOFT, with_metric),
    "columns": (COLUMNS, lambda z, y: F.mse_loss(z[:, 0], y[:, 0]) + F.l1_loss(z[:, 1:], y[:, 1:])),
    "conditional": (VALUES, lambda z, y: F.mse_loss(NET(torch.cat([X[:, :7], y[:, None]], 1)), z.detach())),
    "maximum": (VALUES, lambda z, y: F.mse_loss(z[:, 0], y / y.max())),
    "not used": (VALUES, lambda z, y: z.sum()),
}

CLASS_STEPS = {
    "argmax": (ONE_HOT, lambda z, y: F.cross_entropy(z, y.argmax(1)), "`argmax` in "),
    "long": (CLASSES, lambda z, y: F.cross_entropy(z, y.long()), "`long` in "),
    "to": (CLASSES, lambda z, y: F.cross_entropy(z, y.to(torch.int64)), "`to` in "),
    "type": (CLASSES, lambda z, y: F.cross_entropy(z, y.squeeze().type(torch.LongTensor)), "`type` in "),
    "one-hot": (CLASSES, lambda z, y: F.mse_loss(z, F.one_hot(y.long(), C).float()), "`long` in "),
    "compared": (CLASSES, lambda z, y: F.binary_cross_entropy_with_logits(z[:, 0], (y > 0.5).float()), "`gt` in "),
    "levels": (CLASSES, lambda z, y: (z.sigmoid() - (y[:, None] > torch.arange(C)).float()).abs().mean(), "`gt` in "),
    "gathered": (CLASSES, lambda z, y: -z.log_softmax(1).gather(1, y.long().unsqueeze(1)).mean(), "`long` in "),
    "indexed": (CLASSES, lambda z, y: -z.log_softmax(1)[torch.arange(N), y.int()].mean(), "`int` in "),
    "embedded": (CLASSES, lambda z, y: F.embedding(y.long(), NET.weight).mean() + z.mean(), "`long` in "),
    "bucketized": (VALUES, lambda z, y: F.cross_entropy(z, torch.bucketize(y, EDGES)), "`bucketize`"),
    "rounded": (CLASSES, lambda z, y: F.mse_loss(z[:, 0], y.round()), "`round` in "),
    "ranked": (VALUES, lambda z, y: z[y.argsort(), 0].diff().relu().mean(), "`argsort` in "),
    "pairs": (VALUES, lambda z, y: F.relu(1 - (y[:, None] - y).sign() * (z[:, :1] - z[:, 0])).mean(), "`sign` in "),
    "unknown is -1": (MULTI, lambda z, y: F.binary_cross_entropy_with_logits(z[y >= 0], y[y >= 0]), "`ge` in "),
    "unknown is -1, weighted": (
        MULTI,
        lambda z, y: (F.binary_cross_entropy_with_logits(z, y.clamp(min=0), reduction="none") * (y >= 0)).mean(),
        "`ge` in ",
    ),
    "unknown is nan": (
        UNKNOWN,
        lambda z, y: F.binary_cross_entropy_with_logits(z[~y.isnan()], y[~y.isnan()]),
        "`isnan` in ",
    ),
    "unknown rows": (UNKNOWN, lambda z, y: F.mse_loss(z[~y.isnan().any(1)], y[~y.isnan().any(1)]), "`isnan` in "),
    "scattered": (CLASSES, lambda z, y: (z * torch.zeros(N, C).scatter_(1, y.long()[:, None], 1)).sum(), "`long` in "),
    "weighted by class": (
        BINARY,
        lambda z, y: F.binary_cross_entropy_with_logits(z[:, 0], y, weight=torch.where(y > 0.5, 2.0, 1.0)),
        "`gt` in ",
    ),
    "written into": (BINARY, lambda z, y: (z[:, 0] * _weights(y)).mean(), "`eq` in "),
    "signs": (2 * BINARY - 1, lambda z, y: F.cosine_embedding_loss(z, X[:, :C], y), "`cosine_embedding_loss` in "),
    "side of a margin": (2 * BINARY - 1, lambda z, y: F.relu(1 - z[:, 0] * y).pow(2).mean(), "`mul` in "),
    "categorical": (CLASSES, lambda z, y: -torch.distributions.Categorical(logits=z).log_prob(y).mean(), "`long` in "),
    "metric beside it": (ONE_HOT, with_metric, "`argmax` in "),
    "metric of floats": (BINARY, with_float_metric, "`int` in "),
    "metric that casts": (BINARY, with_casting_metric, "`unique` in "),
    "both losses of one column": (
        BINARY,
        lambda z, y: F.cross_entropy(z, y.long()) + F.binary_cross_entropy_with_logits(z[:, 0], y),
        "`long` in ",
    ),
}  # fmt: skip

MIXED_STEPS = {
    "boxes": (BOXES, lambda z, y: F.cross_entropy(z, y[:, 0].long()) + F.mse_loss(z[:, 1:], y[:, 1:])),
    "boxes, split": (BOXES, lambda z, y: F.cross_entropy(z, y.split([1, 3], 1)[0][:, 0].long()) + F.mse_loss(
        z[:, 1:], y.split([1, 3], 1)[1])),
    "survival": (BOXES[:, :2], lambda z, y: (z[y[:, 1].argsort(), 0].logcumsumexp(0) * y[:, 0]).mean()),
    "depth with a mask": (
        BOXES[:, :2].view(N, 2, 1, 1),
        lambda z, y: ((z.view(N, C, 1, 1)[:, :1] - y[:, :1]).abs() * (y[:, 1:] > 0)).mean(),
    ),
    "padded boxes": (
        BOXES.view(N, 1, 4).repeat(1, 3, 1),
        lambda z, y: F.cross_entropy(z, y[:, 0, 0].long()) + F.mse_loss(z[:, None, 1:], y[..., 1:].mean(1, True)),
    ),
}  # fmt: skip


JOINT_STEPS = {
    "weights": (LABELS, VALUES, lambda z, y, w: (F.cross_entropy(z, y, reduction="none") * w).sum() / w.sum()),
    "weight argument": (BINARY, VALUES, lambda z, y, w: F.binary_cross_entropy(z[:, 0].sigmoid(), y, weight=w.abs())),
    "weighted one-hot": (LABELS, VALUES, lambda z, y, w: -(F.one_hot(y, C) * w[:, None] * z.log_softmax(1)).sum()),
    "event": (LABELS, BINARY, lambda z, time, event: -(event * z.log_softmax(1).gather(1, time[:, None])[:, 0]).mean()),
    "value of a class": (LABELS, VALUES, lambda z, y, v: F.mse_loss(z.gather(1, y[:, None])[:, 0], v)),
    "valid pixels": (LABELS > 1, VALUES, lambda z, valid, depth: F.l1_loss(z[:, 0][valid], depth[valid])),
    "observed": (BINARY > 0, VALUES, lambda z, seen, v: (F.l1_loss(z[:, 0], v, reduction="none") * seen).mean()),
    "scale": (VALUES, BINARY + 1, lambda z, y, scale: F.mse_loss(z[:, 0], y / scale)),
}
APART_STEPS = {
    "two losses": (LABELS, VALUES, lambda z, y, v: F.cross_entropy(z, y) + F.mse_loss(z[:, 0], v)),
    "one tensor of two": (BINARY, VALUES, lambda z, a, b: F.mse_loss(z[:, :2], torch.stack([a, b], 1))),
    "sum": (BINARY, VALUES, lambda z, a, b: F.mse_loss(z[:, 0], a - b)),
    "metric": (LABELS, VALUES, lambda z, y, v: ((z.argmax(1) == y) * v, F.mse_loss(z[:, 0], v))[1]),
}


def _weights(y):
    weights = torch.ones(N)
    weights[y == 1] = 2.0
    return weights


def used(loss, *targets):
    """How a step uses its targets, which are called a, b, ..."""
    with LabelUse(dict(zip("ab", targets, strict=False))) as use:
        loss(NET(X), *targets)
    return use


@pytest.mark.parametrize("step", VALUE_STEPS)
def test_values(step):
    y, loss = VALUE_STEPS[step]
    use = used(loss, y)
    assert use.verdict("a") == "values", use.evidence("a")
    assert use.evidence("a").startswith("used as values by") or step == "not used"


@pytest.mark.parametrize("step", CLASS_STEPS)
def test_classes(step):
    y, loss, where = CLASS_STEPS[step]
    use = used(loss, y)
    assert use.verdict("a") == "classes", use.evidence("a")
    assert use.evidence("a").startswith(f"read as classes by {where}")
    assert "(test_usage.py, line " in use.evidence("a")


@pytest.mark.parametrize("step", MIXED_STEPS)
def test_classes_beside_values(step):
    y, loss = MIXED_STEPS[step]
    use = used(loss, y)
    assert use.verdict("a") == "both", use.evidence("a")
    assert "read as classes by" in use.evidence("a")
    assert ", used as values by" in use.evidence("a")


@pytest.mark.parametrize("step", JOINT_STEPS)
def test_targets_that_are_read_together(step):
    *targets, loss = JOINT_STEPS[step]
    use = used(loss, *targets)
    floats = [key for key, y in zip("ab", targets, strict=True) if y.is_floating_point()]
    assert [use.verdict(key) for key in floats] == ["classes"] * len(floats)
    assert all(use.evidence(key).startswith("read together with another target by `") for key in floats)


@pytest.mark.parametrize("step", APART_STEPS)
def test_targets_that_are_read_apart(step):
    *targets, loss = APART_STEPS[step]
    assert used(loss, *targets).verdict("b") == "values"


def test_each_target_has_its_own_verdict():
    targets = {"label": CLASSES, "score": VALUES, "grade": LABELS}
    with LabelUse({key: y for key, y in targets.items() if y.is_floating_point()}) as use:
        z = NET(X)
        F.cross_entropy(z, targets["label"].long()) + F.mse_loss(z[:, 0], targets["score"])
    assert (use.verdict("label"), use.verdict("score")) == ("classes", "values")


def test_segmentation():
    with LabelUse({"mask": TARGET_MASKS}) as use:
        F.binary_cross_entropy_with_logits(PIXELS(TARGET_MASKS), TARGET_MASKS)
    assert use.verdict("mask") == "values"
    with LabelUse({"mask": TARGET_MASKS}) as use:
        F.cross_entropy(torch.cat([PIXELS(torch.rand_like(TARGET_MASKS))] * 2, 1), TARGET_MASKS[:, 0].long())
    assert use.verdict("mask") == "classes"


def test_nothing_changes():
    torch.manual_seed(0)
    z = NET(X)
    plain = F.cross_entropy(z, ONE_HOT.argmax(1))
    state = torch.get_rng_state()
    with LabelUse({"y": ONE_HOT}):
        watched = F.cross_entropy(NET(X), ONE_HOT.argmax(1))
    assert torch.equal(plain, watched)
    assert torch.equal(state, torch.get_rng_state())


def test_metatensors():
    from monai.data import MetaTensor

    y = MetaTensor(CLASSES)
    with LabelUse({"y": y}) as use:
        F.cross_entropy(NET(X), y.long())
    assert use.verdict("y") == "classes"
