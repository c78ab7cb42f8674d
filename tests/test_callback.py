import collections
import copy
import dataclasses
import inspect

import lightning as L
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import Accuracy, MetricCollection

from lightning_manifold_mixup import AlphaSchedule, ManifoldMixupCallback, MixedTarget, MixingError
from lightning_manifold_mixup._step.labels.targets import plain
from lightning_manifold_mixup.paper.models import PreActResNet
from tests.exactness import train
from tests.helpers import (
    CLASSES,
    LAYERS,
    Classifier,
    ConvNet,
    Draws,
    assert_untouched,
    images,
    loader,
    trainer,
    weights_of,
)


def mixed_by_hand(h, lam, partners):
    return lam * h + (1 - lam) * h[partners]


def fit(module, callback, batches=None, **kwargs):
    draws = Draws(callback)
    trainer(callback, draws, **kwargs).fit(module, batches or loader())
    return draws.drawn


class TestExactness:
    """Against a loop written by hand, with the same k, lam and permutation."""

    @pytest.mark.parametrize("layer", ["input", "model.layer1", "model.layer2"])
    def test_preact_resnet_one_step(self, layer):
        net = PreActResNet(18, num_classes=CLASSES, initial_channels=4)
        ours, reference = Classifier(copy.deepcopy(net)), net
        [(name, lam, partners)] = fit(ours, ManifoldMixupCallback(layers=[layer], seed=1), loader(8))
        assert name == layer

        x, y = images(8)
        h = mixed_by_hand(x, lam, partners) if layer == "input" else x
        h = reference.conv1(h)
        for stage in ("layer1", "layer2", "layer3", "layer4"):
            h = getattr(reference, stage)(h)
            if layer == f"model.{stage}":
                h = mixed_by_hand(h, lam, partners)
        logits = reference.linear(F.adaptive_avg_pool2d(h, 1).flatten(1))
        loss = lam * F.cross_entropy(logits, y) + (1 - lam) * F.cross_entropy(logits, y[partners])
        optimizer = torch.optim.SGD(reference.parameters(), 0.1)
        loss.backward()
        optimizer.step()

        assert ours.losses[0] == pytest.approx(loss.item(), rel=1e-6)
        torch.testing.assert_close(weights_of(ours.model), weights_of(reference))

    def test_several_epochs(self):
        ours = Classifier(lr=0.5)
        reference = copy.deepcopy(ours.model)
        drawn = fit(ours, ManifoldMixupCallback(layers=LAYERS, seed=2), max_epochs=4)
        assert {layer for layer, _, _ in drawn} == set(LAYERS)

        optimizer = torch.optim.SGD(reference.parameters(), 0.5)
        for (layer, lam, partners), (x, y) in zip(drawn, list(loader()) * 4, strict=True):
            before, after = reference.states(x)[layer]
            logits = after(mixed_by_hand(before(x), lam, partners))
            loss = lam * F.cross_entropy(logits, y) + (1 - lam) * F.cross_entropy(logits, y[partners])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        torch.testing.assert_close(weights_of(ours.model), weights_of(reference))

    def test_alpha_zero_is_no_callback_bit_for_bit(self):
        def run(*callbacks):
            L.seed_everything(3)
            module = Classifier(nn.Sequential(ConvNet(), nn.Dropout(0.2)))
            trainer(*callbacks, max_epochs=2).fit(module, loader(shuffle=True))
            return module.losses, weights_of(module), torch.rand(1)

        torch.testing.assert_close(run(ManifoldMixupCallback(alpha=0.0)), run(), rtol=0, atol=0)

    def test_global_generators_are_not_touched(self):
        """A run that mixes sees the same data order and the same dropout as one that does not."""

        class Notes(Classifier):
            def training_step(self, batch, batch_idx):
                self.seen.append(batch[1].tolist() if type(batch[1]) is torch.Tensor else batch[1].labels.tolist())
                self.seen.append(F.dropout(torch.ones(20), 0.5).tolist())
                return super().training_step(batch, batch_idx)

        def run(*callbacks):
            L.seed_everything(3)
            module = Notes()
            module.seen = []
            trainer(*callbacks, max_epochs=2).fit(module, loader(shuffle=True))
            return module.seen

        assert run(ManifoldMixupCallback(layers=LAYERS)) == run()


class TestDraws:
    def test_distributions(self):
        """k uniform over S, lam ~ Beta(alpha, alpha), permutation uniform, over 600 batches."""
        drawn = fit(
            Classifier(nn.Sequential(nn.Flatten(), nn.Linear(27, 4), nn.Linear(4, CLASSES))),
            ManifoldMixupCallback(alpha=0.5, layers=["input", "model.0", "model.1"], seed=6),
            DataLoader(torch.utils.data.TensorDataset(*images(1800, 3)), 3),
        )
        layers, lams, permutations = zip(*drawn[1:], strict=True)
        assert scipy.stats.chisquare(list(collections.Counter(layers).values())).pvalue > 0.01
        assert len(set(layers)) == 3
        assert scipy.stats.kstest([lam.item() for lam in lams], scipy.stats.beta(0.5, 0.5).cdf).pvalue > 0.01
        counts = collections.Counter(tuple(p.tolist()) for p in permutations)
        assert len(counts) == 6
        assert scipy.stats.chisquare(list(counts.values())).pvalue > 0.01

    def test_seed_follows_seed_everything(self):
        def run(global_seed, **kwargs):
            L.seed_everything(global_seed)
            return [lam.item() for _, lam, _ in fit(Classifier(), ManifoldMixupCallback(layers=LAYERS, **kwargs))]

        assert run(1) == run(1)
        assert run(1) != run(2)
        assert run(1, seed=7) == run(2, seed=7)

    def test_every_batch_and_epoch_draws_anew(self):
        drawn = fit(Classifier(), ManifoldMixupCallback(layers=LAYERS, seed=0), max_epochs=3)
        assert len({lam.item() for _, lam, _ in drawn}) == 9

    def test_probability(self):
        drawn = fit(Classifier(), ManifoldMixupCallback(layers=LAYERS, probability=0.5, seed=0), max_epochs=40)
        mixed = sum(d is not None for d in drawn)
        assert scipy.stats.binomtest(mixed, len(drawn), 0.5).pvalue > 0.01
        assert fit(Classifier(), ManifoldMixupCallback(layers=LAYERS, probability=0.0)) == [None] * 3

    def test_should_mix(self):
        class LastEpochsUnmixed(ManifoldMixupCallback):
            def should_mix(self, trainer, batch_idx):
                return trainer.current_epoch < trainer.max_epochs - 2

        drawn = fit(Classifier(), LastEpochsUnmixed(layers=LAYERS), max_epochs=4)
        assert [d is not None for d in drawn] == [True] * 6 + [False] * 6

    def test_alpha_schedule(self):
        callback = ManifoldMixupCallback(alpha=AlphaSchedule(0.0, 1000.0, 2), layers=LAYERS, seed=0)
        drawn = fit(Classifier(), callback, max_epochs=3)
        assert drawn[:3] == [None] * 3  # alpha 0: nothing to draw
        assert all(abs(lam - 0.5) < 0.1 for _, lam, _ in drawn[3:])  # Beta(500, 500) and narrower

    def test_odd_last_batch_and_batch_of_one(self):
        drawn = fit(Classifier(), ManifoldMixupCallback(layers=LAYERS), loader(9, 4))
        assert [len(partners) for _, _, partners in drawn] == [4, 4, 1]


@dataclasses.dataclass
class DataclassBatch:
    image: torch.Tensor
    label: torch.Tensor


NamedBatch = collections.namedtuple("NamedBatch", "image label")


class TestBatches:
    @pytest.mark.parametrize(
        "make",
        [
            lambda x, y: (x, y),
            lambda x, y: [x, y],
            NamedBatch,
            DataclassBatch,
            lambda x, y: {"image": x, "label": y},
            lambda x, y: {"pixels": x, "y": y},
        ],
    )
    def test_structures(self, make):
        class Unpacking(Classifier):
            def training_step(self, batch, batch_idx):
                self.types.append(type(batch))
                if dataclasses.is_dataclass(batch):
                    batch = (batch.image, batch.label)
                elif isinstance(batch, dict):
                    batch = tuple(batch.values())
                return super().training_step(batch, batch_idx)

        originals = [make(*batch) for batch in loader()]
        module, reference = Unpacking(), Classifier()
        module.types = []
        reference.load_state_dict(module.state_dict())
        seen = []

        class Spy(L.Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                seen.append(batch)

        callback = ManifoldMixupCallback(layers=LAYERS, seed=4)
        trainer(callback, Spy()).fit(module, DataLoader(originals, batch_size=None, collate_fn=lambda batch: batch))
        fit(reference, ManifoldMixupCallback(layers=LAYERS, seed=4))
        assert module.losses == reference.losses
        assert set(module.types) == {type(originals[0])}
        for batch, (x, y) in zip(seen, loader(), strict=True):  # other callbacks see the original
            values = dataclasses.astuple(batch) if dataclasses.is_dataclass(batch) else batch
            values = tuple(values.values()) if isinstance(values, dict) else values
            assert [type(value) for value in values] == [torch.Tensor] * 2
            assert torch.equal(values[0], x)
            assert torch.equal(values[1], y)

    def test_keys(self):
        class Nested(Classifier):
            def training_step(self, batch, batch_idx):
                return super().training_step((batch["a"][1], batch["b"]), batch_idx)

        batches = [{"a": [i, x], "b": y, "weight": torch.ones(8)} for i, (x, y) in enumerate(loader())]
        module, reference = Nested(), Classifier()
        reference.load_state_dict(module.state_dict())
        callback = ManifoldMixupCallback(layers=LAYERS, input_key="a.1", target_key="b", seed=4)
        fit(module, callback, DataLoader(batches, batch_size=None))
        fit(reference, ManifoldMixupCallback(layers=LAYERS, seed=4))
        assert module.losses == reference.losses

    def test_several_targets(self):
        """A dict of targets of every kind, each loss exact."""

        class ManyHeads(L.LightningModule):
            def __init__(self):
                super().__init__()
                self.trunk = nn.Sequential(nn.Linear(3, 8), nn.Tanh())
                self.heads = nn.Linear(8, 12)

            def losses_of(self, z, y):
                return torch.stack(
                    [
                        F.cross_entropy(z[:, :4], y["class"]),
                        F.mse_loss(z[:, 4], y["value"]),
                        F.binary_cross_entropy_with_logits(z[:, 5:8], y["tags"]),
                        F.cross_entropy(z[:, 8:], y["soft"]),
                        F.binary_cross_entropy_with_logits(z[:, 5:8], y["flags"].float()),
                    ]
                )

            def training_step(self, batch, batch_idx):
                x, y = batch
                self.last = self.losses_of(self.heads(self.trunk(x)), y)
                return self.last.sum()

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), 0.0)

        x = torch.randn(6, 3)
        y = {
            "class": torch.randint(4, (6,)),
            "value": torch.randn(6),
            "tags": torch.randint(2, (6, 3)).float(),
            "soft": torch.rand(6, 4).softmax(1),
            "flags": torch.rand(6, 3) > 0.5,
        }
        module = ManyHeads()
        [(_, lam, partners)] = fit(
            module,
            ManifoldMixupCallback(layers=["model.trunk".removeprefix("model.")]),
            DataLoader([(x, y)], batch_size=None),
        )
        z = module.heads(mixed_by_hand(module.trunk(x), lam, partners))
        partner = {key: value[partners] for key, value in y.items()}
        expected = lam * module.losses_of(z, y) + (1 - lam) * module.losses_of(z, partner)
        expected[1] = F.mse_loss(z[:, 4], mixed_by_hand(y["value"], lam, partners))  # floats: against the mixed target
        torch.testing.assert_close(module.last.detach().as_subclass(torch.Tensor), expected.detach())

    def test_loss_inside_the_model(self):
        class WithLabels(nn.Module):
            def __init__(self):
                super().__init__()
                self.embedding, self.head = nn.Embedding(9, 6), nn.Linear(6, CLASSES)
                self.encoder = nn.TransformerEncoderLayer(6, 2, 12, dropout=0.0, batch_first=True)

            def forward(self, input_ids, labels=None):
                logits = self.head(self.encoder(self.embedding(input_ids)).mean(1))
                return {"loss": F.cross_entropy(logits, labels), "logits": logits}

        class Language(Classifier):
            def training_step(self, batch, batch_idx):
                loss = self.model(batch["input_ids"], labels=batch["labels"])["loss"]
                self.losses.append(loss.item())
                return loss

        batch = {"input_ids": torch.randint(9, (6, 5)), "labels": torch.randint(CLASSES, (6,))}
        module = Language(WithLabels(), lr=0.0)
        callback = ManifoldMixupCallback(layers=["model.embedding"])
        [(_, lam, partners)] = fit(module, callback, DataLoader([batch], batch_size=None))
        net = module.model
        h = mixed_by_hand(net.embedding(batch["input_ids"]), lam, partners)
        logits, y = net.head(net.encoder(h).mean(1)), batch["labels"]
        expected = lam * F.cross_entropy(logits, y) + (1 - lam) * F.cross_entropy(logits, y[partners])
        assert module.losses[0] == pytest.approx(expected.item(), rel=1e-5)

    def test_batch_dim(self):
        class TimeMajor(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed, self.head = nn.Linear(3, 6), nn.Linear(6, CLASSES)

            def forward(self, x):
                return self.head(self.embed(x.transpose(0, 1)).mean(0))

        x, y = torch.randn(8, 8, 3), torch.randint(CLASSES, (8,))  # as many steps as samples
        module = Classifier(TimeMajor(), lr=0.0)
        callback = ManifoldMixupCallback(layers=["model.embed"], batch_dim=1)
        [(_, lam, partners)] = fit(module, callback, DataLoader([(x, y)], batch_size=None))
        logits = module.model(mixed_by_hand(x, lam, partners))  # embed and mean are linear
        expected = lam * F.cross_entropy(logits, y) + (1 - lam) * F.cross_entropy(logits, y[partners])
        assert module.losses[0] == pytest.approx(expected.item(), rel=1e-5)


class Ignores(Classifier):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.nll_loss(self(x).log_softmax(1), torch.zeros(len(y), dtype=torch.long))


class SkipsLayer(Classifier):
    """After the first batch, which is observed, the drawn layer is no longer called."""

    def training_step(self, batch, batch_idx):
        if batch_idx:
            self.model.forward = lambda x: self.model.fc(self.model.conv1(x).mean((2, 3)))
        return super().training_step(batch, batch_idx)


class TestChecks:
    """What was not done as promised is an error before any weight has changed."""

    def failing(self, module, callback, error, match, batches=None):
        before = weights_of(module)
        with pytest.raises(error, match=match):
            fit(module, callback, batches)
        assert_untouched(module)
        return before, weights_of(module)

    def test_target_not_used(self):
        before, after = self.failing(
            Ignores(),
            ManifoldMixupCallback(layers=LAYERS),
            MixingError,
            r"no loss with a gradient used the labels.*Set `target_key`.*No weight has changed",
        )
        for name in ("model.conv1.weight", "model.fc.weight"):
            assert torch.equal(before[name], after[name])

    @pytest.mark.parametrize("layers", [LAYERS, "auto"])
    @pytest.mark.parametrize("read", [torch.vmap(F.cross_entropy), lambda z, y: F.cross_entropy(z, torch.tensor(y))])
    def test_one_of_two_losses_reads_plain_labels(self, read, layers):
        class Leaks(Classifier):
            def training_step(self, batch, batch_idx):
                x, y = batch
                logits = self(x)
                return F.cross_entropy(logits, y) + self.read(logits, y).mean()

        module = Leaks()
        module.read = read
        callback = ManifoldMixupCallback(layers=layers)
        seen, warned = train(module, loader(), callback)
        assert [m for m in warned if "runs the training step twice" in m and "`mixed_loss(function, logits, y)`" in m]
        for (draw, weights, loss, _), (x, y) in zip(seen, loader(), strict=True):
            if draw is not None:
                lam, partners = draw.mix.lam, draw.mix.partners
                module.load_state_dict(weights, strict=False)
                before, after = module.model.states(x)[draw.layer]
                logits = after(mixed_by_hand(before(x), lam, partners))
                expected = lam * F.cross_entropy(logits, y) + (1 - lam) * F.cross_entropy(logits, y[partners])
                torch.testing.assert_close(loss, 2 * expected.detach())

    def test_a_metric_by_other_means_is_no_loss(self):
        class Counts(Classifier):
            def training_step(self, batch, batch_idx):
                with torch.no_grad():
                    self.log("nll", torch.vmap(F.cross_entropy)(self(batch[0]), batch[1]).mean())
                return super().training_step(batch, batch_idx)

        assert len(fit(Counts(), ManifoldMixupCallback(layers=LAYERS))) == 3

    def test_layer_not_called(self):
        module = SkipsLayer()
        with pytest.raises(MixingError, match=r"epoch 0, step 1, layer 'model.layer1'.*was not called.*`layers`"):
            fit(module, ManifoldMixupCallback(layers=["model.layer1"]))
        assert len(module.losses) == 2

    def test_layer_called_with_another_batch_size(self):
        class Doubles(Classifier):
            def training_step(self, batch, batch_idx):
                x, y = batch
                return F.cross_entropy(self(torch.cat([x, x]) if batch_idx else x)[: len(y)], y)

        with pytest.raises(MixingError, match=r"Expected a state of 8 samples.*got shape \(16,"):
            fit(Doubles(), ManifoldMixupCallback(layers=["model.layer1"]))

    def test_metric_states_stay_plain(self):
        class Updates(Classifier):
            def __init__(self):
                super().__init__()
                self.kept = MetricCollection({"a": Accuracy(task="multiclass", num_classes=CLASSES)})
                self.raw = Raw()

            def training_step(self, batch, batch_idx):
                x, y = batch
                logits = self(x)
                self.kept(logits, y)
                self.accuracy.update(logits, y)
                self.raw.update(y)
                self.expected.append((logits.argmax(1) == plain(y)).sum().item())
                return F.cross_entropy(logits, y)

            def on_train_batch_end(self, *args):
                assert not any(isinstance(value, MixedTarget) for value in self.raw.values)
                for metric in (self.accuracy, self.kept["a"]):
                    assert type(metric.tp) is torch.Tensor
                    assert int(metric.tp.sum()) == sum(self.expected)

        from torchmetrics import Metric

        class Raw(Metric):
            def __init__(self):
                super().__init__()
                self.add_state("values", [])

            def update(self, y):
                self.values.append(y)

            def compute(self):
                return torch.cat(self.values)

        module = Updates()
        module.accuracy = Accuracy(task="multiclass", num_classes=CLASSES, average="micro")
        module.kept["a"] = Accuracy(task="multiclass", num_classes=CLASSES, average="micro")
        module.expected = []
        fit(module, ManifoldMixupCallback(layers=LAYERS))

    def test_teacher_is_not_mixed(self):
        class Teacher(Classifier):
            def training_step(self, batch, batch_idx):
                x, y = batch
                logits = self(x)
                with torch.no_grad():
                    teacher = self(x)
                self.model.eval()
                evaluated = self(x)
                self.model.train()
                self.seen.append((logits.detach(), teacher, evaluated.detach()))
                return F.cross_entropy(logits, y)

        module = Teacher(lr=0.0)
        module.seen = []
        x, y = images(8)
        callback = ManifoldMixupCallback(layers=["model.layer1"])
        [(_, lam, partners)] = fit(module, callback, DataLoader([(x, y)], batch_size=None))
        [(logits, teacher, evaluated)] = module.seen
        net = module.model.train()
        before, after = net.states(x)["model.layer1"]
        torch.testing.assert_close(teacher, net(x).detach())
        torch.testing.assert_close(logits, after(mixed_by_hand(before(x), lam, partners)).detach())
        assert not torch.allclose(evaluated, logits)

    def test_evaluation_is_not_touched(self):
        class Validates(Classifier):
            def validation_step(self, batch, batch_idx):
                x, y = batch
                assert type(y) is torch.Tensor
                self.outputs.append(self(x))

        module = Validates(lr=0.0)
        module.outputs = []
        trainer(ManifoldMixupCallback(layers=LAYERS), max_epochs=2, num_sanity_val_steps=1).fit(
            module, loader(), loader()
        )
        module.eval()
        with torch.no_grad():
            torch.testing.assert_close(module.outputs[-1], module(list(loader())[-1][0]))

    def test_skipped_batch(self):
        class Skips(Classifier):
            def training_step(self, batch, batch_idx):
                return super().training_step(batch, batch_idx) if batch_idx != 1 else None

        module = Skips()
        with pytest.warns(UserWarning, match="returned `None`"):
            fit(module, ManifoldMixupCallback(layers=LAYERS))
        assert len(module.losses) == 2


class TestBadInput:
    @pytest.mark.parametrize(
        ("name", "values", "expected"),
        [
            ("alpha", [-0.1, float("nan"), "2", None, (1.0,), [1.0, "2"]], "a finite number >= 0"),
            ("probability", [1.5, -1, "0.5", None, float("nan")], r"a number in \[0, 1\]"),
            ("clean_weight", [-1.0, "1", None, float("inf")], "a finite number >= 0"),
            ("layers", [3, None, [3], [None], {1: 2}], "'auto', a name, a list of names, or a dict"),
            ("layers", [[], {}, ""], "at least one layer"),
            ("seed", ["x", -1, 1.5, True], "an integer >= 0, or None to follow"),
            ("batch_dim", [-1, "0", 0.0, True], "an integer >= 0, or None to have it found"),
            ("passes", [3, 0, "1", None, [1]], "'auto', 1 or 2"),
            ("target_modules", ["teacher", None, 3, [3]], "a list of names of modules"),
            ("dominant", ["yes", None, 2, []], "True or False"),
            ("self_check", ["false", None], "True or False"),
            ("log_mixing", ["true", 0.5], "True or False"),
            ("log_clean", ["true", None], "True or False"),
            ("partners", ["nearest", 3, dict], "a strategy"),
            ("input_key", [1.5, [], True, [None]], "an index, a name or a list"),
            ("target_key", [1.5, {}], "an index, a name or a list"),
            ("mask_key", [object()], "an index, a name or a list"),
        ],
    )
    def test_wrong_arguments_are_named(self, name, values, expected):
        for value in values:
            with pytest.raises((ValueError, TypeError), match=f"Expected `?{name}`? to .*{expected}") as error:
                ManifoldMixupCallback(**{name: value})
            assert repr(value) in str(error.value) or value in ([], {}, "")

    def test_each_argument_has_been_tried(self):
        [tried] = [mark for mark in self.test_wrong_arguments_are_named.pytestmark if mark.name == "parametrize"]
        names = list(inspect.signature(ManifoldMixupCallback).parameters)
        assert {name for name, *_ in tried.args[1]} == set(names)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"start": "0.2"}, "Expected start to be a finite number >= 0, got '0.2'"),
            ({"end": (1, 2)}, r"Expected end to be a finite number >= 0, got \(1, 2\)"),
            ({"epochs": 0}, "Expected epochs to be a finite number >= 1, got 0"),
            ({"epochs": None}, "Expected epochs to be a finite number >= 1, got None"),
        ],
    )
    def test_schedule(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            AlphaSchedule(**({"start": 0.2, "end": 2.0, "epochs": 4} | arguments))

    @pytest.mark.parametrize(
        ("layers", "match"), [(["model.layer11"], "model.layer1"), (["model.stage*"], r"model\.stage\*")]
    )
    def test_unknown_layers(self, layers, match):
        with pytest.raises(ValueError, match=match):
            fit(Classifier(), ManifoldMixupCallback(layers=layers))

    def test_bypassed_layer(self):
        module = Classifier(PreActResNet(18, num_classes=CLASSES, initial_channels=4))
        before = module.model.linear.weight.detach().clone()
        with pytest.raises(MisconfigurationException, match=r"'model.layer1.0.conv2' is bypassed.*'model.layer1.0'"):
            fit(module, ManifoldMixupCallback(layers=["model.layer1.0.conv2"]))
        assert torch.equal(module.model.linear.weight, before)
        assert_untouched(module)

    def test_target_key(self):
        with pytest.raises(ValueError, match=r"`target_key='lable'` is not in the batch.*Did you mean label") as error:
            fit(
                Classifier(),
                ManifoldMixupCallback(target_key="lable"),
                DataLoader([{"image": torch.zeros(2, 3), "label": torch.zeros(2).long()}], batch_size=None),
            )
        assert "'image': float32 tensor (2, 3)" in str(error.value)

    def test_cannot_tell(self):
        batch = (torch.zeros(2, 3), torch.zeros(2).long(), torch.ones(2))
        with pytest.raises(ValueError, match="Set `target_key` to its index or name"):
            fit(Classifier(), ManifoldMixupCallback(), DataLoader([batch], batch_size=None))
        batch = (torch.zeros(2, 3), torch.zeros(2).long(), torch.ones(2, 3))
        with pytest.raises(ValueError, match="Set `input_key` to its index or name"):
            fit(Classifier(), ManifoldMixupCallback(layers="input", target_key=1), DataLoader([batch], batch_size=None))

    def test_integer_input(self):
        batch = (torch.zeros(2, 3).long(), torch.zeros(2).long())
        with pytest.raises(ValueError, match=r"'input' is in S, but.*int64 tensor \(2, 3\).*after the embedding"):
            fit(Classifier(), ManifoldMixupCallback(layers="input"), DataLoader([batch], batch_size=None))

    def test_float16_labels(self):
        batch = (torch.zeros(2, 3), torch.zeros(2).half())
        with pytest.raises(TypeError, match="float16 cannot be mixed"):
            fit(Classifier(), ManifoldMixupCallback(layers="input"), DataLoader([batch], batch_size=None))

    @pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
    def test_batches_from_an_iterator(self):
        class Fetches(Classifier):
            def training_step(self, dataloader_iter):
                return super().training_step(*next(dataloader_iter)[:2])

        with pytest.raises(MisconfigurationException, match="Take `batch` as the argument"):
            fit(Fetches(), ManifoldMixupCallback(layers=LAYERS))

    def test_detection_targets(self):
        targets = [{"boxes": torch.zeros(1, 4), "labels": torch.zeros(1)}] * 2
        with pytest.raises(TypeError, match="targets of object detection cannot be mixed"):
            fit(
                Classifier(),
                ManifoldMixupCallback(layers="input"),
                DataLoader([(torch.zeros(2, 3), targets)], batch_size=None),
            )

    def test_different_numbers_of_samples(self):
        batch = (torch.zeros(3, 3, 6, 6), torch.zeros(2).long())
        with pytest.raises(MixingError, match="input at 0 and the target do not hold the same samples"):
            fit(Classifier(), ManifoldMixupCallback(layers="input"), DataLoader([batch], batch_size=None))

    def test_two_callbacks(self):
        message = "Expected one ManifoldMixupCallback in the Trainer, got 2: a batch is mixed once"
        with pytest.raises(MisconfigurationException, match=message):
            trainer(ManifoldMixupCallback(), ManifoldMixupCallback()).fit(Classifier(), loader())

        class Another(ManifoldMixupCallback):
            pass

        with pytest.raises(MisconfigurationException, match="Expected one ManifoldMixupCallback in the Trainer, got 2"):
            trainer(ManifoldMixupCallback(), Another()).fit(Classifier(), loader())
