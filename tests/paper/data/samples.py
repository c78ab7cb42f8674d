"""Small data on disk, a classifier and a Trainer that the tests of the data modules share."""

import pickle

import lightning as L
import numpy as np
import torch
from PIL import Image
from torch import nn

from lightning_manifold_mixup.paper.data import (
    CIFAR10DataModule,
    CIFAR100DataModule,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Tiny(L.LightningModule):
    """A linear classifier of flattened inputs."""

    def __init__(self, features, classes, semi_supervised=False):
        super().__init__()
        self.linear = nn.Linear(features, classes)
        self.semi_supervised = semi_supervised
        self.steps = []

    def training_step(self, batch, batch_idx):
        if self.semi_supervised:
            self.steps.append({name: y.clone() for name, (_, y) in batch.items()})
            batch = batch["labelled"]
        x, y = batch
        return nn.functional.cross_entropy(self.linear(x.flatten(1)), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_error", (self.linear(x.flatten(1)).argmax(1) != y).float().mean())

    def test_step(self, batch, batch_idx):
        x, y = batch
        self.log("test_error", (self.linear(x.flatten(1)).argmax(1) != y).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def trainer(tmp_path, **kwargs):
    options = {"max_epochs": 1, "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options |= {"accelerator": "cpu", "default_root_dir": tmp_path, "enable_checkpointing": False}
    return L.Trainer(**(options | kwargs))


COLOURS = {"cat": 0, "dog": 1, "eel": 2}


def draw_images(folder, count, size=(6, 6), suffix="png", seed=0):
    generator = np.random.default_rng(seed)
    for name in COLOURS:
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index:03d}.{suffix}")


def write_cifar(root, classes):
    """The files of CIFAR with a few random images; returns images and labels of both splits."""
    generator = np.random.default_rng(classes)

    def batch(count):
        labels = [index % classes for index in range(count)]
        return generator.integers(0, 256, (count, 3072), dtype=np.uint8), labels

    key = "labels" if classes == 10 else "fine_labels"
    if classes == 10:
        folder = root / "cifar-10-batches-py"
        files = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
        meta = ("batches.meta", {"label_names": list(CIFAR10DataModule.constants.class_names)})
    else:
        folder = root / "cifar-100-python"
        files = {"train": ["train"], "test": ["test"]}
        meta = ("meta", {"fine_label_names": list(CIFAR100DataModule.constants.class_names)})
    folder.mkdir(parents=True)
    (folder / meta[0]).write_bytes(pickle.dumps(meta[1]))
    written = {}
    for split, names in files.items():
        parts = [batch(2 * classes) for _ in names]
        for name, (images, labels) in zip(names, parts, strict=True):
            (folder / name).write_bytes(pickle.dumps({"data": images, key: labels}))
        images = torch.from_numpy(np.concatenate([p[0] for p in parts])).view(-1, 3, 32, 32)
        written[split] = images, [label for _, labels in parts for label in labels]
    return written
