"""RegMixup (Pinto et al. 2022): the loss of the mixed batch beside that of the clean one."""

import pytest
import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_manifold_mixup import ManifoldMixupCallback, MixingError, unmixed
from tests.exactness import Module, by_hand, data, train

CE = F.cross_entropy


def through_numpy(z, y):
    return F.cross_entropy(z, torch.from_numpy(y.numpy()))


@pytest.mark.parametrize("loss", [CE, through_numpy], ids=["one pass", "two passes"])
@pytest.mark.parametrize(("layer", "k"), [("model.1", 2), ("input", 0)])
def test_exact(loss, layer, k):
    module = Module(loss)
    x, y = data()
    batches = DataLoader(TensorDataset(x, y), 8)
    seen, _ = train(module, batches, ManifoldMixupCallback(layers=[layer], seed=0, clean_weight=0.5))

    def mixed(twin, batch, choose, mix):
        h = mix(batch[0]) if layer == "input" else mix(twin.model[:k](batch[0]))
        return loss(twin.model[k:](h), choose(batch[1]))

    def clean(twin, batch, choose, mix):
        return 0.5 * loss(twin.model(batch[0]), batch[1])

    for (draw, weights, value, grads), batch in zip(seen, batches, strict=True):
        parts = [by_hand(module, step, batch, draw, weights) for step in (mixed, clean)]
        torch.testing.assert_close(value, parts[0][0] + parts[1][0])
        for name in grads:
            torch.testing.assert_close(grads[name], parts[0][1][name] + parts[1][1][name])


def test_logs_and_counters_are_those_of_the_clean_pass():
    class Logs(Module):
        calls = 0

        def training_step(self, batch, batch_idx):
            self.calls += 1
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss)
            return loss

    module, plain = Logs(CE), Logs(CE)
    x, y = data(8)
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[ManifoldMixupCallback(layers=["model.1"], clean_weight=1.0)],
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(x, y), 8))
    assert module.calls == 1
    assert trainer.callback_metrics["loss"].item() == pytest.approx(CE(plain.model(x), y).item())


def test_unmixed_in_a_step_of_ones_own():
    class Own(LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Module(CE).model

        def training_step(self, batch, batch_idx):
            x, y = batch
            with unmixed():
                clean = self.model(x)
            return CE(self.model(x), y) + CE(clean, getattr(y, "labels", y))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    module = Own()
    x, y = data()
    with pytest.raises(MixingError, match=r"`with unmixed\(\):` in a step whose input is mixed.*`clean_weight`"):
        train(Own(), DataLoader(TensorDataset(x, y), 8), ManifoldMixupCallback(layers=["input"]))
    batches = DataLoader(TensorDataset(x, y), 8)
    seen, _ = train(module, batches, ManifoldMixupCallback(layers=["model.1"], seed=0))

    def step(twin, batch, choose, mix):
        inputs, labels = batch
        return CE(twin.model[2:](mix(twin.model[:2](inputs))), choose(labels)) + CE(twin.model(inputs), labels)

    for (draw, weights, value, grads), batch in zip(seen, batches, strict=True):
        wanted, wanted_grads = by_hand(module, step, batch, draw, weights)
        torch.testing.assert_close(value, wanted)
        for name, grad in wanted_grads.items():
            torch.testing.assert_close(grads[name], grad)
