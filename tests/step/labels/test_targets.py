"""Every loss of labels in superposition is ``lam * L(y) + (1 - lam) * L(y[partners])``, value and gradient."""

import collections
import copy
import dataclasses
import pickle

import kornia.losses
import pytest
import segmentation_models_pytorch.losses as smp
import timm.loss
import torch
import torch.nn.functional as F
import torchmetrics
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_manifold_mixup import MixedTarget, MixingError, draw_mix, mixed_loss
from lightning_manifold_mixup._step.batch.keys import Keys
from lightning_manifold_mixup._step.batch.tree import get, without
from lightning_manifold_mixup._step.labels.mixed_target import MixedValue
from lightning_manifold_mixup._step.labels.targets import Superposition, plain
from lightning_manifold_mixup._step.step import Site

N, C = 8, 5
LAM = torch.tensor(0.3)
PERMUTATION = torch.tensor([3, 0, 5, 1, 2, 4, 7, 6])
WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 0.1, 3.0])


@pytest.fixture
def y():
    return torch.tensor([0, 1, 2, 3, 4, 2, 0, 1])


@pytest.fixture
def mixed(y):
    return MixedTarget(y, y[PERMUTATION], LAM)


def assert_exact(loss, logits, y, lam=LAM, partners=PERMUTATION):
    """Compares a loss function of (logits, labels) with the formula, both in value and in gradient."""
    logits = logits.detach().requires_grad_()
    ours = loss(logits, MixedTarget(y, y[partners], lam))
    formula = lam * loss(logits, y) + (1 - lam) * loss(logits, y[partners])
    assert ours.requires_grad
    torch.testing.assert_close(plain(ours), formula)
    gradients = [torch.autograd.grad(value.sum(), logits, retain_graph=True)[0] for value in (ours, formula)]
    torch.testing.assert_close(*gradients)


def binary(y):
    return (y > 2).float()


FUNCTIONAL = {
    "cross_entropy": F.cross_entropy,
    "cross_entropy, weighted": lambda z, y: F.cross_entropy(z, y, WEIGHTS, ignore_index=2),
    "cross_entropy, smooth": lambda z, y: F.cross_entropy(z, y, WEIGHTS, label_smoothing=0.1),
    "cross_entropy, sum": lambda z, y: F.cross_entropy(z, y, reduction="sum"),
    "cross_entropy, none": lambda z, y: F.cross_entropy(z, y, WEIGHTS, reduction="none", ignore_index=0),
    "nll_loss": lambda z, y: F.nll_loss(z.log_softmax(1), y, WEIGHTS),
    "multi_margin_loss": F.multi_margin_loss,
    "multilabel_margin_loss": lambda z, y: F.multilabel_margin_loss(z, torch.stack([y] + [y * 0 - 1] * 4, 1)),
    "multilabel_soft_margin_loss": lambda z, y: F.multilabel_soft_margin_loss(z, F.one_hot(y, C).float()),
    "binary_cross_entropy": lambda z, y: F.binary_cross_entropy(z[:, 0].sigmoid(), binary(y)),
    "bce_with_logits": lambda z, y: F.binary_cross_entropy_with_logits(z[:, 0], binary(y), pos_weight=WEIGHTS[2]),
    "hinge_embedding_loss": lambda z, y: F.hinge_embedding_loss(z[:, 0], (y > 2).long() * 2 - 1),
    "cosine_embedding_loss": lambda z, y: F.cosine_embedding_loss(z, z.flip(0) * 2, (y > 2).long() * 2 - 1),
    "margin_ranking_loss": lambda z, y: F.margin_ranking_loss(z[:, 0], z[:, 1], binary(y) * 2 - 1),
    "soft_margin_loss": lambda z, y: F.soft_margin_loss(z[:, 0], binary(y) * 2 - 1),
    "kl_div": lambda z, y: F.kl_div(z.log_softmax(1), F.one_hot(y, C).float(), reduction="batchmean"),
    "poisson_nll_loss": lambda z, y: F.poisson_nll_loss(z[:, 0], y.float()),
    "gaussian_nll_loss": lambda z, y: F.gaussian_nll_loss(z[:, 0], y.float(), z[:, 1].exp()),
    "mse_loss": lambda z, y: F.mse_loss(z[:, 0], y.float()),
    "l1_loss": lambda z, y: F.l1_loss(z[:, 0], y.float()),
    "smooth_l1_loss": lambda z, y: F.smooth_l1_loss(z[:, 0], y.to(z)),
    "huber_loss": lambda z, y: F.huber_loss(z[:, 0], y.type_as(z)),
    "ctc_loss": lambda z, y: F.ctc_loss(
        z[:, None].expand(-1, N, -1).log_softmax(-1), y[:, None] % 4 + 1, torch.full((N,), N), torch.ones(N, dtype=int)
    ),
    "triplet by label": lambda z, y: F.triplet_margin_loss(z, z.flip(0), z[y]),
}


@pytest.mark.parametrize("loss", FUNCTIONAL.values(), ids=FUNCTIONAL.keys())
def test_functional_losses(loss, y):
    assert_exact(loss, torch.randn(N, C), y)


def focal_by_hand(z, y):
    ce = F.cross_entropy(z, y, reduction="none")
    return ((1 - torch.exp(-ce)) ** 2 * ce).mean()


def focal_of_the_mean(z, y):
    ce = nn.CrossEntropyLoss()(z, y)
    return (1 - torch.exp(-ce)) ** 2 * ce


def weights_without_gradient(z, y):
    ce = F.cross_entropy(z, y, reduction="none")
    with torch.no_grad():
        weight = (1 - torch.exp(-ce)) ** 2 * WEIGHTS[y]
    return (weight * ce).sum() / weight.sum()


def masked_logits(z, y):
    keep = y != 2
    return F.cross_entropy(z[keep], y[keep])


def masked_loss(z, y):
    keep = (y != 2).float()
    return (F.cross_entropy(z, y, reduction="none") * keep).sum() / keep.sum()


def dice_by_hand(z, y):
    target, p = F.one_hot(y, C).float(), z.softmax(1)
    return 1 - (2 * (target * p).sum(0) / (target.sum(0) + p.sum(0) + 1)).mean()


def classes_in_turn(z, y):
    total = 0.0
    for label in y.unique():
        total = total + z[y == label].mean() * z[y == label].sum()
    return total


def samples_in_turn(z, y):
    loss = z.new_zeros(())
    for i in range(len(z)):
        loss += F.cross_entropy(z[i : i + 1], y[i : i + 1])
    return loss / N


def labels_rewritten(z, y):
    y = y.clone()
    y[y == 2] = 0
    return F.cross_entropy(z, y)


HAND_WRITTEN = {
    "gather": lambda z, y: -z.log_softmax(1).gather(1, y.view(-1, 1)).mean(),
    "indexing": lambda z, y: -z.log_softmax(1)[torch.arange(N), y].mean(),
    "one_hot": lambda z, y: -(F.one_hot(y, C) * z.log_softmax(1)).sum(1).mean(),
    "one_hot, cast": lambda z, y: -(F.one_hot(y, C).to(z.dtype) * z.log_softmax(1)).sum(1).mean(),
    "one_hot, mask": lambda z, y: z.log_softmax(1).masked_fill(~F.one_hot(y, C).bool(), 0).pow(2).sum(),
    "comparison": lambda z, y: -((y[:, None] == torch.arange(C)) * z.log_softmax(1)).sum(),
    "two terms": lambda z, y: F.cross_entropy(z, y) * WEIGHTS[y].sum() + y.float().mean() ** 2 * z.sum(),
    "stacked": lambda z, y: torch.stack([F.cross_entropy(z, y), F.multi_margin_loss(z, y)]).prod(),
    "torchvision focal": lambda z, y: torchvision.ops.sigmoid_focal_loss(z, F.one_hot(y, C).float(), reduction="mean"),
    **{
        function.__name__: function
        for function in (
            focal_by_hand, focal_of_the_mean, weights_without_gradient, masked_logits, masked_loss,
            dice_by_hand, classes_in_turn, samples_in_turn, labels_rewritten,
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("loss", HAND_WRITTEN.values(), ids=HAND_WRITTEN.keys())
def test_hand_written_losses(loss, y):
    assert_exact(loss, torch.randn(N, C), y)


CRITERIA = {
    "timm label smoothing": timm.loss.LabelSmoothingCrossEntropy(0.1),
    "timm bce": timm.loss.BinaryCrossEntropy(0.1),
    "timm asymmetric": timm.loss.AsymmetricLossSingleLabel(),
    "kornia focal": kornia.losses.FocalLoss(0.5, 2.0, "mean"),
}


@pytest.mark.parametrize("criterion", CRITERIA.values(), ids=CRITERIA.keys())
def test_criteria(criterion, y):
    assert_exact(criterion, torch.randn(N, C), y)


SEGMENTATION = {
    "cross entropy": nn.CrossEntropyLoss(ignore_index=1),
    "kornia focal": kornia.losses.FocalLoss(0.5, 2.0, "mean"),
    "kornia dice": kornia.losses.DiceLoss(),
    "kornia tversky": kornia.losses.TverskyLoss(0.5, 0.5),
    "kornia lovasz": kornia.losses.LovaszSoftmaxLoss(),
    "smp dice": smp.DiceLoss("multiclass"),
    "smp dice, ignoring": smp.DiceLoss("multiclass", ignore_index=2),
    "smp jaccard": smp.JaccardLoss("multiclass"),
    "smp focal": smp.FocalLoss("multiclass"),
    "smp focal, ignoring": smp.FocalLoss("multiclass", ignore_index=2),
    "smp lovasz": smp.LovaszLoss("multiclass"),
    "smp tversky": smp.TverskyLoss("multiclass"),
    "smp soft cross entropy": smp.SoftCrossEntropyLoss(smooth_factor=0.1, ignore_index=2),
}


@pytest.mark.parametrize("criterion", SEGMENTATION.values(), ids=SEGMENTATION.keys())
def test_dense_criteria(criterion):
    assert_exact(criterion, torch.randn(N, C, 6, 6), torch.randint(C, (N, 6, 6)))


@pytest.mark.parametrize("criterion", [smp.DiceLoss("binary"), smp.JaccardLoss("binary"), smp.LovaszLoss("binary")])
def test_binary_criteria(criterion):
    assert_exact(criterion, torch.randn(N, 1, 6, 6), torch.randint(2, (N, 1, 6, 6)))


class TestPlainView:
    """To code that does not know it, a MixedTarget is the tensor of the dominant labels."""

    @pytest.mark.parametrize(("lam", "dominant"), [(0.3, "partners"), (0.5, "labels"), (0.7, "labels")])
    def test_dominant_labels(self, y, lam, dominant):
        mixed = MixedTarget(y, y[PERMUTATION], torch.tensor(lam))
        assert torch.equal(mixed.shown, getattr(mixed, dominant))
        assert mixed.tolist() == getattr(mixed, dominant).tolist()
        assert (mixed.numpy() == getattr(mixed, dominant).numpy()).all()
        assert (mixed.shape, mixed.dtype, mixed.device, len(mixed)) == (y.shape, y.dtype, y.device, N)

    @pytest.mark.parametrize(
        "operation",
        [
            lambda y: y.long(), lambda y: y.int(), lambda y: y.view(-1), lambda y: y.view(2, 4), lambda y: y.data,
            lambda y: y.to("cpu"), lambda y: y.to(torch.uint8), lambda y: y[torch.tensor([0, 3])], lambda y: y[1:3],
            lambda y: y[torch.arange(N) > 2], lambda y: y[:, None].expand(-1, 3), lambda y: y.clone(),
            lambda y: y.detach(), lambda y: y.contiguous(), lambda y: y.squeeze(), lambda y: y.flip(0),
            lambda y: torch.cat([y, y]), lambda y: torch.stack([y, y], 1), lambda y: y.repeat_interleave(2),
            lambda y: y.view(2, 4).T,
        ],
    )  # fmt: skip
    def test_stays_in_superposition(self, y, mixed, operation):
        result = operation(mixed)
        assert type(result) is MixedTarget
        assert torch.equal(result.labels, operation(y))
        assert torch.equal(result.partners, operation(y[PERMUTATION]))
        assert torch.equal(result.shown, operation(y[PERMUTATION]))

    def test_floats_made_of_labels_show_the_dominant_ones(self, y, mixed):
        for cast in (lambda y: y.float(), lambda y: y.to(torch.float64), lambda y: F.one_hot(y, C).float()):
            value = cast(mixed)
            assert isinstance(value, MixedValue)
            assert torch.equal(plain(value), cast(y[PERMUTATION]))  # lam is 0.3

    def test_one_hot_stays_integer_until_it_meets_floats(self, y, mixed):
        assert F.one_hot(mixed, C).dtype == torch.long
        logits = torch.randn(N, C, requires_grad=True)
        loss = (F.one_hot(mixed, C) * logits).sum()
        expected = LAM * (F.one_hot(y, C) * logits).sum() + (1 - LAM) * (F.one_hot(y[PERMUTATION], C) * logits).sum()
        torch.testing.assert_close(plain(loss), expected)

    def test_loss_reads_as_a_number(self, y, mixed):
        z = torch.randn(N, C, requires_grad=True)
        loss = F.cross_entropy(z, mixed)
        expected = LAM * F.cross_entropy(z, y) + (1 - LAM) * F.cross_entropy(z, y[PERMUTATION])
        assert torch.allclose(loss, expected)
        assert loss.item() == pytest.approx(expected.item())
        assert f"{loss:.4f}" == f"{expected.item():.4f}"
        assert float(loss.detach()) == pytest.approx(expected.item())
        assert loss < expected + 1
        loss.backward()
        torch.testing.assert_close(z.grad, torch.autograd.grad(expected, z)[0])

    def test_the_labels_it_was_made_from_stay(self, y, mixed):
        before = y.clone()
        mixed[mixed == 2] = 0
        assert torch.equal(y, before)

    def test_what_leaves_the_process_is_plain(self, mixed):
        duplicate = pickle.loads(pickle.dumps(mixed))
        assert type(duplicate) is torch.Tensor
        assert torch.equal(duplicate, mixed.shown)

    def test_a_copy_within_the_step_is_in_superposition(self, y, mixed):
        assert_exact(lambda z, y: F.cross_entropy(z, copy.deepcopy(y)), torch.randn(N, C), y)

    def test_floats_are_refused(self):
        with pytest.raises(TypeError, match=r"class indices, integer or bool; got torch.float32.*`mix\(y\)`"):
            MixedTarget(torch.rand(2), torch.rand(2), LAM)


class TestMetrics:
    """Metrics see the dominant labels."""

    def test_by_hand(self, mixed):
        predictions = torch.randn(N, C).argmax(1)
        hits = (predictions == mixed).float().mean()
        assert (predictions == mixed).tolist() == (predictions == mixed.shown).tolist()  # no labels: no warning
        assert mixed.max().item() == mixed.shown.max().item()  # the same under both labellings: none either
        assert hits.item() == (predictions == mixed.shown).float().mean().item()

    @pytest.mark.parametrize("name", ["accuracy", "f1_score", "confusion_matrix", "auroc"])
    def test_functional(self, mixed, name):
        metric = getattr(torchmetrics.functional, name)
        p = torch.randn(N, C).softmax(1)
        arguments = {"task": "multiclass", "num_classes": C}
        torch.testing.assert_close(plain(metric(p, mixed, **arguments)), metric(p, mixed.shown, **arguments))


class TestRefusals:
    """What cannot be exact is refused with the remedy."""

    def test_branch_on_labels(self, mixed):
        with pytest.raises(MixingError, match=r"`__bool__`.*False for the dominant.*True.*mixed_loss\(function"):
            bool(mixed[0] == 0)
        assert bool(mixed.max() < C)  # the same under both labellings

    def test_number_of_selected(self, mixed):
        selected = mixed[:3][mixed[:3] == 3]
        with pytest.raises(MixingError, match="go on with 1 for the dominant labels and with 0"):
            selected.numel()

    def test_labels_of_two_mixes(self, y, mixed):
        other = MixedTarget(y, y.flip(0), torch.tensor(0.6))
        with pytest.raises(MixingError, match="two different mixes"):
            mixed + other

    @pytest.mark.parametrize(
        "write",
        [
            lambda t, y: t[0].add_(y[0]), lambda t, y: t.view(-1).scatter_(0, y, 1.0), lambda t, y: t[y[0]].zero_(),
            lambda t, y: y.view(2, -1).zero_(), lambda t, y: setattr(y, "data", y + 1),
            lambda t, y: (t.view(-1), t.scatter_(1, y[:, None], 1.0)), lambda t, y: t[y].sum().register_hook(print),
        ],
    )  # fmt: skip
    def test_write_into_shared_memory(self, mixed, write):
        target = torch.zeros(N, C, requires_grad=True) + 0
        before = target.detach().clone()
        with pytest.raises(MixingError, match="writes what depends on the labels into memory that other tensors share"):
            write(target, mixed)
        assert torch.equal(target, before)


class TestSuperposition:
    def test_use_is_noted(self, y):
        superposition = Superposition(LAM)
        mixed = superposition.superpose(y, y[PERMUTATION])
        F.cross_entropy(torch.randn(N, C), mixed)
        assert not superposition.used  # no gradient, no loss
        F.cross_entropy(torch.randn(N, C, requires_grad=True), mixed)
        assert superposition.used

    def test_close_makes_everything_plain(self, y):
        superposition = Superposition(LAM)
        mixed = superposition.superpose(y, y[PERMUTATION])
        z = torch.randn(N, C, requires_grad=True)
        kept, loss = mixed + 1, F.cross_entropy(z, mixed).detach()
        written = torch.zeros(N, C).scatter_(1, mixed[:, None], 1.0)
        assert isinstance(written, MixedValue)
        expected = LAM * F.cross_entropy(z, y) + (1 - LAM) * F.cross_entropy(z, y[PERMUTATION])
        superposition.close()
        assert type(mixed) is type(kept) is type(loss) is type(written) is type(mixed + 1) is torch.Tensor
        assert torch.equal(written, torch.zeros(N, C).scatter_(1, y[PERMUTATION][:, None], 1.0))
        assert torch.equal(kept, y[PERMUTATION] + 1)
        torch.testing.assert_close(loss, expected.detach())


PER_SAMPLE = {
    "cross_entropy": F.cross_entropy,
    "weighted, ignoring": lambda z, y, **k: F.cross_entropy(z, y, WEIGHTS, ignore_index=2, **k),
    "smooth": lambda z, y, **k: F.cross_entropy(z, y, WEIGHTS, label_smoothing=0.1, **k),
    "nll_loss": lambda z, y, **k: F.nll_loss(z.log_softmax(1), y, WEIGHTS, **k),
    "bce": lambda z, y, **k: F.binary_cross_entropy_with_logits(z[:, 0], binary(y), pos_weight=WEIGHTS[2], **k),
}


class TestLamForEachSample:
    """Each sample's loss counts with its own lam; the divisors of a mean are those of each labelling."""

    @pytest.mark.parametrize("loss", PER_SAMPLE.values(), ids=PER_SAMPLE.keys())
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_exact(self, loss, reduction, y):
        lam = torch.rand(N)
        z = torch.randn(N, C, requires_grad=True)
        ours = plain(loss(z, MixedTarget(y, y[PERMUTATION], lam), reduction=reduction))
        expected = 0
        for weight, labels in ((lam, y), (1 - lam, y[PERMUTATION])):
            each, total = loss(z, labels, reduction="none"), loss(z, labels, reduction="sum")
            divisor = total / loss(z, labels, reduction="mean") if reduction == "mean" else 1.0
            summed = weight * each if reduction == "none" else (weight * each).sum()
            expected = expected + summed / divisor.detach() if reduction == "mean" else expected + summed
        torch.testing.assert_close(ours, expected)
        grads = [torch.autograd.grad(value.sum(), z, retain_graph=True)[0] for value in (ours, expected)]
        torch.testing.assert_close(*grads)

    def test_equal_lams_are_one_lam(self, y):
        z = torch.randn(N, C, requires_grad=True)
        one, each = (MixedTarget(y, y[PERMUTATION], lam) for lam in (LAM, LAM.expand(N)))
        torch.testing.assert_close(plain(F.cross_entropy(z, one, WEIGHTS)), plain(F.cross_entropy(z, each, WEIGHTS)))

    def test_other_losses_are_refused(self, y):
        mixed = MixedTarget(y, y[PERMUTATION], torch.rand(N))
        z = torch.randn(N, C, requires_grad=True)
        with pytest.raises(MixingError, match=r"one value for each of 8 samples.*reduction='none'"):
            plain(-z.log_softmax(1).gather(1, mixed[:, None]).mean())
        with pytest.raises(MixingError, match="summed up without their lam"):
            mixed_loss(F.multi_margin_loss, z, mixed)
        assert torch.equal(mixed_loss(F.cross_entropy, z, mixed), plain(F.cross_entropy(z, mixed)))

    def test_the_remedy_for_other_losses_is_exact(self, y):
        lam, z = torch.rand(N), torch.randn(N, C, requires_grad=True)

        def margins(z, y):
            return F.multi_margin_loss(z, y, reduction="none")

        ours = mixed_loss(margins, z, MixedTarget(y, y[PERMUTATION], lam)).mean()
        expected = (lam * margins(z, y) + (1 - lam) * margins(z, y[PERMUTATION])).mean()
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(*(torch.autograd.grad(loss, z)[0] for loss in (ours, expected)))

    @pytest.mark.parametrize(
        "function",
        [
            lambda loss, z, y: loss**2, lambda loss, z, y: loss.exp(), lambda loss, z, y: loss * loss,
            lambda loss, z, y: 1 / loss, lambda loss, z, y: torch.div(z.sum(), loss),
            lambda loss, z, y: loss.clamp(max=1),
            lambda loss, z, y: loss * (z.argmax(1) == y).float().mean(),
        ],
    )  # fmt: skip
    def test_what_is_no_sum_of_losses_is_refused(self, function, y):
        """A mean over samples with a lam each has no lam of its own; squares of it would be of nobody's."""
        mixed, z = MixedTarget(y, y[PERMUTATION], torch.rand(N)), torch.randn(N, C, requires_grad=True)
        with pytest.raises(MixingError, match=r"summed up, each with a lam of its own.*Draw one lam.*mixed_loss"):
            function(F.cross_entropy(z, mixed), z, mixed)

    def test_sums_of_losses_are_exact(self, y):
        lam, z = torch.rand(N), torch.randn(N, C, requires_grad=True)
        scale = torch.tensor(0.3, requires_grad=True)

        def total(ce, bce):
            return (ce * scale.exp() / 2 - bce * 0.5 + torch.stack([ce, bce]).sum() + scale + z.pow(2).mean()).squeeze()

        mixed = MixedTarget(y, y[PERMUTATION], lam)
        ours = plain(total(F.cross_entropy(z, mixed), F.binary_cross_entropy_with_logits(z[:, 0], binary(mixed))))
        ce, bce = 0, 0
        for weight, labels in ((lam, y), (1 - lam, y[PERMUTATION])):
            ce = ce + (weight * F.cross_entropy(z, labels, reduction="none")).mean()
            each = F.binary_cross_entropy_with_logits(z[:, 0], binary(labels), reduction="none")
            bce = bce + (weight * each).mean()
        expected = total(ce, bce)
        torch.testing.assert_close(ours, expected)
        for ours_, expected_ in zip(*(torch.autograd.grad(loss, (z, scale)) for loss in (ours, expected)), strict=True):
            torch.testing.assert_close(ours_, expected_)


class TestMixedLoss:
    def test_branches(self, y):
        def loss(z, y):
            return z.sum() if y[0] == 0 else z.pow(2).sum()

        assert_exact(lambda z, y: mixed_loss(loss, z, y), torch.randn(N, C), y)

    def test_structure(self, y, mixed):
        z = torch.randn(N, C)
        both = mixed_loss(lambda z, y: {"a": F.cross_entropy(z, y), "b": (z[y].sum(),)}, z, mixed)
        assert type(both["a"]) is torch.Tensor
        expected = LAM * F.cross_entropy(z, y) + (1 - LAM) * F.cross_entropy(z, y[PERMUTATION])
        torch.testing.assert_close(both["a"], expected)

    def test_plain_labels(self, y):
        z = torch.randn(N, C)
        assert torch.equal(mixed_loss(F.cross_entropy, z, y), F.cross_entropy(z, y))


@st.composite
def cases(draw):
    n, classes = draw(st.integers(1, 6)), draw(st.integers(2, 5))
    dense = tuple(draw(st.lists(st.integers(1, 3), max_size=2)))
    seed = draw(st.integers(0, 2**31))
    label_dtype = draw(st.sampled_from([torch.int64, torch.int32, torch.uint8, torch.int16]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    alpha = draw(st.sampled_from([0.1, 1.0, 2.0]))
    view = draw(st.sampled_from(["same", "flat", "reversed", "column", "doubled"]))
    loss = draw(
        st.sampled_from(["cross_entropy", "gather", "one_hot", "focal", "masked", "indexing", "mean of squares"])
    )
    nesting = draw(st.lists(st.sampled_from(list(WRAPPERS)), min_size=1, max_size=3))
    return n, classes, dense, seed, label_dtype, dtype, alpha, view, loss, nesting


@dataclasses.dataclass(frozen=True)
class Part:
    other: object
    part: object


NamedPart = collections.namedtuple("NamedPart", "other part")

WRAPPERS = {  # how a batch may hold a part, and the key of that
    "tuple": (lambda part, other: (other, part), "1"),
    "list": (lambda part, other: [part, other], "0"),
    "dict": (lambda part, other: {"other": other, "part": part}, "part"),
    "named tuple": (lambda part, other: NamedPart(other, part), "part"),
    "dataclass": (lambda part, other: Part(other, part), "part"),
}
VIEWS = {
    "same": lambda t: t,
    "flat": lambda t: t.reshape(-1),
    "reversed": lambda t: t.flip(0),
    "column": lambda t: t[:, None],
    "doubled": lambda t: torch.cat([t, t]),
}
LOSSES = {
    "cross_entropy": F.cross_entropy,
    "gather": lambda z, y: -z.log_softmax(1).gather(1, y[:, None]).sum(),
    "one_hot": lambda z, y: -(F.one_hot(y, z.shape[1]) * z.log_softmax(1)).mean(),
    "focal": lambda z, y: focal_by_hand(z, y),
    "masked": lambda z, y: (F.cross_entropy(z, y, reduction="none") * (y != 0)).sum() / ((y != 0).sum() + 1),
    "indexing": lambda z, y: z[torch.arange(len(y)), y].exp().prod(),
    "mean of squares": lambda z, y: (z[:, 0] - y.to(z.dtype)).pow(2).mean(),
}


@given(cases())
@settings(max_examples=2000, deadline=None)
def test_property_any_batch_view_and_loss_is_the_formula(case):
    n, classes, dense, seed, label_dtype, dtype, alpha, view, loss, nesting = case
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n, *dense), generator=generator).to(label_dtype)
    mix = draw_mix(n, alpha, generator)

    def value(z, y):
        y = VIEWS[view](y).reshape(-1).long()
        return LOSSES[loss](z, y)

    batch, keys, x = y, [], torch.randn(n, 2)
    for wrapper in nesting:
        wrap, key = WRAPPERS[wrapper]
        batch, keys = wrap(batch, x), [key, *keys]
    path = ".".join(keys)
    places = Keys(input_key=path, target_key=path).locate(batch)
    superposition = Superposition(mix.lam)
    mixed = Site("hidden", places, {}).mixed(batch, (mix,), (mix,), "superposed", superposition)
    assert type(mixed) is type(batch)
    assert get(batch, path) is y
    assert list(without(mixed, [path])) == [x] * len(nesting)

    count = VIEWS[view](y).numel()
    z = torch.randn(count, classes, generator=generator, dtype=dtype, requires_grad=True)
    ours = value(z, get(mixed, path))
    lam = mix.lam.to(dtype)
    formula = lam * value(z, y) + (1 - lam) * value(z, y[mix.partners])
    torch.testing.assert_close(plain(ours), formula, equal_nan=True)
    torch.testing.assert_close(torch.autograd.grad(ours, z)[0], torch.autograd.grad(formula, z)[0], equal_nan=True)
