import copy
import math
import os

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_manifold_mixup import ManifoldMixupCallback, ManifoldMixupModule, MixingError, eligible_layers
from lightning_manifold_mixup.cli.training import Prepared
from lightning_manifold_mixup.modules import semi_supervised as semi
from lightning_manifold_mixup.modules.consistency import consistency_weight, update_teacher
from lightning_manifold_mixup.modules.semi_supervised import SemiSupervisedManifoldMixupModule
from lightning_manifold_mixup.paper import recipes
from lightning_manifold_mixup.partners import Partners
from tests.helpers import CLASSES, LAYERS, ConvNet, images, trainer, weights_of
from tests.processes import together

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # Lightning 2.6 with torch 2.14
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`"),
]
N, M = 6, 8  # samples in a labelled and in an unlabelled batch


def loaders(batches=4):
    labelled = DataLoader(TensorDataset(*images(N * batches, seed=1)), N)
    unlabelled = DataLoader(TensorDataset(images(M * batches, seed=2)[0]), M)
    return CombinedLoader({"labelled": labelled, "unlabelled": unlabelled}, "max_size_cycle")


def steps(batches, epochs=1):
    """The same batches for loops by hand: (x, y, u)."""
    for _ in range(epochs):
        for batch, _, _ in loaders(batches):
            yield *batch["labelled"], batch["unlabelled"][0]


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def module(teacher="ema", model=None, **kwargs):
    defaults = {"w_max": 3.0, "ramp": 0.5, "layers": LAYERS, "mixup": {"seed": 5}, "optimizer": sgd}
    return SemiSupervisedManifoldMixupModule(
        ConvNet() if model is None else model, CLASSES, teacher, **(defaults | kwargs)
    )


class Losses(L.Callback):
    def __init__(self):
        self.values, self.students = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(outputs["loss"].item())
        self.students.append([p.detach().clone() for p in pl_module.model.parameters()])


class Draws(L.Callback):
    def __init__(self):
        self.layers, self.lams = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (draw := pl_module.mixup.last_draw) is not None:
            self.layers.append(draw.layer)
            self.lams.append(draw.mix.lam.item())


class Drawless(L.LightningModule):
    """Uses no random numbers; what a fit of it takes from the global generators, Lightning and the loaders take."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def training_step(self, batch, batch_idx):
        return self.weight.sum()

    def configure_optimizers(self):
        return sgd(self.parameters())


class ByHand:
    """The method in plain PyTorch and numpy, with the draws as they are documented."""

    def __init__(self, model, teacher, w_max=3.0, ramp_steps=2.0, alphas=(1.0, 1.0), seed=5, decay=0.999):
        self.student, self.ema = model, copy.deepcopy(model) if teacher == "ema" else None
        self.w_max, self.ramp_steps, self.alphas, self.seed, self.decay = w_max, ramp_steps, alphas, seed, decay
        self.optimizer = sgd(self.student.parameters())
        self.steps = self.batches = 0
        self.layers = []

    def mixed(self, x, layer, alpha, own):
        lam, partners = (
            float(np.float32(own.beta(alpha, alpha))) if alpha else 1.0,
            torch.from_numpy(own.permutation(len(x))),
        )
        before, after = self.student.states(x)[layer]
        h = before(x)
        return after(lam * h + (1 - lam) * h[partners]), lam, partners

    def loss(self, x, y, u, rank=0):
        """Of one process; all processes have the same number of the batch, which rank 0 counts on."""
        self.batches += rank == 0
        shared, own = (
            np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, stream, self.batches]))
            for stream in (0, 1 + rank)
        )
        shared.random()  # whether to mix
        layer = LAYERS[int(3 * shared.random())]
        self.layers.append(layer)
        target = (self.student if self.ema is None else self.ema)(u).detach()
        logits, lam, partners = self.mixed(x, layer, self.alphas[0], own)
        labelled = lam * F.cross_entropy(logits, y) + (1 - lam) * F.cross_entropy(logits, y[partners])
        hits = [(logits.argmax(1) == labels).float().mean().item() for labels in (y, y[partners])]
        self.accuracy = lam * hits[0] + (1 - lam) * hits[1]

        logits, lam, partners = self.mixed(u, layer, self.alphas[1], own)
        target = lam * target + (1 - lam) * target[partners]
        if self.ema is not None:
            logits, target = logits.softmax(1), target.softmax(1)
        consistency = ((logits - target) ** 2).mean()
        t = min(self.steps / self.ramp_steps, 1)
        return labelled + self.w_max * math.exp(-5 * (1 - t) ** 2) * consistency

    def step(self):
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        if self.ema is not None:
            d = min(1 - 1 / (self.steps + 1), self.decay)
            for average, p in zip(self.ema.parameters(), self.student.parameters(), strict=True):
                average.data = d * average.data + (1 - d) * p.data


class Leaking(SemiSupervisedManifoldMixupModule):
    """A loss in which the brightness of the plain images meets the mixed logits."""

    def training_step(self, batch, batch_idx):
        self.brightness = batch["labelled"][0].mean((1, 2, 3))
        return super().training_step(batch, batch_idx)

    def soft_label_loss(self, logits, target):
        return super().soft_label_loss(logits, target) + 10 * (logits[:, 0] * self.brightness).mean()


class NextInBatch(Partners):
    def __init__(self):
        self.seen = []

    def __call__(self, targets, n, generator):
        self.seen.append((tuple(targets.shape), n))
        return torch.arange(n).roll(1)


class TestMethod:
    @pytest.mark.parametrize("teacher", ["self", "ema"])
    def test_is_the_loop_by_hand(self, teacher):
        """Losses, weights, teacher, and the statistics of batch normalisation in both networks."""
        net = ConvNet()
        hand = ByHand(copy.deepcopy(net), teacher, ramp_steps=8 * 0.5, alphas=(0.5, 2.0))
        expected = []
        for batch in steps(4, epochs=2):
            loss = hand.loss(*batch)
            loss.backward()
            hand.step()
            expected.append(loss.item())
        assert set(hand.layers) == set(LAYERS)

        ours, losses = module(teacher, net, alpha_labelled=0.5, alpha_unlabelled=2.0), Losses()
        trainer(losses, max_epochs=2).fit(ours, loaders())
        assert losses.values == pytest.approx(expected, rel=1e-5)
        torch.testing.assert_close(weights_of(ours.model), weights_of(hand.student))
        if teacher == "ema":
            torch.testing.assert_close(weights_of(ours.teacher), weights_of(hand.ema))
            assert not torch.equal(ours.teacher.layer2[1].running_mean, ours.model.layer2[1].running_mean)

    @pytest.mark.parametrize("teacher", ["self", "ema"])
    def test_one_step(self, teacher):
        net = ConvNet()
        hand = ByHand(copy.deepcopy(net), teacher, ramp_steps=0.5)
        losses = Losses()
        trainer(losses).fit(module(teacher, net), loaders(1))
        [batch] = steps(1)
        assert losses.values == pytest.approx([hand.loss(*batch).item()], rel=1e-6)

    def test_logs_are_those_of_the_mixed_batch(self):
        net = ConvNet()
        hand = ByHand(copy.deepcopy(net), "ema", ramp_steps=0.5)
        [batch] = steps(1)
        loss = hand.loss(*batch).item()
        t = trainer()
        t.fit(module(model=net), loaders(1))
        values = {name: value.item() for name, value in t.callback_metrics.items()}
        assert values["train/loss"] == pytest.approx(loss, rel=1e-6)
        assert values["train/accuracy"] == pytest.approx(hand.accuracy)
        weighted = values["train/consistency_weight"] * values["train/consistency_loss"]
        assert values["train/labelled_loss"] + weighted == pytest.approx(loss, rel=1e-6)

    @pytest.mark.parametrize("alphas", [(0.0, 2.0), (2.0, 0.0)])
    def test_one_part_alone_is_mixed(self, alphas):
        net = ConvNet()
        hand, expected = ByHand(copy.deepcopy(net), "ema", ramp_steps=2.0, alphas=alphas), []
        for batch in steps(4):
            loss = hand.loss(*batch)
            loss.backward()
            hand.step()
            expected.append(loss.item())
        losses = Losses()
        labelled, unlabelled = alphas
        trainer(losses).fit(module(model=net, alpha_labelled=labelled, alpha_unlabelled=unlabelled), loaders())
        assert losses.values == pytest.approx(expected, rel=1e-5)

    def test_nothing_is_mixed(self):
        """Consistency with the plain predictions of an average: a mean teacher."""
        net = ConvNet()
        student, losses = copy.deepcopy(net), Losses()
        trainer(losses).fit(module(model=net, alpha_labelled=0.0, alpha_unlabelled=0.0), loaders(1))
        [(x, y, u)] = steps(1)
        target = copy.deepcopy(student)(u).softmax(1)
        consistency = ((student(u).softmax(1) - target) ** 2).mean()
        assert losses.values == pytest.approx([(F.cross_entropy(student(x), y) + 3.0 * consistency).item()], rel=1e-5)

    def test_is_checked_by_the_oracles(self):
        """They find the step exact in one pass, and refuse a step in which something goes past the layer."""
        ours = module()
        trainer().fit(ours, loaders())
        assert ours.mixup.state_dict()["passes"] == 1

        leaking = Leaking(ConvNet(), CLASSES, layers=["model.layer1"], optimizer=sgd)
        with pytest.raises(MixingError, match="something else reaches the loss"):
            trainer().fit(leaking, loaders())

    def test_partners_are_chosen_by_the_targets_of_their_part(self):
        partners = NextInBatch()
        trainer().fit(module(mixup={"partners": partners}), loaders(2))
        assert partners.seen == [((N,), N), ((M, CLASSES), M)] * 2

    def test_ramp_is_the_formula(self):
        """Of the public script: t = linspace(0, 1, updates), then constant."""
        t = np.linspace(0, 1, 41)
        assert [consistency_weight(i, 40, 2.0) for i in range(41)] == pytest.approx(np.exp(-5 * (1 - t) ** 2) * 2.0)
        assert [consistency_weight(i, 40, 2.0) for i in (41, 400)] == [2.0, 2.0]
        assert consistency_weight(0, 0, 2.0) == 2.0

    @pytest.mark.parametrize(("accumulate", "total"), [(1, 8), (2, 4)])
    def test_ramp_takes_its_share_of_training(self, accumulate, total):
        class Weights(L.Callback):
            seen = []  # noqa: RUF012

            def on_train_batch_end(self, trainer, *args):
                self.seen.append(trainer.callback_metrics["train/consistency_weight"].item())

        Weights.seen = []
        trainer(Weights(), max_epochs=2, accumulate_grad_batches=accumulate).fit(module(ramp=0.5), loaders())
        t = np.minimum(np.arange(8) // accumulate / (0.5 * total), 1)
        assert Weights.seen == pytest.approx(3.0 * np.exp(-5 * (1 - t) ** 2))

    @pytest.mark.parametrize("teacher", ["self", "ema"])
    def test_no_gradient_into_targets_or_teacher(self, teacher, monkeypatch):
        targets = []
        original = semi.consistency_loss

        def spy(logits, target, *, softmax):
            targets.append(target)
            assert logits.requires_grad
            return original(logits, target, softmax=softmax)

        monkeypatch.setattr(semi, "consistency_loss", spy)
        ours = module(teacher)
        trainer().fit(ours, loaders())
        assert len(targets) > 4  # those of the self-check as well
        assert not any(target.requires_grad for target in targets)
        assert all(parameter.grad is not None or parameter.requires_grad for parameter in ours.model.parameters())
        if teacher == "ema":
            assert all(p.grad is None and not p.requires_grad for p in ours.teacher.parameters())

    @pytest.mark.parametrize(("optimizer", "decay"), [(sgd, 0.999), (torch.optim.AdamW, 0.9)], ids=["sgd", "adamw"])
    def test_teacher_after_50_steps(self, decay, optimizer):
        """AdamW would move weights that have no gradient, too, if it saw one of them: its weight decay is apart."""
        net = ConvNet()
        average = [p.detach().clone() for p in net.parameters()]
        ours, losses = module(model=net, ema_decay=decay, optimizer=optimizer), Losses()
        trainer(losses).fit(ours, loaders(50))
        for step, weights in enumerate(losses.students, 1):
            d = min(1 - 1 / (step + 1), decay)
            average = [d * a + (1 - d) * w for a, w in zip(average, weights, strict=True)]
        assert len(losses.students) == 50
        torch.testing.assert_close(list(ours.teacher.parameters()), average)

    def test_average_of_all_weights_at_first(self):
        teacher, student = nn.Linear(2, 2), nn.Linear(2, 2)
        seen = [teacher.weight.detach().clone()]
        for step in range(1, 20):
            nn.init.normal_(student.weight)
            seen.append(student.weight.detach().clone())
            update_teacher(teacher, student, step)
        torch.testing.assert_close(teacher.weight.detach(), torch.stack(seen).mean(0))

    def test_teacher_starts_from_the_weights_that_training_starts_from(self):
        ours = module()
        ours.model.load_state_dict(ConvNet().state_dict())
        pretrained = weights_of(ours.model)
        trainer(limit_train_batches=1).fit(ours, loaders())
        expected = (pretrained["fc.weight"] + ours.model.fc.weight.detach()) / 2
        torch.testing.assert_close(ours.teacher.fc.weight.detach(), expected)


class WithDropout(ConvNet):
    def forward(self, x):
        return self.fc(F.dropout(self.layer2(self.layer1(self.conv1(x))).mean((2, 3)), 0.5, self.training))


class TestSupervised:
    @pytest.mark.parametrize("extra", [{}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}])
    def test_without_unlabelled_part_is_manifold_mixup_bit_for_bit(self, extra):
        net = WithDropout()
        plain, ours = copy.deepcopy(net), copy.deepcopy(net)
        data = TensorDataset(*images(24))
        L.seed_everything(3, verbose=False)
        supervised = ManifoldMixupModule(plain, CLASSES, 2.0, LAYERS, {"seed": 5}, optimizer=sgd)
        trainer(max_epochs=3, **extra).fit(supervised, DataLoader(data, N, shuffle=True))
        L.seed_everything(3, verbose=False)
        trainer(max_epochs=3, **extra).fit(
            module(model=ours, w_max=0.0, alpha_labelled=2.0),
            CombinedLoader({"labelled": DataLoader(data, N, shuffle=True)}, "max_size_cycle"),
        )
        for name, value in weights_of(plain).items():
            assert torch.equal(value, weights_of(ours)[name]), name

    def test_unlabelled_samples_that_are_there_have_no_part(self):
        """As in the recipe for the supervised baseline: the same data module, w_max = 0."""
        nets = [ConvNet()]
        nets.append(copy.deepcopy(nets[0]))
        without = CombinedLoader({"labelled": DataLoader(TensorDataset(*images(N * 4, seed=1)), N)}, "max_size_cycle")
        for net, data in zip(nets, (loaders(), without), strict=True):
            trainer(max_epochs=2).fit(module(model=net, w_max=0.0), data)
        for name, value in weights_of(nets[0]).items():
            assert torch.equal(value, weights_of(nets[1])[name]), name

    def test_makes_no_teacher(self):
        assert module(w_max=0.0).teacher is None

    def test_loss_of_the_public_code(self):
        losses = Losses()
        trainer(losses).fit(module(w_max=0.0, loss="bce"), loaders())
        assert losses.values[0] == pytest.approx(0.33, abs=0.3)  # of four classes: cross entropy begins at 1.4


class TestDraws:
    def test_are_reproducible_and_private(self):
        results = []
        for global_seed in (1, 2):
            net = ConvNet()
            torch.manual_seed(0)
            net.load_state_dict(ConvNet().state_dict())
            torch.manual_seed(global_seed)
            np.random.seed(global_seed)
            losses = Losses()
            before = np.random.get_state()[1].copy()
            trainer(losses).fit(module(model=net), loaders())
            assert (np.random.get_state()[1] == before).all()
            results.append(losses.values)
            after = torch.get_rng_state()
            torch.manual_seed(global_seed)
            trainer().fit(Drawless(), loaders())
            assert torch.equal(torch.get_rng_state(), after)
        assert results[0] == results[1]

    def test_differ_from_batch_to_batch_and_part_to_part(self):
        drawn = []

        class Spied(semi.PartsCallback):
            def draw(self, context):
                draw = super().draw(context)
                drawn.append((context.n, draw.mix.lam.item(), draw.layer))
                return draw

            def draw_group(self, context, first):
                mix = super().draw_group(context, first)
                drawn.append((context.n, mix.lam.item(), first.layer))
                return mix

        ours = module()
        ours.mixup.__class__ = Spied
        trainer().fit(ours, loaders())
        assert [n for n, _, _ in drawn] == [N, M] * 4
        assert len({lam for _, lam, _ in drawn}) == 8

    def test_seed_everything_is_followed(self, monkeypatch):
        runs = []
        for seed in ("1", "1", "2"):
            monkeypatch.setenv("PL_GLOBAL_SEED", seed)
            torch.manual_seed(0)
            losses = Losses()
            trainer(losses).fit(module(mixup=None), loaders())
            runs.append(losses.values)
        assert runs[0] == runs[1] != runs[2]


class TestTrainer:
    @pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty")
    @pytest.mark.parametrize(("teacher", "accumulate"), [("self", 1), ("ema", 2)])
    def test_resumed_run_is_the_uninterrupted_one(self, teacher, accumulate, tmp_path, monkeypatch):
        monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)  # the seed of the draws is in the checkpoint alone
        net = ConvNet()
        whole, resumed = (module(teacher, copy.deepcopy(net), mixup=None) for _ in range(2))
        keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        options = {"max_epochs": 4, "accumulate_grad_batches": accumulate}
        trainer(keep, enable_checkpointing=True, **options).fit(whole, loaders())
        again = ModelCheckpoint(tmp_path, filename="again-{epoch}", save_top_k=-1)
        trainer(again, enable_checkpointing=True, **options).fit(
            resumed, loaders(), ckpt_path=tmp_path / "epoch=1.ckpt", weights_only=False
        )
        assert any(name.startswith("teacher.") for name in weights_of(resumed)) == (teacher == "ema")
        for name, value in weights_of(whole).items():
            assert torch.equal(value, weights_of(resumed)[name]), name

    @pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
    @pytest.mark.filterwarnings("ignore:The dirpath has changed")
    @pytest.mark.parametrize(("teacher", "layers"), [("self", "auto"), ("ema", LAYERS)])
    def test_resumed_in_mid_epoch(self, teacher, layers, tmp_path):
        """Three batches an epoch, resumed after step 4. All are the same one: Lightning starts plain data again."""
        batch = {"labelled": list(images(N, seed=1)), "unlabelled": images(M, seed=2)[0]}
        batches = DataLoader([batch] * 3, batch_size=None)
        whole, resumed = (module(teacher, mixup=None, layers=layers) for _ in range(2))
        drawn = []
        for ours, saved in ((whole, None), (resumed, tmp_path / "whole" / "step=4.ckpt")):
            folder = tmp_path / ("resumed" if saved else "whole")
            keep = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)
            losses = Losses()
            t = trainer(keep, losses, enable_checkpointing=True, max_epochs=3)
            t.fit(ours, batches, ckpt_path=saved, weights_only=False)
            drawn.append(losses.values)
        assert len(drawn[0]) == 9
        assert drawn[1] == drawn[0][4:]
        assert any(name.startswith("teacher.") for name in weights_of(resumed)) == (teacher == "ema")
        for name, value in weights_of(whole).items():
            assert torch.equal(value, weights_of(resumed)[name]), name

    def test_teacher_follows_optimizer_steps_when_gradients_accumulate(self):
        net = ConvNet()
        hand = ByHand(copy.deepcopy(net), "ema", ramp_steps=1.0)
        for index, batch in enumerate(steps(4)):
            (hand.loss(*batch) / 2).backward()
            if index % 2:
                hand.step()
        ours = module(model=net)
        trainer(accumulate_grad_batches=2).fit(ours, loaders())
        torch.testing.assert_close(weights_of(ours.teacher), weights_of(hand.ema))

    @pytest.mark.parametrize("teacher", ["self", "ema"])
    def test_bf16_amp(self, teacher):
        net = ConvNet()
        results = []
        for precision in ("32-true", "bf16-mixed"):
            ours, losses = module(teacher, copy.deepcopy(net), ramp=0.0), Losses()
            trainer(losses, precision=precision).fit(ours, loaders())
            results.append((losses.values, weights_of(ours.model)))
        assert results[0][0] == pytest.approx(results[1][0], rel=0.05)
        before = weights_of(net)
        for name, _ in net.named_parameters():
            steps32, steps16 = (weights[name] - before[name] for _, weights in results)
            if name == "layer2.0.bias":  # before batch normalisation: it has no effect and no gradient
                continue
            # all weights learn: a teacher's pass under no_grad leaves no gradient-free copies in autocast's cache
            assert torch.cosine_similarity(steps32.flatten(), steps16.flatten(), 0) > 0.9, name

    def test_auto_layers(self):
        ours, draws = module(layers="auto"), Draws()
        expected = eligible_layers(ours, images(N)[0]).default
        trainer(draws, max_epochs=3).fit(ours, loaders())
        assert ours.mixup.layers_ == expected == ["input", "model.conv1", "model.layer1"]
        assert set(draws.layers) == set(expected)
        assert ours.model.layer2[1].num_batches_tracked == 3 * 4 * 2  # passes that train, and no other

    def test_unlabelled_batches_may_be_bare_tensors(self):
        class Bare(torch.utils.data.Dataset):
            def __len__(self):
                return M

            def __getitem__(self, index):
                return images(M)[0][index]

        data = {"labelled": DataLoader(TensorDataset(*images(N)), N), "unlabelled": DataLoader(Bare(), M)}
        trainer().fit(module(), CombinedLoader(data, "max_size_cycle"))

    def test_no_hook_is_left(self):
        ours = module()
        trainer().fit(ours, loaders())
        assert not any(part._forward_hooks for part in ours.modules())

    @pytest.mark.filterwarnings("ignore:.*in eval mode at the start")
    def test_frozen_statistics_stay_frozen_in_the_teacher_too(self):
        ours = module()
        for network in (ours.model, ours.teacher):
            network.layer2[1].eval()
        before = weights_of(ours)
        trainer().fit(ours, loaders())
        for network in ("model", "teacher"):
            name = f"{network}.layer2.1.running_mean"
            assert torch.equal(weights_of(ours)[name], before[name])

    def test_two_processes(self, tmp_path):
        net = ConvNet()
        together(train_a_share, net, tmp_path)
        first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
        assert len(first["lams"]) == 2 * 2  # epochs, batches
        assert first["layers"] == second["layers"]
        assert len(set(first["layers"])) > 1
        assert not set(first["lams"]) & set(second["lams"])
        for name, value in first["parameters"].items():
            assert torch.equal(value, second["parameters"][name]), name
        assert first["teacher_error"] == second["teacher_error"]

        hand = ByHand(net, "ema", ramp_steps=4 * 0.5)
        (x, y), u = images(N * 4, seed=1), images(M * 4, seed=2)[0]
        for epoch in range(2):
            orders = [[shard(len(samples), rank, epoch) for samples in (x, u)] for rank in range(2)]
            for batch in range(2):
                losses = []
                for rank, (labelled, unlabelled) in enumerate(orders):
                    l_, u_ = labelled[N * batch : N * (batch + 1)], unlabelled[M * batch : M * (batch + 1)]
                    losses.append(hand.loss(x[l_], y[l_], u[u_], rank))
                (sum(losses) / 2).backward()
                hand.step()
        for part, network in (("model", hand.student), ("teacher", hand.ema)):
            for name, value in network.named_parameters():
                torch.testing.assert_close(first["parameters"][f"{part}.{name}"], value.detach())


def shard(n, rank, epoch):
    """What one of two processes sees in an epoch, by the sampler that Lightning puts in place of a loader's own."""
    sampler = DistributedSampler(range(n), num_replicas=2, rank=rank, seed=0)
    sampler.set_epoch(epoch)
    return list(sampler)


class Save(Draws):
    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def on_fit_end(self, trainer, ours):
        state = {"layers": self.layers, "lams": self.lams}
        state["teacher_error"] = trainer.callback_metrics["val/teacher_error"]
        state["parameters"] = {name: p.detach() for name, p in ours.named_parameters()}
        torch.save(state, self.folder / f"{trainer.global_rank}.pt")


def train_a_share(rank, net, folder):
    os.environ["PL_GLOBAL_SEED"] = "0"
    validation = DataLoader(TensorDataset(*images(24, seed=3)), 6)
    t = trainer(Save(folder), max_epochs=2, devices=2, strategy=DDPStrategy(process_group_backend="gloo"))
    t.fit(module(model=copy.deepcopy(net)), loaders(), validation)  # a net that is handed over shares its memory
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("teacher", ["self", "ema"])
def test_load_from_checkpoint(teacher, tmp_path):
    given = {"w_max": 7.0, "ramp": 0.25, "alpha_labelled": 0.5, "alpha_unlabelled": 2.0, "ema_decay": 0.9}
    ours = module(teacher, **given)
    t = trainer()
    t.fit(ours, loaders())
    t.save_checkpoint(tmp_path / "a.ckpt")
    loaded = SemiSupervisedManifoldMixupModule.load_from_checkpoint(tmp_path / "a.ckpt", model=ConvNet())
    assert dict(loaded.hparams) == dict(ours.hparams)
    assert {name: loaded.hparams[name] for name in given} == given
    assert (loaded.mixup.seed, loaded.mixup.layers) == (5, LAYERS)
    assert loaded.mixup.alphas == {"labelled": 0.5, "unlabelled": 2.0}
    torch.testing.assert_close(weights_of(loaded), weights_of(ours), rtol=0, atol=0)


class TestEvaluation:
    @pytest.mark.parametrize("stage", ["val", "test"])
    def test_student_and_teacher(self, stage):
        ours = module()
        t = trainer(max_epochs=3)
        t.fit(ours, loaders())
        ours.eval()
        x, y = images(24, seed=3)
        data = DataLoader(TensorDataset(x, y), 10)
        [values] = (t.validate if stage == "val" else t.test)(ours, data, verbose=False)
        with torch.no_grad():
            for prefix, network in (("", ours.model), ("teacher_", ours.teacher)):
                logits = network(x)
                assert values[f"{stage}/{prefix}error"] == pytest.approx((logits.argmax(1) != y).float().mean().item())
                assert values[f"{stage}/{prefix}nll"] == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-5)
        assert values[f"{stage}/nll"] != values[f"{stage}/teacher_nll"]

    def test_without_teacher_nothing_is_said_of_one(self):
        ours = module("self")
        t = trainer()
        t.fit(ours, loaders(), DataLoader(TensorDataset(*images(24)), 10))
        assert "val/error" in t.callback_metrics
        assert not any("teacher" in name for name in t.callback_metrics)


class TestErrors:
    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"teacher": "mean"}, "teacher to be 'self' or 'ema', got 'mean'"),
            ({"w_max": -1.0}, "w_max to be a finite number >= 0, got -1.0"),
            ({"w_max": math.inf}, "w_max"),
            ({"ramp": 40.0}, r"ramp in \[0, 1\], got 40.0"),
            ({"ema_decay": 1.5}, "ema_decay"),
            ({"alpha_unlabelled": -1.0}, "alpha"),
            ({"alpha_labelled": math.nan}, "alpha"),
        ],
    )
    def test_arguments(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            module(**kwargs)

    def test_logits_of_other_classes_than_num_classes_says(self):
        net = nn.Sequential(nn.Flatten(), nn.Linear(108, CLASSES + 1))
        with pytest.raises(ValueError, match=r"Expected \(n, 4\) logits .*, got \(6, 5\)"):
            trainer().fit(module(model=net, layers=["input"]), loaders())

    def test_published_defaults(self):
        for teacher, expected in (("self", (1.0, 0.4)), ("ema", (100.0, 0.25))):
            ours = SemiSupervisedManifoldMixupModule(ConvNet(), CLASSES, teacher)
            assert (ours.w_max, ours.ramp) == expected

    def test_callback_beside_it(self):
        with pytest.raises(MisconfigurationException, match=r"own mixes both parts of a batch"):
            trainer(ManifoldMixupCallback()).fit(module(), loaders())

    @pytest.mark.parametrize("data", [TensorDataset(*images(N)), None])
    def test_other_batches(self, data):
        batches = (
            DataLoader(data, N) if data else CombinedLoader({"labelled": DataLoader(TensorDataset(*images(N)), N)})
        )
        with pytest.raises(ValueError, match=r'"labelled": \(x, y\), "unlabelled": \(x, ...\)'):
            trainer().fit(module(), batches)

    @pytest.mark.parametrize(
        "batch",
        [
            {"labelled": images(N), "unlabelled": None},  # CombinedLoader's mode "max_size", at the end of the shorter
            {"labelled": None, "unlabelled": images(N)},
            {"labelled": images(2)[0], "unlabelled": images(N)},  # two images and no labels
            {"labelled": images(N), "unlabelled": []},
        ],
    )
    def test_parts_that_are_missing(self, batch):
        with pytest.raises(ValueError, match='in mode "max_size_cycle" makes them'):
            trainer().fit(module(), DataLoader([batch], batch_size=None, collate_fn=lambda batch: batch))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_an_average_that_would_be_rounded_away(self, dtype):
        teacher, student = (nn.Linear(1, 1, dtype=dtype) for _ in range(2))
        nn.init.ones_(teacher.weight)
        nn.init.constant_(student.weight, 1.25)
        update_teacher(teacher, student, step=5000)
        assert teacher.weight.item() == 1  # the reason
        with pytest.raises(MisconfigurationException, match="float32 or wider for an EMA teacher, got torch"):
            trainer().fit(module(model=ConvNet().to(dtype)), loaders())

    def test_training_without_an_end(self):
        with pytest.raises(MisconfigurationException, match="max_epochs or max_steps"):
            trainer(max_epochs=-1).fit(module(), loaders())

    @pytest.mark.parametrize(
        ("layers", "message"),
        [
            (["model.layer9"], "layer9"),
            (["model.fc"], "gives the final output"),
            (["teacher.layer1"], "never called"),
            (["model.layer2", "model.inner.0"], "inner.0' .* not one single state"),
        ],
    )
    def test_layers(self, layers, message):
        teacher = "self" if "teacher" not in layers[0] else "ema"
        with pytest.raises((ValueError, MisconfigurationException), match=message):
            trainer().fit(module(teacher, WithShortcut(), layers=layers), loaders())

    def test_data_module_that_would_take_the_place_of_the_teacher(self):
        class Data(L.LightningDataModule):
            def train_dataloader(self):
                return loaders()

            def on_after_batch_transfer(self, batch, dataloader_idx):
                return batch

        with pytest.raises(MisconfigurationException, match="without `on_after_batch_transfer`, got Data"):
            trainer().fit(module(), datamodule=Data())

    @pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # in the teacher's pass
    @pytest.mark.parametrize("reentrant", [True, False])
    def test_layers_that_backward_would_compute_again(self, reentrant):
        """With parts of one size, so that no shape would tell that they are mistaken for each other."""
        batches = DataLoader(
            [{"labelled": list(images(N, seed=1)), "unlabelled": images(N, seed=2)[0]}] * 3, batch_size=None
        )
        net = Checkpointed(reentrant)
        before = weights_of(net)
        with pytest.raises(MixingError, match="inside an activation checkpoint"):
            trainer().fit(module(model=net, layers=["model.layer1"]), batches)
        for name, parameter in net.named_parameters():
            assert torch.equal(parameter, before[name])

        around = ["input", "model.conv1"]
        nets = [Checkpointed(reentrant), ConvNet()]
        nets[1].load_state_dict(nets[0].state_dict())
        runs = [Losses(), Losses()]
        for net, losses in zip(nets, runs, strict=True):
            trainer(losses, max_epochs=2).fit(module(model=net, layers=around), batches)
        assert runs[0].values == pytest.approx(runs[1].values, rel=1e-5)


class WithShortcut(ConvNet):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())

    def forward(self, x):
        h = self.conv1(x)
        return self.fc(self.layer2(self.layer1(h + self.inner(h))).mean((2, 3)))


class Checkpointed(ConvNet):
    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x):
        h = checkpoint(lambda h: self.layer2(self.layer1(h)), self.conv1(x), use_reentrant=self.reentrant)
        return self.fc(h.mean((2, 3)))


def test_compiled_network_is_mixed_as_any_other():
    nets = [ConvNet(), ConvNet()]
    nets[1].load_state_dict(nets[0].state_dict())
    nets[1].compile(backend="eager")
    runs = [Losses(), Losses()]
    for net, losses in zip(nets, runs, strict=True):
        trainer(losses, max_epochs=3).fit(module(model=net), loaders())
    assert runs[0].values == pytest.approx(runs[1].values, rel=1e-5)


S = ["input", "model.layer1", "model.layer2"]
ICT = {"teacher": "ema", "w_max": 100.0, "ramp": 0.25, "ema_decay": 0.999, "layers": ["input"]}
ICLR = {"teacher": "self", "ramp": 0.4, "alpha_labelled": 0.1, "alpha_unlabelled": 2.0, "layers": S}
PUBLISHED = {  # of the model; epochs; labels in all, validation images, unlabelled images
    "semi_cifar10": (ICT | {"alpha_labelled": 1.0, "alpha_unlabelled": 1.0}, 400, 4000, 5000, 45_000),
    "semi_svhn": (ICT | {"alpha_labelled": 0.1, "alpha_unlabelled": 0.1}, 400, 1000, 1000, 72_257),
    "semi_cifar10-self": (ICLR | {"w_max": 1.0}, 1000, 4000, 5000, 45_000),
    "semi_svhn-self": (ICLR | {"w_max": 2.0}, 1000, 1000, 7320, 65_937),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of jsonargparse, by Lightning
class TestRecipes:
    @pytest.mark.parametrize("name", PUBLISHED)
    def test_published_rows_become_what_they_say(self, name):
        """The papers' numbers, typed in again."""
        expected, epochs, labels, validation, unlabelled = PUBLISHED[name]
        cli = Prepared(["--config", name, "--trainer.accelerator", "cpu", "--trainer.logger", "false"], run=False)
        cli.make()
        ours, data = cli.model, cli.datamodule
        teacher = "self" if ours.teacher is None else "ema"
        assert {"teacher": teacher} | {key: ours.hparams[key] for key in expected if key != "teacher"} == expected
        assert sum(p.numel() for p in ours.model.parameters()) == 1_467_610  # WRN-28-2
        assert cli.trainer.max_epochs == epochs
        assert (data.num_classes * data.labels_per_class, data.datamodule.val_size) == (labels, validation)
        assert (data.labelled_batch_size, data.unlabelled_batch_size) == (100, 100)

        configured = ours.configure_optimizers()
        options, schedule = configured["optimizer"].defaults, configured["lr_scheduler"]
        iclr = name.endswith("-self")
        assert isinstance(configured["optimizer"], torch.optim.SGD)
        assert (options["lr"], options["momentum"], options["nesterov"]) == (0.1, 0.9, iclr)
        assert options["weight_decay"] == (5e-4 if iclr else 1e-4)
        if iclr:
            assert schedule["interval"] == "epoch"
            assert dict(schedule["scheduler"].milestones) == {500: 1, 750: 1, 875: 1}
            assert schedule["scheduler"].gamma == 0.1
        else:
            assert schedule["interval"] == "step"
            assert schedule["scheduler"].T_max == 450 * -(-unlabelled // 100)

    def test_small_ones_train_and_test_student_and_teacher(self):
        names = [name for name in recipes.names() if name.startswith("semi_digits")]
        for name in [*names, "semi_digits-supervised-wrn"]:
            cli = Prepared(
                ["--config", name, "--trainer.logger", "false", "--trainer.enable_progress_bar", "false"], run=False
            )
            schedule = cli.config.model.init_args.get("lr_scheduler")
            assert (schedule is not None) == name.endswith("-wrn")
            if schedule is not None:
                steps = cli.config.trainer.max_epochs * 1000 // cli.config.data.init_args.unlabelled_batch_size
                assert schedule.init_args.total_steps == steps
            cli.config.trainer.max_steps = 3
            cli.make()
            cli.trainer.fit(cli.model, datamodule=cli.datamodule)
            assert cli.trainer.global_step == 3
            [values] = cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
            assert ("test/teacher_error" in values) == (cli.model.teacher is not None), name
            assert (cli.model.w_max == 0) == ("supervised" in name)


class _Spread(L.Callback):
    """Now and then, standard deviation of the test logits over images, mean over classes, and test error."""

    def __init__(self, every):
        self.every, self.spreads, self.errors = every, [], []

    @torch.no_grad()
    def on_train_epoch_end(self, trainer, pl_module):
        if (trainer.current_epoch + 1) % self.every == 0:
            network = copy.deepcopy(pl_module.model).eval()
            images, labels = zip(*trainer.datamodule.test_dataloader(), strict=True)
            logits = network(torch.cat(images))
            self.spreads.append(logits.std(0).mean().item())
            self.errors.append((logits.argmax(1) != torch.cat(labels)).float().mean().item())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Lightning calls what jsonargparse deprecates
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_an_own_teacher_without_shifts_shrinks_its_logits(seed):
    """Why README's own teacher fails there: linear between its own logits is what a constant is, too."""
    watched = {}
    for name in ("semi_digits-supervised-wrn", "semi_digits-self-wrn"):
        data = "--data.init_args.datamodule.init_args."
        options = [f"{data}padding=0", f"{data}seed={seed}"]
        options += ["--trainer.logger=false", "--trainer.enable_progress_bar=false"]
        cli = Prepared(["--config", name, *options], run=False)
        cli.config.seed_everything = seed
        cli.make()
        watched[name] = _Spread(every=50)
        cli.trainer.callbacks.append(watched[name])
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
        print(name, seed, "spread", watched[name].spreads, "error", watched[name].errors)
    alone, own = watched.values()
    assert alone.spreads[0] < alone.spreads[1] < alone.spreads[2]
    assert own.spreads[0] > own.spreads[1] > own.spreads[2]
    assert own.spreads[2] < 0.5 * own.spreads[0]
    assert own.errors[2] > own.errors[0]
    assert own.errors[2] > 1.5 * alone.errors[2]
