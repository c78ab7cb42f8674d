"""A labelled and an unlabelled loader."""

import json
from collections import Counter

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from lightning_manifold_mixup.paper.data import (
    CIFAR10DataModule,
    ClassificationDataModule,
    DigitsDataModule,
    ImageFolderDataModule,
    SemiSupervisedDataModule,
    SpiralsDataModule,
)
from lightning_manifold_mixup.paper.data.batches import VectorDataset
from lightning_manifold_mixup.paper.data.semi_supervised import RepeatingSampler
from tests.paper.data.samples import Tiny, draw_images, trainer, write_cifar
from tests.processes import together


class TestSemiSupervised:
    def data(self, **options):
        settings = {"labels_per_class": 5, "labelled_batch_size": 20, "unlabelled_batch_size": 64}
        return SemiSupervisedDataModule(
            DigitsDataModule(val_size=100, seed=options.pop("seed", 0)), **settings | options
        )

    def test_labelled_samples_are_those_of_the_supervised_run(self):
        data = self.data()
        supervised = DigitsDataModule(val_size=100, labels_per_class=5).train_set
        assert torch.equal(data.datamodule.train_set.images[data.labelled_indices], supervised.images)

    def test_epoch(self):
        data = self.data()
        torch.manual_seed(0)
        loader = data.train_dataloader()
        epochs = [[batch for batch, *_ in loader] for _ in range(2)]
        for batches in epochs:
            assert len(batches) == len(loader) == 15  # 900 unlabelled samples in batches of 64
            assert all(batch["labelled"][0].shape == (20, 1, 8, 8) for batch in batches)
            x = torch.cat([batch["unlabelled"][0] for batch in batches])
            rows = Counter(bytes(image.flatten().view(torch.uint8).tolist()) for image in x)
            every, _ = data.datamodule.train_set.__getitems__(range(900))
            assert rows == Counter(bytes(image.flatten().view(torch.uint8).tolist()) for image in every)
            labelled = torch.cat([batch["labelled"][0] for batch in batches])
            seen = Counter(bytes(image.flatten().view(torch.uint8).tolist()) for image in labelled)
            assert sorted(seen.values()) == [6] * 50  # 300 draws: six passes over fifty samples
            y = torch.cat([batch["labelled"][1] for batch in batches])
            assert y.bincount().tolist() == [30] * 10
        orders = [torch.cat([batch[name][1] for batch in batches]) for name in batches[0] for batches in epochs]
        assert not torch.equal(orders[0][:50], orders[0][50:100])  # each pass in a new order
        assert not torch.equal(orders[2], orders[3])

    def test_every_epoch_has_a_new_order_of_both(self, tmp_path):
        model = Tiny(64, 10, semi_supervised=True)
        trainer(tmp_path, max_epochs=2).fit(model, datamodule=self.data())
        assert len(model.steps) == 30
        for name in ("labelled", "unlabelled"):
            first, second = (torch.cat([step[name] for step in half]) for half in (model.steps[:15], model.steps[15:]))
            assert torch.equal(first.bincount(), second.bincount())
            assert not torch.equal(first, second)

    @pytest.mark.parametrize("name", ["spirals", "cifar10", "folder in memory", "folder on request"])
    def test_any_data_module(self, name, tmp_path, monkeypatch):
        if name == "spirals":
            wrapped, shape, classes, n = SpiralsDataModule(samples_per_class=20, val_size=6), (2,), 2, 34
        elif name == "cifar10":
            from torchvision.datasets import cifar

            write_cifar(tmp_path, 10)
            monkeypatch.setattr(cifar, "check_integrity", lambda path, md5=None: True)
            monkeypatch.setattr(cifar.CIFAR10, "_check_integrity", lambda self: True)
            wrapped, shape, classes, n = CIFAR10DataModule(str(tmp_path), val_size=20), (3, 32, 32), 10, 80
        else:
            draw_images(tmp_path / "train", 12)
            in_memory = name.endswith("memory")
            wrapped = ImageFolderDataModule(str(tmp_path), image_size=6, in_memory=in_memory)
            shape, classes, n = (3, 6, 6), 3, 36
        data = SemiSupervisedDataModule(wrapped, 2, labelled_batch_size=2 * classes, unlabelled_batch_size=8)
        batches = [batch for batch, *_ in data.train_dataloader()]
        assert len(batches) == -(-n // 8)
        assert sum(len(batch["unlabelled"][1]) for batch in batches) == n
        for batch in batches:  # each has every labelled sample once
            x, y = batch["labelled"]
            assert x.shape == (2 * classes, *shape)
            assert x.dtype == batch["unlabelled"][0].dtype == torch.float32
            assert y.bincount().tolist() == [2] * classes

    def test_few_unlabelled_steps_govern_too(self):
        data = self.data(labels_per_class=20, labelled_batch_size=10, unlabelled_batch_size=500)
        assert [len(batch["labelled"][1]) for batch, *_ in data.train_dataloader()] == [10, 10]

    @pytest.mark.parametrize(("world", "size", "n"), [(1, 10, 25), (2, 7, 10), (3, 50, 10)])
    def test_sampler_shards_each_pass(self, world, size, n):
        samplers = [RepeatingSampler(range(size), n, world, rank, seed=1) for rank in range(world)]
        orders = []
        for epoch in range(2):
            for sampler in samplers:
                sampler.set_epoch(epoch)
            draws = [list(sampler) for sampler in samplers]
            assert [len(d) for d in draws] == [len(s) for s in samplers] == [n] * world
            stream = [draws[i % world][i // world] for i in range(n * world)]
            for start in range(0, len(stream) - size + 1, size):
                assert sorted(stream[start : start + size]) == list(range(size))
            assert max(Counter(stream).values()) - min(Counter(stream + list(range(size))).values()) <= 1
            orders.append(stream)
        assert orders[0] != orders[1]

    def test_sampler_follows_seed_everything(self, monkeypatch):
        orders = []
        for seed in ("1", "1", "2"):
            monkeypatch.setenv("PL_GLOBAL_SEED", seed)
            orders.append(list(RepeatingSampler(range(50), 50)))
        assert orders[0] == orders[1] != orders[2]

    def test_evaluation_and_attributes_are_those_of_the_data(self):
        data = self.data()
        assert (data.num_classes, data.mean, data.in_channels) == (10, (0.3053,), 1)
        assert len(data.val_dataloader().dataset) == 100
        assert len(data.test_dataloader().dataset) == len(data.predict_dataloader().dataset) == 797
        with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
            _ = data.nonsense
        assert not hasattr(SemiSupervisedDataModule(SpiralsDataModule(), labels_per_class=5), "mean")

    def test_resume_with_the_same_labels(self, tmp_path):
        run = trainer(tmp_path)
        run.fit(Tiny(64, 10, semi_supervised=True), datamodule=self.data())
        checkpoint = tmp_path / "last.ckpt"
        run.save_checkpoint(checkpoint)
        stored = torch.load(checkpoint, weights_only=True)["SemiSupervisedDataModule"]
        assert stored == {"labelled_indices": self.data().labelled_indices.tolist()}
        model = Tiny(64, 10, semi_supervised=True)
        trainer(tmp_path, max_epochs=2).fit(model, datamodule=self.data(), ckpt_path=checkpoint)
        assert len(model.steps) == 15
        for options, message in (
            ({"seed": 1}, r"expected the 50 labelled samples of the checkpoint, got 50, \d+ of them the same"),
            ({"labels_per_class": 10}, r"the 50 labelled samples of the checkpoint, got 100, 50 of them the same"),
        ):
            with pytest.raises(ValueError, match=message):
                trainer(tmp_path, max_epochs=2).fit(model, datamodule=self.data(**options), ckpt_path=checkpoint)
        trainer(tmp_path).test(model, datamodule=self.data(seed=1), ckpt_path=checkpoint, verbose=False)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"labels_per_class": 0}, "expected labels_per_class of at least 1, got 0"),
            ({"labelled_batch_size": 0}, "expected labelled_batch_size of at least 1, got 0"),
            ({"unlabelled_batch_size": 0}, "expected unlabelled_batch_size of at least 1, got 0"),
        ],
    )
    def test_bad_arguments(self, options, message):
        with pytest.raises(ValueError, match=message):
            self.data(**options)

    def test_data_that_is_limited_itself(self):
        with pytest.raises(ValueError, match=r"expected a data module with labels_per_class=None .* got 4"):
            SemiSupervisedDataModule(DigitsDataModule(labels_per_class=4), labels_per_class=4)
        with pytest.raises(ValueError, match=r"at most \d+, the training samples of class"):
            _ = self.data(labels_per_class=500).labelled_indices

    def test_two_processes_share_both_streams(self, tmp_path):
        """A real run of two processes: what each saw of one epoch."""
        together(spy_on_a_share, tmp_path)
        seen = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
        for name, batch in (("labelled", 20), ("unlabelled", 64)):
            sizes = [[len(step) for step in rank[name]] for rank in seen]
            assert sizes[0] == sizes[1]
            assert sizes[0][0] == batch
        unlabelled = [{index for step in rank["unlabelled"] for index in step} for rank in seen]
        assert len(seen[0]["unlabelled"]) == len(seen[0]["labelled"]) == 8  # 450 each in batches of 64
        assert not unlabelled[0] & unlabelled[1]
        assert len(unlabelled[0] | unlabelled[1]) == 900
        draws = [[index for step in rank["labelled"] for index in step] for rank in seen]
        stream = [index for pair in zip(*draws, strict=True) for index in pair]
        for start in range(0, 300, 50):
            assert len(set(stream[start : start + 50])) == 50  # each pass is shared out


class Numbers(ClassificationDataModule):
    class_names = tuple("0123456789")

    def make_dataset(self, split):
        return VectorDataset(torch.arange(900.0).unsqueeze(1), torch.arange(900) % 10) if split == "train" else None


class Spy(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(1, 1)
        self.seen = {"labelled": [], "unlabelled": []}

    def training_step(self, batch, batch_idx):
        for name, (x, _) in batch.items():
            self.seen[name].append(x.flatten().int().tolist())
        return self.linear(batch["labelled"][0]).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def spy_on_a_share(rank, folder):
    data = SemiSupervisedDataModule(Numbers(), 5, labelled_batch_size=20, unlabelled_batch_size=64)
    spy = Spy()
    trainer(folder, devices=2, strategy=DDPStrategy(process_group_backend="gloo")).fit(spy, datamodule=data)
    (folder / f"rank{rank}.json").write_text(json.dumps(spy.seen))
    torch.distributed.destroy_process_group()
