"""What else happens in a fit: other callbacks, steps that call themselves, changes between runs, stateful criteria."""

import copy

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import (
    BinaryHingeLoss,
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MultilabelCoverageError,
)

from lightning_manifold_mixup import ManifoldMixupCallback, MixingError
from tests.exactness import CLASSES, Manual, Module, data, network, train
from tests.helpers import assert_untouched, trainer


def loader(n=24, size=8):
    return DataLoader(TensorDataset(*data(n)), size)


class Counting(Module):
    """Counts its training steps; a check runs them on copies."""

    def __init__(self, loss=F.cross_entropy):
        super().__init__(loss)
        self.calls = 0

    def training_step(self, batch, batch_idx):
        self.calls += 1
        return super().training_step(batch, batch_idx)


class TestTrainingStep:
    def test_skipped_epoch(self):
        """`on_train_batch_start` of the module that returns -1."""

        class Skips(Counting):
            def on_train_batch_start(self, batch, batch_idx):
                return -1 if batch_idx == 1 else None

        module = Skips()
        trainer(ManifoldMixupCallback(layers=["model.1"], seed=0), max_epochs=2).fit(module, loader())
        assert module.calls == 2
        assert_untouched(module)
        assert module.training_step.__func__ is Counting.training_step

    @pytest.mark.parametrize("first", [True, False])
    def test_another_callback_wraps_each_step(self, first):
        class Wraps(L.Callback):
            def __init__(self):
                self.calls = 0

            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                self.original = pl_module.training_step

                def wrapped(*args, **kwargs):
                    self.calls += 1
                    return self.original(*args, **kwargs)

                pl_module.training_step = wrapped

            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                pl_module.training_step = self.original

        module, wraps, callback = Counting(), Wraps(), ManifoldMixupCallback(layers=["model.1"], seed=0)
        seen = []

        class Lams(L.Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                seen.append(float(outputs["loss"]))

        callbacks = [wraps, callback] if first else [callback, wraps]
        trainer(*callbacks, Lams(), max_epochs=2).fit(module, loader())
        assert (module.calls, wraps.calls) == (6, 6)
        wrapped = list(seen)
        del seen[:]
        trainer(ManifoldMixupCallback(layers=["model.1"], seed=0), Lams(), max_epochs=2).fit(Counting(), loader())
        assert wrapped == seen

    def test_a_step_that_calls_itself(self):
        """On parts of the batch, as gradient caching does: mixed once, and exact."""

        class Recursive(Module):
            def training_step(self, batch, batch_idx, part=None):
                x, y = batch
                if part is None:
                    return sum(self.training_step((x, y), batch_idx, part=k) for k in range(2)) / 2
                return F.cross_entropy(self.model(x), y) * (1 + part)

        seen, _ = train(Recursive(None), loader(8), ManifoldMixupCallback(layers=["model.1"], seed=0))
        assert_formula(seen[0], lambda z, y: 1.5 * F.cross_entropy(z, y))

    def test_a_forward_after_backward_is_not_mixed(self):
        seen = []

        class Looks(Counting):
            def on_after_backward(self):
                x = data(24)[0][:8]
                seen.append(torch.equal(self.model(x), copy.deepcopy(self.model)(x)))

            def on_train_batch_end(self, outputs, batch, batch_idx):
                x = data(24)[0][:8]
                seen.append(torch.equal(self.model(x), copy.deepcopy(self.model)(x)))

        trainer(ManifoldMixupCallback(layers=["model.1"], seed=0)).fit(Looks(), loader())
        assert seen == [True] * 6

    def test_an_exception_takes_everything_back(self):
        class Fails(Counting):
            def training_step(self, batch, batch_idx):
                if batch_idx == 1:
                    raise KeyError("mine")
                return super().training_step(batch, batch_idx)

        module = Fails()
        with pytest.raises(KeyError, match="mine"):
            trainer(ManifoldMixupCallback(layers=["model.1"], seed=0)).fit(module, loader())
        assert_untouched(module)


def assert_formula(record, loss, n=8):
    draw, weights, value, _ = record
    twin = network()
    twin.load_state_dict({name.removeprefix("model."): v for name, v in weights.items() if name.startswith("model.")})
    x, y = data(n)
    lam, partners = draw.mix.lam.double(), draw.mix.partners
    h = twin[:2](x[:8])
    z = twin[2:](lam * h + (1 - lam) * h[partners])
    torch.testing.assert_close(value, (lam * loss(z, y[:8]) + (1 - lam) * loss(z, y[:8][partners])).detach())


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.filterwarnings("ignore:Manifold Mixup runs the training step twice")
def test_resume_after_a_rename(tmp_path):
    """Neither a layer nor a criterion of the checkpoint's names is needed; its own layers are chosen anew."""

    class Old(Counting):
        def __init__(self):
            super().__init__()
            self.criterion = Branching()

        def training_step(self, batch, batch_idx):
            return self.criterion(self.model(batch[0]), batch[1])

    class New(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.objective = network(), Branching()

        def on_load_checkpoint(self, checkpoint):
            state = checkpoint["state_dict"]
            renamed = {name.replace("model.", "net."): value for name, value in state.items()}
            checkpoint["state_dict"] = {name.replace("criterion.", "objective."): v for name, v in renamed.items()}

        def training_step(self, batch, batch_idx):
            return self.objective(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    saved = ModelCheckpoint(tmp_path, save_last=True)
    trainer(ManifoldMixupCallback(seed=0), saved, enable_checkpointing=True).fit(Old(), loader())
    callback = ManifoldMixupCallback(seed=0)
    saved = ModelCheckpoint(tmp_path / "again", save_last=True)
    again = trainer(callback, saved, enable_checkpointing=True, max_epochs=2)
    again.fit(New(), loader(), ckpt_path=str(tmp_path / "last.ckpt"))
    assert again.global_step == 6
    assert all(name == "input" or name.startswith("net") for name in callback.layers_)


class Branching(nn.Module):
    """A criterion that only a call for each labelling is exact for, with a state of its own."""

    def __init__(self):
        super().__init__()
        self.register_buffer("frequency", torch.full((CLASSES,), 1.0 / CLASSES, dtype=torch.float64))
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))
        self.bank, self.last = [], None

    def forward(self, z, y):
        counts = torch.bincount(y, minlength=CLASSES).double() / len(y)
        self.frequency = 0.9 * self.frequency + 0.1 * counts
        self.updates += 1
        self.bank.append(y)
        losses = F.cross_entropy(z, y, 1 / (self.frequency + 0.1), reduction="none")
        self.last = losses.detach()
        return losses.mean() * (2.0 if losses.mean() > 1.6 else 1.0)


@pytest.mark.parametrize("passes", ["auto", 2])
def test_stateful_criterion(passes):
    """One update for each batch, by the dominant labels, also of what is kept on it."""

    class Classifier(Module):
        def training_step(self, batch, batch_idx):
            return self.loss(self.model(batch[0]), batch[1])

    module = Classifier(Branching())
    seen, _ = train(module, loader(), ManifoldMixupCallback(layers=["model.1"], seed=0, passes=passes))
    criterion = module.loss
    assert criterion.updates == 3
    assert len(criterion.bank) == 3
    frequency = torch.full((CLASSES,), 1.0 / CLASSES, dtype=torch.float64)
    for number, (draw, *_) in enumerate(seen):
        y = data()[1][8 * number : 8 * number + 8]
        dominant = y if draw.mix.lam >= 0.5 else y[draw.mix.partners]
        assert type(criterion.bank[number]) is torch.Tensor
        assert torch.equal(criterion.bank[number], dominant)
        frequency = 0.9 * frequency + 0.1 * torch.bincount(dominant, minlength=CLASSES).double() / 8
    torch.testing.assert_close(criterion.frequency, frequency)
    assert type(criterion.last) is torch.Tensor
    assert_formula(seen[0], lambda z, y: Branching()(z, y), 24)


METRICS = {
    "top 2": (lambda: MulticlassAccuracy(CLASSES, top_k=2), lambda z, y: (z, y)),
    "macro top 2": (lambda: MulticlassAccuracy(CLASSES, top_k=2, average="macro"), lambda z, y: (z, y)),
    "hinge": (BinaryHingeLoss, lambda z, y: (z[:, 0].sigmoid(), (y > 1).long())),
    "coverage": (lambda: MultilabelCoverageError(CLASSES), lambda z, y: (z, F.one_hot(y, CLASSES))),
    "confusion": (lambda: MulticlassConfusionMatrix(CLASSES, normalize="true"), lambda z, y: (z, y)),
}  # fmt: skip


@pytest.mark.parametrize("way", ["update", "forward", "list"])
@pytest.mark.parametrize("metric", METRICS)
def test_metrics_see_the_dominant_labels(metric, way):
    make, arguments = METRICS[metric]

    class Measured(Module):
        def __init__(self):
            super().__init__(F.cross_entropy)
            self.metric = [make()] if way == "list" else make()
            self.kept = []

        def training_step(self, batch, batch_idx):
            z = self.model(batch[0])
            called = self.metric[0] if way == "list" else self.metric
            (called if way == "forward" else called.update)(*arguments(z.detach(), batch[1]))
            self.kept.append(z.detach())
            return self.loss(z, batch[1])

    module = Measured()
    seen, _ = train(module, loader(), ManifoldMixupCallback(layers=["model.1"], seed=0))
    expected = make()
    for number, (draw, *_) in enumerate(seen):
        y = data()[1][8 * number : 8 * number + 8]
        dominant = y if draw.mix.lam >= 0.5 else y[draw.mix.partners]
        expected.update(*arguments(module.kept[number], dominant))
    got = module.metric[0] if way == "list" else module.metric
    torch.testing.assert_close(got.compute(), expected.compute())


class Augment(nn.Module):
    """A module without weights that is handed the labels and returns inputs, as kornia's and torchvision's are."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x, y):
        self.calls += 1
        return x * 1.5, y


def test_an_augmentation_is_no_criterion():
    class Augmented(Module):
        def __init__(self):
            super().__init__(F.cross_entropy)
            self.augment = Augment()

        def training_step(self, batch, batch_idx):
            x, y = self.augment(*batch)
            return self.loss(self.model(x), y)

    module = Augmented()
    seen, warned = train(module, loader(), ManifoldMixupCallback(layers=["input"], seed=0))
    assert module.augment.calls == 3
    assert not any("twice" in message for message in warned)
    draw, weights, value, _ = seen[0]
    twin = network()
    twin.load_state_dict({name.removeprefix("model."): v for name, v in weights.items()})
    (x, y), lam, partners = data(), draw.mix.lam.double(), draw.mix.partners
    x, y = x[:8], y[:8]
    z = twin(1.5 * (lam * x + (1 - lam) * x[partners]))
    expected = lam * F.cross_entropy(z, y) + (1 - lam) * F.cross_entropy(z, y[partners])
    torch.testing.assert_close(value, expected.detach())


def test_labels_that_no_loss_uses_under_manual_optimization():
    """Refused before the module's own optimizer has stepped."""
    module = Manual(lambda z, y: z.pow(2).mean())
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(MixingError, match=r"no loss with a gradient used the labels.*No weight has changed"):
        trainer(ManifoldMixupCallback(layers=["model.1"], seed=0)).fit(module, loader())
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)


def test_copies_in_a_fit_never_mix():
    copies = []

    class Copies(Counting):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            copies.append(copy.deepcopy(self.model))
            return loss

    module = Copies()
    trainer(ManifoldMixupCallback(layers=["model.1"], seed=0)).fit(module, loader())
    x = data()[0]
    torch.testing.assert_close(copies[0](x), copies[0][4](copies[0][:4](x)), rtol=0, atol=0)
