"""A state that is mixed across lengths is seen through the union of both masks (MixText, SSMix)."""

import pytest
import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import nn
from torch.utils.data import DataLoader

from lightning_manifold_mixup import ManifoldMixupCallback, MixingError
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


class Deep(Classifier):
    """Has a layer after the first use of the mask; ``masked`` makes that of a batch."""

    def __init__(self, masked):
        super().__init__(padding=False)
        self.masked = masked
        self.enc2 = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double()

    def logits(self, h, seen):
        h = self.enc2(self.enc(h, src_key_padding_mask=~seen), src_key_padding_mask=~seen)
        return self.head((h * seen[..., None]).sum(1) / seen.sum(1, keepdim=True))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.logits(self.emb(batch["input_ids"]), self.masked(batch)), batch["labels"])


def texts(**more):
    seen = torch.arange(7) < torch.randint(2, 8, (24, 1))
    ids, y = torch.randint(1, 30, (24, 7)) * seen, torch.randint(3, (24,))
    rows = {"input_ids": ids, "labels": y, **{name: make(seen) for name, make in more.items()}}
    return DataLoader([{name: value[i] for name, value in rows.items()} for i in range(24)], 8)


@pytest.mark.parametrize("make", [torch.Tensor.long, torch.Tensor.double], ids=["long", "double"])
def test_layers_after_the_first_use_of_the_mask(make):
    """The masks are the samples' own where the network reads them before layer k: no mistake of the step."""
    torch.manual_seed(0)
    module, batches = Deep(lambda batch: batch["attention_mask"].bool()), texts(attention_mask=make)
    seen_batches, warned = train(module, batches, ManifoldMixupCallback(layers=["enc"], seed=0))
    assert not [message for message in warned if "mask" in message]

    for (draw, weights, value, grads), batch in zip(seen_batches, batches, strict=True):

        def step(twin, batch, choose, mix, partners=draw.mix.partners):
            own = batch["attention_mask"].bool()
            seen = own | own[partners]
            h = mix(twin.enc(twin.emb(batch["input_ids"]), src_key_padding_mask=~seen))
            h = twin.enc2(h, src_key_padding_mask=~seen)
            return F.cross_entropy(
                twin.head((h * seen[..., None]).sum(1) / seen.sum(1, keepdim=True)), choose(batch["labels"])
            )

        wanted, wanted_grads = by_hand(module, step, batch, draw, weights)
        torch.testing.assert_close(value, wanted)
        for key, grad in wanted_grads.items():
            torch.testing.assert_close(grads[key], grad)


def test_a_mask_made_from_the_tokens():
    """It cannot be replaced: a warning that names it, and the batch is trained on."""
    torch.manual_seed(0)
    module, batches = Deep(lambda batch: batch["input_ids"] != 0), texts()
    seen_batches, warned = train(module, batches, ManifoldMixupCallback(layers=["emb"], seed=0))
    [message] = [message for message in warned if "mask" in message]
    assert "at 'emb', the mask of a mixed state is that of the one sample" in message
    assert "makes it from batch['input_ids'] (where that is not 0)" in message
    assert "Hand the mask on as batch['attention_mask']" in message

    def step(twin, batch, choose, mix):
        ids = batch["input_ids"]
        return F.cross_entropy(twin.logits(mix(twin.emb(ids)), ids != 0), choose(batch["labels"]))

    for (draw, weights, value, _), batch in zip(seen_batches, batches, strict=True):
        torch.testing.assert_close(value, by_hand(module, step, batch, draw, weights)[0])


class Tagged(Deep):
    def training_step(self, batch, batch_idx):
        h = self.emb(batch["input_ids"])
        return F.cross_entropy(self.head(h.mean(1)), batch["labels"]) + F.mse_loss(
            self.head(h.tanh())[..., 0], batch["tags"].double()
        )


@pytest.mark.parametrize("classes", [2, 4])
def test_a_label_is_no_mask(classes):
    """A second label with a row for each sample is refused, whatever its values."""
    torch.manual_seed(0)
    module = Tagged(lambda batch: batch["input_ids"] != 0)
    batches = texts(tags=lambda seen: torch.randint(classes, seen.shape))
    with pytest.raises(MixingError, match=r"The loss also reads batch\['tags'\]"):
        train(module, batches, ManifoldMixupCallback(layers=["emb"], seed=0))
