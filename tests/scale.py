"""What each process runs for `test_scale.py`; under `torchrun`: `-m tests.scale FOLDER EPOCHS [CHECKPOINT]`."""

import os
import sys

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_manifold_mixup import ManifoldMixupCallback
from tests.helpers import LAYERS, Classifier, ConvNet, Draws, assert_untouched, images, trainer, weights_of

SIZES = ([4, 3, 5, 2], [2, 6, 3, 4], [5, 5, 1, 3], [3, 2, 4, 6])
"""How many samples each process has in each batch of an epoch."""
ACCUMULATE = 2


def batches_of(rank):
    """Indices of the samples in each batch of one process; no two processes share one."""
    numbers = iter(range(sum(map(sum, SIZES[:rank])), sum(map(sum, SIZES[: rank + 1]))))
    return [[next(numbers) for _ in range(size)] for size in SIZES[rank]]


def data():
    return TensorDataset(*images(sum(map(sum, SIZES))))


def network():
    """Without batch norm, whose running statistics are each process's own."""
    torch.manual_seed(0)
    net = ConvNet()
    net.layer2[1] = nn.Identity()
    return net


class Losses(Callback):
    """Notes what is propagated back: a batch whose check tells nothing yet runs once for each labelling."""

    def __init__(self):
        self.values = []

    def on_before_backward(self, trainer, pl_module, loss):
        self.values.append(loss.item() * ACCUMULATE)


def main(folder, epochs, checkpoint=None):
    torch.set_num_threads(1)
    module, callback = Classifier(network()), ManifoldMixupCallback(layers=LAYERS, seed=3)
    draws, losses, saves = Draws(callback), Losses(), ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    t = trainer(
        callback, draws, losses, saves, strategy=DDPStrategy(process_group_backend="gloo"),
        devices=int(os.environ["LOCAL_WORLD_SIZE"]),
        accumulate_grad_batches=ACCUMULATE, max_epochs=int(epochs), use_distributed_sampler=False,
        enable_checkpointing=True,
    )  # fmt: skip
    t.fit(module, DataLoader(data(), batch_sampler=batches_of(t.global_rank)), ckpt_path=checkpoint)
    assert_untouched(module)
    result = {"drawn": draws.drawn, "losses": losses.values, "weights": weights_of(module.model)}
    about = {"world_size": t.world_size, "first_epoch": 0 if checkpoint is None else 1}
    torch.save(result | about, f"{folder}/{t.global_rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
