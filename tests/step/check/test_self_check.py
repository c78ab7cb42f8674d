"""When the oracles are asked, what they say, and that a training step is right whatever they can or cannot see."""

import copy
import itertools

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_manifold_mixup import ManifoldMixupCallback, MixingError
from lightning_manifold_mixup._step.check import proof
from lightning_manifold_mixup._step.check.proof import Proof
from tests.exactness import Module, assert_exact, by_hand, data, network, train
from tests.helpers import trainer


def loader(n=24, size=8):
    return DataLoader(TensorDataset(*data(n)), size)


@pytest.fixture
def checks(monkeypatch):
    """For each check: the number of batches mixed before it, and its layers."""
    seen = []
    original = Proof.check

    def check(self, trials, sites, permutations, draws, mixed, *args, **kwargs):
        seen.append((mixed, [site.layer for site in sites]))
        return original(self, trials, sites, permutations, draws, mixed, *args, **kwargs)

    monkeypatch.setattr(Proof, "check", check)
    return seen


# The resumed fit saves elsewhere.
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
class TestWhen:
    def test_every_layer_first_then_at_10_and_100(self, checks):
        callback = ManifoldMixupCallback(layers=["input", "model.1", "model.3"], seed=0)
        trainer(callback, max_steps=105, max_epochs=-1).fit(Module(F.cross_entropy), loader())
        assert checks[0] == (0, ["input", "model.1", "model.3"])
        assert [mixed for mixed, layers in checks[1:]] == [10, 100]
        assert all(len(layers) == 1 for _, layers in checks[1:])

    def test_both_oracles_at_10_and_in_turn_later(self, monkeypatch):
        asked = []
        for name in ("swap", "pair"):
            original = getattr(proof, name)

            def noted(*args, name=name, original=original):
                asked.append((module.global_step, name))
                return original(*args)

            monkeypatch.setattr(proof, name, noted)
        module = Module(F.cross_entropy)
        callback = ManifoldMixupCallback(layers=["model.1"], seed=0)
        trainer(callback, max_steps=105, max_epochs=-1).fit(module, loader())
        assert asked == [(0, "swap"), (0, "pair"), (10, "swap"), (10, "pair"), (100, "pair")]

    def test_a_leak_that_begins_later_in_a_graph_of_the_same_size(self, checks):
        class Later(Module):
            def training_step(self, batch, batch_idx):
                z, x = self.model(batch[0]), batch[0].sum(1)
                beside = torch.ones_like(x) if self.global_step < 5 else x
                return F.cross_entropy(z, batch[1]) + (z.sum(1) * beside).mean()

        module = Later(None)
        callback = ManifoldMixupCallback(layers=["model.1"], seed=0)
        with pytest.raises(MixingError, match="No weight has changed"):
            trainer(callback, max_epochs=5).fit(module, loader())
        assert [mixed for mixed, _ in checks] == [0, 10]
        assert module.global_step == 10

    def test_auto_on_the_observed_batch(self, checks):
        callback = ManifoldMixupCallback(seed=0)
        trainer(callback).fit(Module(F.cross_entropy), loader())
        assert checks == [(0, callback.layers_)] * len(checks)

    def test_again_in_a_resumed_fit(self, checks, tmp_path):
        saved = ModelCheckpoint(tmp_path, save_last=True)
        callback = ManifoldMixupCallback(layers=["input", "model.1"], seed=0)
        trainer(callback, saved, enable_checkpointing=True).fit(Module(F.cross_entropy), loader())
        del checks[:]
        callback = ManifoldMixupCallback(layers=["input", "model.1"], seed=0)
        path = str(tmp_path / "last.ckpt")
        trainer(
            callback, ModelCheckpoint(tmp_path / "again", save_last=True), enable_checkpointing=True, max_epochs=2
        ).fit(Module(F.cross_entropy), loader(), ckpt_path=path)
        assert checks[0] == (0, ["input", "model.1"])

    def test_when_the_structure_changes(self, checks):
        """An auxiliary loss that is switched on in epoch 1, and reads the input."""

        class Later(Module):
            def training_step(self, batch, batch_idx):
                z = self.model(batch[0])
                loss = F.cross_entropy(z, batch[1])
                return loss if self.current_epoch < 1 else loss + (z.sum(1) * batch[0].sum(1)).mean()

        callback = ManifoldMixupCallback(layers=["model.1"], seed=0)
        module = Later(None)
        with pytest.raises(MixingError, match="The loss also reads the input"):
            trainer(callback, max_epochs=2).fit(module, loader())
        assert [mixed for mixed, _ in checks] == [0, 4]
        assert module.global_step == 3

    def test_when_the_modes_change(self, checks):
        class Frozen(L.Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                pl_module.model[3].train(batch_idx < 1)

        module = Module(F.cross_entropy)
        module.model[3] = torch.nn.Dropout(0.0)  # asks for its mode, which Tanh does not
        callback = ManifoldMixupCallback(layers=["model.1"], seed=0)
        trainer(Frozen(), callback).fit(module, loader())
        assert [mixed for mixed, _ in checks] == [0, 2]

    def test_a_layer_that_runs_twice_from_the_second_batch_on(self, checks):
        class Again(Module):
            def training_step(self, batch, batch_idx):
                loss = F.cross_entropy(self.model(batch[0]), batch[1])
                return loss if batch_idx == 0 else loss + self.model(-batch[0]).pow(2).mean()

        trainer(ManifoldMixupCallback(layers=["model.1"], seed=0)).fit(Again(None), loader())
        assert [mixed for mixed, _ in checks] == [0, 2]

    def test_not_asked_for(self, checks, caplog):
        callback = ManifoldMixupCallback(layers=["model.1"], seed=0, self_check=False)
        with caplog.at_level("INFO"):
            trainer(callback).fit(Module(F.cross_entropy), loader())
        assert checks == []
        assert sum("self_check=False" in record.message for record in caplog.records) == 1


class TestPower:
    def test_zero_initialised_head(self, checks):
        """The swap oracle sees by the gradient of the head what the loss does not show."""

        def leak(z, y):
            return (F.cross_entropy(z, y, reduction="none") * torch.linspace(0, 1, len(y), dtype=z.dtype)).mean()

        model = network()
        nn.init.zeros_(model[4].weight)
        nn.init.zeros_(model[4].bias)
        with pytest.raises(MixingError, match="No weight has changed"):
            train(Module(leak, model), loader(), ManifoldMixupCallback(layers=["model.1"], seed=0))

    def test_a_constant_loss_is_checked_again(self, checks):
        """A loss multiplied by zero in the first batches: nothing shows; the step runs twice until something does."""

        class WarmUp(Module):
            def training_step(self, batch, batch_idx):
                z, y = self.model(batch[0]), batch[1]
                late = float(self.global_step >= 2)
                keep = [i for i, label in enumerate(y.tolist()) if label != 2]  # no superposition follows
                return F.cross_entropy(z[keep], y[keep]) * late

        module = WarmUp(None)
        callback = ManifoldMixupCallback(layers=["model.1"], seed=0)
        seen, warned = train(module, loader(40), callback)
        assert [mixed for mixed, _ in checks][:3] == [0, 1, 3]
        assert sum("twice" in message for message in warned) == 1
        x, y = data(40)
        for number in range(2, 5):  # exact before and after the check that found it
            draw, weights, value, _ = seen[number]
            twin = network()
            twin.load_state_dict({name.removeprefix("model."): v for name, v in weights.items()})
            rows, lam, partners = slice(8 * number, 8 * number + 8), draw.mix.lam.double(), draw.mix.partners
            h = twin[:2](x[rows])
            z = twin[2:](lam * h + (1 - lam) * h[partners])
            expected = sum(
                weight * F.cross_entropy(z[labels != 2], labels[labels != 2])
                for weight, labels in ((lam, y[rows]), (1 - lam, y[rows][partners]))
            )
            torch.testing.assert_close(value, expected.detach())

    @pytest.mark.parametrize("room", range(1, 6))  # the first run observes the layers, as large as one of training
    def test_too_little_memory_for_the_oracles(self, caplog, room):
        """After any of their runs, which may need more than those of training: one line, and it trains as without."""
        runs = itertools.count()

        class Large(Module):
            def training_step(self, batch, batch_idx):
                if self is not module and next(runs) >= room:  # a ghost
                    raise torch.OutOfMemoryError("CUDA out of memory")
                return super().training_step(batch, batch_idx)

        weights = []
        for kind, options in ((Large, {}), (Module, {"self_check": False})):
            module = kind(F.cross_entropy)
            with caplog.at_level("INFO"):
                trainer(ManifoldMixupCallback(layers=["model.1"], seed=0, **options)).fit(module, loader())
            weights.append(module.state_dict())
        torch.testing.assert_close(*weights)
        assert sum("has no verdict" in record.message for record in caplog.records) >= 1

    def test_augmentation_inside_the_step(self, caplog):
        """The plain loss changes with the random numbers: one line, and it trains."""

        class Augmented(Module):
            def training_step(self, batch, batch_idx):
                x = batch[0] * (1 + 0.5 * torch.rand(len(batch[0]), 1, dtype=torch.float64))
                return F.cross_entropy(self.model(x), batch[1])

        module = Augmented(None)
        with caplog.at_level("INFO"):
            trainer(ManifoldMixupCallback(layers=["input"], seed=0), max_epochs=2).fit(module, loader())
        assert sum("the swap oracle has no verdict" in record.message for record in caplog.records) == 1
        assert module.global_step == 6


def numpy_loss(z, y):
    weight = torch.as_tensor(1.0 + y.numpy())
    return (F.cross_entropy(z, y, reduction="none") * weight).mean()


def under_autocast(z, y):
    assert torch.is_autocast_enabled("cpu")
    return F.cross_entropy(z, y)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
class TestPasses:
    @pytest.mark.parametrize("passes", ["auto", 2])
    def test_resumes_as_it_was(self, tmp_path, passes):
        """Crash and resume: the same weights as without, and the number of passes as it was."""
        weights = []
        for crash in (False, True):
            torch.manual_seed(0)
            module = Module(numpy_loss)
            saved = ModelCheckpoint(tmp_path / str(crash), save_last=True)
            callback = ManifoldMixupCallback(layers=["input", "model.1"], seed=0, passes=passes)
            epochs = 1 if crash else 2
            with pytest.warns(UserWarning, match="twice") if passes == "auto" else _nothing():
                trainer(callback, saved, enable_checkpointing=True, max_epochs=epochs).fit(module, loader())
            assert callback.state_dict()["passes"] == 2
            if crash:
                module = Module(numpy_loss)
                callback = ManifoldMixupCallback(layers=["input", "model.1"], seed=0, passes=passes)
                again = ModelCheckpoint(tmp_path / "again")
                trainer(callback, again, enable_checkpointing=True, max_epochs=2).fit(
                    module, loader(), ckpt_path=str(tmp_path / "True" / "last.ckpt")
                )
                assert callback.state_dict()["passes"] == 2
            weights.append(module.state_dict())
        torch.testing.assert_close(*weights, rtol=0, atol=0)

    def test_one_is_refused_before_any_weight_has_changed(self):
        module = Module(numpy_loss)
        before = copy.deepcopy(module.state_dict())
        with pytest.raises(MixingError, match=r"`passes=1`.*No weight has changed"):
            trainer(ManifoldMixupCallback(layers=["model.1"], passes=1, seed=0)).fit(module, loader())
        torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)


class _nothing:
    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return None


def formula(module, loss, k, seen, x_y, number):
    """Loss and gradients of batch ``number`` of eight samples, by the draw and the weights that were ``seen``."""

    def step(twin, batch, choose, mix):
        x, labels = batch
        lam, partners = seen[0].mix.lam.to(x.dtype), seen[0].mix.partners
        h = twin.model[:k](x)
        h = lam.to(h.dtype) * h + (1 - lam.to(h.dtype)) * h[partners] if h.dtype is x.dtype else mix(h).to(h.dtype)
        return loss(twin.model[k:](h), choose(labels))

    rows = slice(8 * number, 8 * number + 8)
    return by_hand(module, step, tuple(part[rows] for part in x_y), seen[0], seen[1])


class TestHowItTrains:
    """The same formula under accumulation, mixed precision, LBFGS, checkpointing."""

    @pytest.mark.parametrize("loss", [F.cross_entropy, numpy_loss], ids=["one pass", "two passes"])
    @pytest.mark.parametrize(("layer", "k"), [("model.1", 2), ("input", 0)])
    def test_accumulation(self, loss, layer, k):
        """Two batches to a step of the optimizer: their gradients add up, and the second check falls between them."""
        module = Module(loss)
        seen, warned = train(
            module, loader(96), ManifoldMixupCallback(layers=[layer], seed=0), accumulate_grad_batches=2
        )
        assert sum("twice" in message for message in warned) == (loss is numpy_loss)
        wanted = [formula(module, loss, k, seen[i], data(96), i) for i in range(12)]
        for i in range(0, 12, 2):
            (value, gradients), (later, more) = wanted[i], wanted[i + 1]
            torch.testing.assert_close(seen[i][2] * 2, value)  # Lightning divides the loss
            torch.testing.assert_close(seen[i + 1][2] * 2, later)
            for name, gradient in seen[i + 1][3].items():
                torch.testing.assert_close(gradient, (gradients[name] + more[name]) / 2)

    @pytest.mark.parametrize("loss", [F.cross_entropy, numpy_loss], ids=["one pass", "two passes"])
    def test_lbfgs(self, loss):
        class Closures(Module):
            def configure_optimizers(self):
                return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)

        module = Closures(loss)
        callback = ManifoldMixupCallback(layers=["model.1"], seed=0)
        seen, warned = train(module, loader(), callback)
        assert len(seen) > 3  # several evaluations of one batch
        assert sum("twice" in message for message in warned) == (loss is numpy_loss)
        x, y = data()
        draw, weights, value, _ = seen[0]
        twin = network()
        twin.load_state_dict({name.removeprefix("model."): v for name, v in weights.items()})
        lam, partners = draw.mix.lam.double(), draw.mix.partners
        h = twin[:2](x[:8])
        z = twin[2:](lam * h + (1 - lam) * h[partners])
        torch.testing.assert_close(value, (lam * loss(z, y[:8]) + (1 - lam) * loss(z, y[:8][partners])).detach())

    @pytest.mark.parametrize("loss", [F.cross_entropy, numpy_loss], ids=["one pass", "two passes"])
    @pytest.mark.parametrize(("layer", "k"), [("model.1", 2), ("input", 0)])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_mixed_precision(self, loss, layer, k, dtype):
        """Value and gradient of the formula under the same autocast, to the accuracy of the dtype."""

        def step(z, y):
            assert z.dtype is dtype
            return loss(z.float(), y)

        class Cast(Module):
            def training_step(self, batch, batch_idx):
                with torch.autocast("cpu", dtype):
                    return super().training_step(batch, batch_idx)

        module = Cast(step, network().float())
        x, y = data(96)
        batches = DataLoader(TensorDataset(x.float(), y), 8)
        callback = ManifoldMixupCallback(layers=[layer], seed=0)
        # For float16 the Trainer wants a scaler, that is a GPU; autocast alone runs anywhere.
        how = {"precision": "bf16-mixed"} if dtype is torch.bfloat16 else {}
        seen, warned = train(module, batches, callback, **how)
        assert sum("twice" in message for message in warned) == (loss is numpy_loss)
        for i, each in enumerate(seen):
            with torch.autocast("cpu", dtype):
                value, gradients = formula(module, step, k, each, (x.float(), y), i)
            # In halves, the hook rounds the mixed state once, and the formula by hand several times.
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(each[2].double(), value.double(), rtol=eps / 4, atol=0)
            for name, gradient in gradients.items():
                torch.testing.assert_close(
                    each[3][name], gradient.float(), rtol=0.05, atol=8 * eps * gradient.norm().item()
                )

    @pytest.mark.parametrize("how", ["bf16-mixed", "bf16-true", "bf16 in the step", "fp16 in the step"])
    def test_coarse_arithmetic_costs_no_second_pass(self, how):
        """The oracles have power there, too: between their checks, a step runs once."""
        dtype = torch.float16 if "fp16" in how else torch.bfloat16
        calls, counted = [], []

        class Coarse(Module):
            def training_step(self, batch, batch_idx):
                calls.append(batch_idx)
                with torch.autocast("cpu", dtype, enabled="step" in how):
                    return F.cross_entropy(self.model(batch[0]).float(), batch[1])

        class Count(L.Callback):
            def on_train_batch_end(self, *args):
                counted.append(len(calls))

        x, y = data(96)
        batches = DataLoader(TensorDataset(x.float(), y), 8)
        precision = {} if "step" in how else {"precision": how}
        callback = ManifoldMixupCallback(layers=["input", "model.1"], seed=0)
        trainer(callback, Count(), **precision).fit(Coarse(None, network().float()), batches)
        assert [b - a for a, b in itertools.pairwise(counted[:10])] == [1] * 9

    @pytest.mark.parametrize(
        ("loss", "passes"),
        [(F.cross_entropy, 1), (numpy_loss, 2), (under_autocast, 2)],
        ids=["one pass", "two passes", "cannot be told"],
    )
    def test_half_precision_that_is_rounded_otherwise_in_each_run(self, loss, passes):
        """As on a GPU, whose sums may be taken in another order: it is no mistake, and does not hide one.

        Where a step does not run without autocast, nobody can tell, and it runs twice.
        """
        runs = itertools.count()

        class Rounded(nn.Module):
            def forward(self, h):
                return h * (1 + 0.04 * (next(runs) % 2)) if torch.is_autocast_enabled("cpu") else h

        class Count(L.Callback):
            def on_train_batch_end(self, *args):
                counted.append(next(runs))

        module = Module(lambda z, y: loss(z.float(), y), nn.Sequential(*network().float(), Rounded()))
        x, y = data(96)
        callback, counted = ManifoldMixupCallback(layers=["input", "model.1"], seed=0), []
        batches = DataLoader(TensorDataset(x.float(), y), 8)
        _, warned = train(module, batches, callback, callbacks=[Count()], precision="bf16-mixed")
        assert sum("twice" in message for message in warned) == passes - 1
        assert [b - a - 1 for a, b in itertools.pairwise(counted[:10])] == [passes] * 9

    @pytest.mark.parametrize("needs", ["nothing", "training mode", "training mode and autocast"])
    def test_a_small_leak_is_no_rounding(self, needs):
        """The swap oracle asks in full precision where it can; otherwise a leak must be larger than the rounding."""

        class Leaks(Module):
            def training_step(self, batch, batch_idx):
                assert self.training or needs == "nothing"
                assert torch.is_autocast_enabled("cpu") or "autocast" not in needs
                z, y = self.model(batch[0]).float(), batch[1]
                share = torch.linspace(0.99, 1.01, len(y)) if "autocast" not in needs else torch.linspace(0, 2, len(y))
                return (F.cross_entropy(z, y, reduction="none") * share).mean()

        x, y = data(96)
        batches = DataLoader(TensorDataset(x.float(), y), 8)
        with pytest.raises(MixingError, match="permuted alike, the loss changes"):
            train(
                Leaks(None, network().float()), batches, ManifoldMixupCallback(layers=["input"], seed=0),
                precision="bf16-mixed",
            )  # fmt: skip

    @pytest.mark.parametrize("reentrant", [True, False])
    @pytest.mark.parametrize("loss", [F.cross_entropy, numpy_loss], ids=["one pass", "two passes"])
    def test_checkpointing(self, loss, reentrant):
        class Checkpointed(nn.Sequential):
            def forward(self, x):
                x = x if x.requires_grad else x.clone().requires_grad_()
                run = super().forward
                return torch.utils.checkpoint.checkpoint(run, x, use_reentrant=reentrant)

        assert_exact(loss, model=Checkpointed(*network()))


class TestManual:
    def test_gan_with_two_optimizers(self):
        """Two losses, two steps; the oracles see both, and neither optimizer has stepped in a check."""

        class Gan(L.LightningModule):
            def __init__(self, wrong=False):
                super().__init__()
                self.automatic_optimization = False
                self.model, self.generator, self.wrong = network(), nn.Linear(3, 6).double(), wrong
                self.losses = []

            def training_step(self, batch, batch_idx):
                x, y = batch
                first, second = self.optimizers()
                noise = torch.linspace(0, 1, 3 * len(x), dtype=torch.float64).view(-1, 3)
                loss = (numpy_loss if self.wrong else F.cross_entropy)(self.model(x), y)
                first.zero_grad()
                self.manual_backward(loss)
                first.step()
                second.zero_grad()
                fake = self.model.requires_grad_(False)(self.generator(noise)).logsumexp(1).mean() * 0.1
                self.manual_backward(fake)
                second.step()
                self.model.requires_grad_(True)

            def configure_optimizers(self):
                return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.model, self.generator)]

        module = Gan()
        trainer(ManifoldMixupCallback(layers=["input"], seed=0)).fit(module, loader())
        assert module.trainer.global_step == 6
        module = Gan(wrong=True)
        before = copy.deepcopy(module.state_dict())
        with pytest.raises(MixingError, match="Under manual optimization it cannot run once for each labelling"):
            trainer(ManifoldMixupCallback(layers=["input"], seed=0)).fit(module, loader())
        torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
