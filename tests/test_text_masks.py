"""A state that is mixed across lengths is seen through the union of both masks (MixText, SSMix)."""

import pytest
import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import nn
from torch.utils.data import DataLoader

from lightning_manifold_mixup import ManifoldMixupCallback
from tests.exactness import by_hand, train


class Classifier(LightningModule):
    """``padding``: whether the mask of its batches says what is padding, not what is text."""

    def __init__(self, padding):
        super().__init__()
        self.padding = padding
        self.emb = nn.Embedding(30, 8).double()
        self.enc = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double()
        self.head = nn.Linear(8, 3).double()

    def logits(self, h, seen):
        h = self.enc(h, src_key_padding_mask=~seen)
        return self.head((h * seen[..., None]).sum(1) / seen.sum(1, keepdim=True))

    def training_step(self, batch, batch_idx):
        mask = batch["padding_mask" if self.padding else "attention_mask"].bool()
        logits = self.logits(self.emb(batch["input_ids"]), ~mask if self.padding else mask)
        return F.cross_entropy(logits, batch["labels"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("dtype", [torch.bool, torch.long])
def test_union(padding, dtype):
    ids, y = torch.randint(1, 30, (24, 7)), torch.randint(3, (24,))
    seen = torch.arange(7) < torch.randint(2, 8, (24, 1))
    mask = (~seen if padding else seen).to(dtype)
    name = "padding_mask" if padding else "attention_mask"
    samples = [{"input_ids": i, name: m, "labels": label} for i, m, label in zip(ids, mask, y, strict=True)]
    module, batches = Classifier(padding), DataLoader(samples, 8)
    keys = {"mask_key": name} if padding else {}
    seen_batches, _ = train(module, batches, ManifoldMixupCallback(layers=["emb"], seed=0, **keys))

    for (draw, weights, value, grads), batch in zip(seen_batches, batches, strict=True):

        def step(twin, batch, choose, mix, partners=draw.mix.partners):
            own = batch[name].bool() ^ padding
            return F.cross_entropy(
                twin.logits(mix(twin.emb(batch["input_ids"])), own | own[partners]), choose(batch["labels"])
            )

        wanted, wanted_grads = by_hand(module, step, batch, draw, weights)
        torch.testing.assert_close(value, wanted)
        for key, grad in wanted_grads.items():
            torch.testing.assert_close(grads[key], grad)
