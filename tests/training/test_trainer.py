"""Every way Lightning trains: the numbers are those of a loop written by hand, and nothing is left behind."""

import copy
import csv
import functools
import logging
import pickle
import warnings

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset

from lightning_manifold_mixup import ManifoldMixupCallback, MixingError
from tests.helpers import (
    CLASSES,
    LAYERS,
    Classifier,
    ConvNet,
    Draws,
    Validated,
    assert_untouched,
    images,
    loader,
    trainer,
    weights_of,
)


def train(module, *, seed=3, layers=LAYERS, batches=None, callbacks=(), **kwargs):
    callback = ManifoldMixupCallback(layers=layers, seed=seed)
    draws = Draws(callback)
    trainer(callback, draws, *callbacks, **kwargs).fit(module, loader() if batches is None else batches)
    return draws.drawn


def mixed_loss_by_hand(net, batch, draw):
    """The loss of one batch, from its definition."""
    (x, y), (layer, lam, partners) = batch, draw
    before, after = net.states(x)[layer]
    h = before(x)
    logits = after(lam * h + (1 - lam) * h[partners])
    return lam * F.cross_entropy(logits, y) + (1 - lam) * F.cross_entropy(logits, y[partners])


class Checkpointed(nn.Module):
    """ConvNet with activation checkpointing around layer1, and inside layer2."""

    def __init__(self, net, reentrant):
        super().__init__()
        self.net, self.reentrant = net, reentrant

    def forward(self, x):
        net, run = self.net, functools.partial(checkpoint, use_reentrant=self.reentrant)
        h = run(net.layer1, net.conv1(x))
        for part in net.layer2:
            h = run(part, h) if not isinstance(part, nn.BatchNorm2d) else part(h)
        return net.fc(h.mean((2, 3)))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("layer", ["net.layer1", "net.layer1.0", "net.layer2.0", "net.layer2.2"])
def test_activation_checkpointing(reentrant, layer):
    plain, checkpointed = Classifier(), Classifier()
    checkpointed.load_state_dict(plain.state_dict())
    checkpointed.model = Checkpointed(checkpointed.model, reentrant)
    train(checkpointed, layers=[f"model.{layer}"], max_epochs=2)
    train(plain, layers=[f"model.{layer.removeprefix('net.')}"], max_epochs=2)
    torch.testing.assert_close(checkpointed.losses, plain.losses)
    torch.testing.assert_close(weights_of(checkpointed.model.net), weights_of(plain.model))


def test_gradient_accumulation():
    module = Classifier()
    net = copy.deepcopy(module.model)
    drawn = train(module, accumulate_grad_batches=3)
    assert len({lam.item() for _, lam, _ in drawn}) == 3
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for batch, draw in zip(loader(), drawn, strict=True):
        (mixed_loss_by_hand(net, batch, draw) / 3).backward()
    optimizer.step()
    torch.testing.assert_close(weights_of(module.model), weights_of(net))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precision(precision):
    class Notes(Classifier):
        def training_step(self, batch, batch_idx):
            self.handles = [m.register_forward_hook(self.note) for m in (self.model.layer1, self.model.layer2)]
            loss = super().training_step(batch, batch_idx)
            [handle.remove() for handle in self.handles]
            return loss

        def note(self, module, args, output):
            self.dtypes.add(output.dtype)

    module, reference = Notes(), Classifier()
    module.dtypes = set()
    reference.load_state_dict(module.state_dict())
    train(module, precision=precision, max_epochs=2)
    train(reference, max_epochs=2)
    assert module.dtypes == {torch.float64 if precision == "64-true" else torch.bfloat16}
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if precision == "64-true" else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(torch.tensor(module.losses).float(), torch.tensor(reference.losses), **tolerance)


class TestOptimization:
    def test_manual(self):
        class Manual(Classifier):
            automatic_optimization = False

            def training_step(self, batch, batch_idx):
                x, y = batch
                for optimizer in self.optimizers():
                    loss = F.cross_entropy(self(x), y)
                    self.losses.append(loss.item())
                    optimizer.zero_grad()
                    self.manual_backward(loss)
                    optimizer.step()

            def configure_optimizers(self):
                trunk = [*self.model.conv1.parameters(), *self.model.layer1.parameters()]
                return [torch.optim.SGD(trunk, 0.1), torch.optim.SGD(self.model.fc.parameters(), 0.2)]

        module = Manual()
        net = copy.deepcopy(module.model)
        drawn = train(module)
        optimizers = [
            torch.optim.SGD([*net.conv1.parameters(), *net.layer1.parameters()], 0.1),
            torch.optim.SGD(net.fc.parameters(), 0.2),
        ]
        losses = []
        for batch, draw in zip(loader(), drawn, strict=True):  # both forwards of a batch are mixed the same
            for optimizer in optimizers:
                loss = mixed_loss_by_hand(net, batch, draw)
                net.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        assert module.losses == pytest.approx(losses, rel=1e-5)
        torch.testing.assert_close(weights_of(module.model), weights_of(net))

    def test_manual_half_a_promise_is_an_error_before_the_step(self):
        class Unmixed(Classifier):
            automatic_optimization = False

            def training_step(self, batch, batch_idx):
                x, y = batch
                with torch.no_grad():
                    h = self.model.layer1(self.model.conv1(x)) if batch_idx else None
                logits = self(x) if h is None else self.model.fc(self.model.layer2(h).mean((2, 3)))
                loss = F.cross_entropy(logits, y)
                self.before = weights_of(self.model.fc)
                self.manual_backward(loss)
                self.optimizers().step()

        module = Unmixed()
        with pytest.raises(MixingError, match=r"layer 'model.layer1'.*only under torch.no_grad"):
            train(module, layers=["model.layer1"])
        torch.testing.assert_close(weights_of(module.model.fc), module.before, rtol=0, atol=0)

    def test_lbfgs(self):
        class Closure(Classifier):
            def configure_optimizers(self):
                return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)

        module = Closure(nn.Sequential(nn.Flatten(), nn.Linear(108, 5), nn.Tanh(), nn.Linear(5, CLASSES)))
        net = copy.deepcopy(module.model)
        drawn = train(module, layers=["model.1"])
        optimizer = torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=4)
        for (x, y), (_, lam, partners) in zip(loader(), drawn, strict=True):

            def closure(x=x, y=y, lam=lam, partners=partners):
                optimizer.zero_grad()
                h = net[1](net[0](x))
                logits = net[3](net[2](lam * h + (1 - lam) * h[partners]))
                loss = lam * F.cross_entropy(logits, y) + (1 - lam) * F.cross_entropy(logits, y[partners])
                loss.backward()
                return loss

            optimizer.step(closure)
        assert len(module.losses) > 3 * 2  # several evaluations of each batch
        torch.testing.assert_close(weights_of(module.model), weights_of(net))

    def test_auxiliary_heads(self):
        class Aux(Classifier):
            def __init__(self):
                super().__init__()
                self.aux = nn.Linear(8, CLASSES)

            def training_step(self, batch, batch_idx):
                x, y = batch
                h = self.model.layer1(self.model.conv1(x))
                logits = self.model.fc(self.model.layer2(h).mean((2, 3)))
                losses = {"main": F.cross_entropy(logits, y), "aux": F.cross_entropy(self.aux(h.mean((2, 3))), y)}
                self.log_dict(losses)
                return {"loss": losses["main"] + 0.3 * losses["aux"], "y": y}

            def on_train_batch_end(self, outputs, batch, batch_idx):
                self.outputs = outputs

        module = Aux()
        reference = copy.deepcopy(module)
        [(_, lam, partners)] = train(module, layers=["model.layer1"], batches=loader(8))
        x, y = images(8)
        h = reference.model.layer1(reference.model.conv1(x))
        h = lam * h + (1 - lam) * h[partners]
        heads = reference.model.fc(reference.model.layer2(h).mean((2, 3))), reference.aux(h.mean((2, 3)))
        main, aux = (lam * F.cross_entropy(z, y) + (1 - lam) * F.cross_entropy(z, y[partners]) for z in heads)
        torch.testing.assert_close(module.outputs["loss"], (main + 0.3 * aux).detach())
        assert type(module.outputs["loss"]) is type(module.outputs["y"]) is torch.Tensor


class TestResume:
    class Crashes(L.Callback):
        def __init__(self, step):
            self.step = step

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == self.step:
                raise ConnectionError

    @pytest.mark.filterwarnings("ignore:The dirpath has changed")
    @pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
    @pytest.mark.parametrize(("layers", "crash"), [("auto", 4), (LAYERS, 6)])
    def test_equals_the_uninterrupted_run_bit_for_bit(self, tmp_path, layers, crash):
        """Three batches an epoch; the last checkpoint is that of step 3, between two epochs, or 5, in mid epoch.

        All batches are the same one: in mid epoch, Lightning starts the data of a plain loader from the front.
        """
        batches = DataLoader([images(8)] * 3, batch_size=None)

        def run(directory, *more, ckpt_path=None, module=None):
            callback = ManifoldMixupCallback(layers=layers)
            draws = Draws(callback)
            saving = ModelCheckpoint(directory, save_top_k=-1, every_n_train_steps=1)
            t = trainer(callback, draws, saving, *more, max_epochs=3, enable_checkpointing=True)
            t.fit(module, batches, ckpt_path=ckpt_path)
            return draws.drawn, callback

        L.seed_everything(1)
        whole, part, resumed = (Classifier() for _ in range(3))
        part.load_state_dict(whole.state_dict())
        drawn, _ = run(tmp_path / "whole", module=whole)
        with pytest.raises(ConnectionError):
            run(tmp_path / "part", self.Crashes(crash), module=part)
        assert_untouched(part)
        saved = max((tmp_path / "part").glob("*.ckpt"), key=lambda p: int(p.stem.rpartition("=")[2]))
        again, _ = run(tmp_path / "again", module=resumed, ckpt_path=saved)
        steps = torch.load(saved, weights_only=False)["global_step"]
        assert [(d[0], d[1].item(), d[2].tolist()) for d in again] == [
            (d[0], d[1].item(), d[2].tolist()) for d in drawn[steps:]
        ]  # and with layers="auto" no second batch is spent on observing
        assert all(layer is not None for layer, _, _ in again)
        torch.testing.assert_close(weights_of(resumed), weights_of(whole), rtol=0, atol=0)


class TestNothingIsLeft:
    @pytest.mark.parametrize(("error", "layers"), [(ZeroDivisionError, "auto"), (KeyboardInterrupt, LAYERS)])
    def test_after_an_exception(self, error, layers):
        class Fails(Classifier):
            def training_step(self, batch, batch_idx):
                if self.fail and batch_idx == self.fail:
                    raise error
                return super().training_step(batch, batch_idx)

        for step in (0.0, 1):  # 0.0: not at all
            module = Fails()
            module.fail = step
            before = set(vars(module))
            try:
                train(module, layers=layers)
            except (ZeroDivisionError, KeyboardInterrupt, SystemExit):
                assert step
            assert_untouched(module)
            assert set(vars(module)) - before <= {"forward", "_hparams"}  # Lightning's own
            module.fail = 0.0
            train(module, layers=layers)  # fit can be called again
            assert_untouched(module)

    def test_during_validation(self):
        class Spy(L.Callback):
            def on_validation_start(self, trainer, pl_module):
                assert "training_step" not in vars(pl_module)

        module = Validated()
        callback = ManifoldMixupCallback(layers=LAYERS)
        trainer(callback, Spy(), val_check_interval=1, max_epochs=2, num_sanity_val_steps=2).fit(
            module, loader(), loader()
        )
        assert_untouched(module)

    def test_another_network_is_observed_anew(self):
        callback = ManifoldMixupCallback(layers="auto")
        trainer(callback).fit(Classifier(), loader())
        assert callback.layers_ == ["input", "model.conv1", "model.layer1"]
        flat = nn.Sequential(nn.Flatten(), nn.Linear(108, 5), nn.ReLU(), nn.Linear(5, CLASSES))
        trainer(callback).fit(Classifier(flat), loader())
        assert callback.layers_ == ["input", "model.2"]

    def test_two_fits_and_two_trainers(self):
        callback = ManifoldMixupCallback(layers=LAYERS, seed=1)
        for _ in range(2):
            for t in (trainer(callback), trainer(callback, max_epochs=2)):
                module = Classifier()
                t.fit(module, loader())
                assert_untouched(module)


class TestCopies:
    def test_copies_in_mid_step_run_their_own_weights_and_do_not_mix(self):
        class Copies(Classifier):
            def training_step(self, batch, batch_idx):
                if batch_idx:  # the first batch is observed
                    self.copies = copy.deepcopy(self), pickle.loads(pickle.dumps(self.model)), AveragedModel(self.model)
                return super().training_step(batch, batch_idx)

        module = Copies()
        callback = ManifoldMixupCallback(layers=["model.layer1"])
        x, _ = images(8)

        class Deep(Copies):
            def training_step(self, batch, batch_idx):
                trainer, self._trainer = self._trainer, None  # a Trainer holds generators, which have no copy
                try:
                    return super().training_step(batch, batch_idx)
                finally:
                    self._trainer = trainer

        module = Deep()
        module.log = lambda *args, **kwargs: None
        trainer(callback).fit(module, loader(16))
        whole, pickled, averaged = module.copies
        for net in (whole.model, pickled, averaged.module):
            with torch.no_grad():
                for p in net.parameters():
                    p.zero_()
            assert torch.equal(net(x), torch.zeros(8, CLASSES))  # its own weights
        whole.load_state_dict(module.state_dict())
        whole.train(), module.train()
        assert type(whole).training_step.__get__(whole) == whole.training_step
        torch.testing.assert_close(whole(x), module(x))  # not mixed

    @pytest.mark.parametrize(
        "averaging", ["ema", "swa"] if hasattr(lightning_callbacks, "WeightAveraging") else ["swa"]
    )
    def test_averaging_callbacks(self, averaging):
        if averaging == "ema":
            extra = lightning_callbacks.WeightAveraging(multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
        else:
            extra = StochasticWeightAveraging(0.1, swa_epoch_start=1)
        module = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(108, 6), nn.ReLU(), nn.Linear(6, CLASSES)))
        net = copy.deepcopy(module.model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            drawn = train(module, layers=["model.2"], callbacks=[extra], max_epochs=2)
        assert_untouched(module)
        if averaging == "swa":
            return
        average = [p.detach().clone() for p in net.parameters()]
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        for index, ((x, y), (_, lam, partners)) in enumerate(zip([*loader(), *loader()], drawn, strict=True)):
            h = net[:3](x)
            logits = net[3](lam * h + (1 - lam) * h[partners])
            loss = lam * F.cross_entropy(logits, y) + (1 - lam) * F.cross_entropy(logits, y[partners])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            for a, p in zip(average, net.parameters(), strict=True):
                a.copy_(p.detach() if index == 0 else 0.5 * a + 0.5 * p.detach())
        torch.testing.assert_close([p.detach() for p in module.model.parameters()], average)


class TestLoops:
    @pytest.mark.parametrize(
        "options",
        [
            {"overfit_batches": 2},
            {"fast_dev_run": True},
            {"limit_train_batches": 2},
            {"max_steps": 4, "max_epochs": -1},
            {"reload_dataloaders_every_n_epochs": 1, "max_epochs": 3},
        ],
        ids=str,
    )
    def test_options(self, options):
        module = Classifier()
        net = copy.deepcopy(module.model)
        drawn = train(module, **options)
        assert drawn
        assert all(draw is not None for draw in drawn)
        batches = list(loader())
        if "overfit_batches" in options or "limit_train_batches" in options:
            batches = batches[:2]
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        for index, draw in enumerate(drawn):
            loss = mixed_loss_by_hand(net, batches[index % len(batches)], draw)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        torch.testing.assert_close(weights_of(module.model), weights_of(net))

    def test_iterable_dataset(self):
        class Stream(IterableDataset):
            def __iter__(self):
                return iter(zip(*images(10), strict=True))

        assert [len(partners) for _, _, partners in train(Classifier(), batches=DataLoader(Stream(), 4))] == [
            4,
            4,
            2,
        ]

    def test_combined_loader(self):
        class Combined(Classifier):
            def training_step(self, batch, batch_idx):
                assert type(batch["b"][1]) is torch.Tensor
                return super().training_step(batch["a"], batch_idx)

        callback = ManifoldMixupCallback(layers=LAYERS, input_key="a.0", target_key="a.1", seed=3)
        module, reference = Combined(), Classifier()
        reference.load_state_dict(module.state_dict())
        trainer(callback).fit(module, CombinedLoader({"a": loader(), "b": loader(batch_size=5)}, "min_size"))
        train(reference)
        assert module.losses == reference.losses

    def test_tuner(self, tmp_path):
        module = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(108, CLASSES)))
        module.batch_size = 2

        class Data(L.LightningDataModule):
            batch_size = 2

            def train_dataloader(self):
                return loader(64, self.batch_size)

        callback = ManifoldMixupCallback(layers=["input"])
        t = trainer(callback, default_root_dir=tmp_path, enable_checkpointing=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Tuner(t).scale_batch_size(module, datamodule=Data(), max_trials=2, steps_per_trial=1)
            assert Tuner(t).lr_find(module, datamodule=Data(), num_training=6).suggestion is not None
        assert_untouched(module)


class TestLogging:
    def test_lam_layer_and_loss_per_layer(self, tmp_path):
        module = Classifier()
        callback = ManifoldMixupCallback(layers=LAYERS, seed=3, log_mixing=True)
        logger = CSVLogger(tmp_path)
        notes = Draws(callback)
        trainer(callback, notes, logger=logger, log_every_n_steps=1, max_epochs=2).fit(module, loader())
        with open(logger.experiment.metrics_file_path) as file:
            rows = [row for row in csv.DictReader(file) if row["manifold_mixup/lam"]]
        draws = notes.drawn
        assert [float(row["manifold_mixup/lam"]) for row in rows] == pytest.approx([lam.item() for _, lam, _ in draws])
        assert [float(row["manifold_mixup/layer"]) for row in rows] == [LAYERS.index(layer) for layer, _, _ in draws]
        losses = [float(row[f"manifold_mixup/loss/{layer}"]) for row, (layer, _, _) in zip(rows, draws, strict=True)]
        assert losses == pytest.approx(module.losses)

    def test_tensorboard(self, tmp_path):
        events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        callback = ManifoldMixupCallback(layers=LAYERS, seed=3, log_mixing=True)
        notes, logger = Draws(callback), TensorBoardLogger(tmp_path)
        trainer(callback, notes, logger=logger, log_every_n_steps=1, max_epochs=2).fit(Classifier(), loader())
        scalars = events.EventAccumulator(logger.log_dir).Reload()
        logged = [event.value for event in scalars.Scalars("manifold_mixup/lam")]
        assert logged == pytest.approx([lam.item() for _, lam, _ in notes.drawn])
        assert {f"manifold_mixup/loss/{layer}" for layer, _, _ in notes.drawn} <= set(scalars.Tags()["scalars"])

    def test_says_when_only_the_input_is_left(self):
        module = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(108, CLASSES)))
        with pytest.warns(UserWarning, match="no eligible layer but the input, so this is input mixup"):
            drawn = train(module, layers="auto")
        assert {draw[0] for draw in drawn if draw} == {"input"}

    def test_silent_unless_asked(self):
        t = trainer(ManifoldMixupCallback(layers=LAYERS), log_every_n_steps=1)
        t.fit(Classifier(), loader())
        assert not [name for name in t.logged_metrics if name.startswith("manifold_mixup")]

    def test_says_which_layers_were_chosen(self, caplog):
        logging.getLogger("lightning.pytorch").propagate = True
        with caplog.at_level(logging.INFO, logger="lightning.pytorch"):  # commands make it quieter
            train(Classifier(), layers="auto")
        [message] = [r.message for r in caplog.records if "Manifold Mixup" in r.message]
        assert "S = {input, model.conv1, model.layer1}" in message
        assert message == "Manifold Mixup: alpha 2.0, S = {input, model.conv1, model.layer1} (auto), input 0, targets 1"


def test_configure_model():
    class Late(Classifier):
        def configure_model(self):
            if self.model is None:
                self.model = ConvNet()

    module = Late()
    net, module.model = module.model, None
    module.configure_model = lambda: setattr(module, "model", net) if module.model is None else None
    reference = copy.deepcopy(net)
    drawn = train(module)
    optimizer = torch.optim.SGD(reference.parameters(), 0.1)
    for batch, draw in zip(loader(), drawn, strict=True):
        loss = mixed_loss_by_hand(reference, batch, draw)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(weights_of(module.model), weights_of(reference))


def test_auto_observes_the_first_batch_and_mixes_the_others():
    module = Classifier()
    net = copy.deepcopy(module.model)
    drawn = train(module, layers="auto")
    assert [draw is None for draw in drawn] == [True, False, False]
    x, y = next(iter(loader()))
    torch.testing.assert_close(module.losses[0], F.cross_entropy(net(x), y).item(), rtol=0, atol=0)
