"""Segmentation of generated shapes: areas and textures by hand, the module's IoU, a mixed step against the formula."""

import math

import lightning as L
import pytest
import torch
import torch.nn.functional as F

from lightning_manifold_mixup import ManifoldMixupCallback, eligible_layers
from lightning_manifold_mixup.paper.data import ShapesDataModule
from lightning_manifold_mixup.paper.data.shapes import inside_polygon, textured_shapes
from lightning_manifold_mixup.paper.models import UNet
from lightning_manifold_mixup.paper.tasks import SegmentationModule
from tests.helpers import Draws
from tests.helpers import trainer as make_trainer


@pytest.mark.parametrize("sides", [0, 3, 4])
def test_shapes_have_their_area_and_their_corners(sides: int) -> None:
    row, column = torch.meshgrid(torch.arange(800) + 0.5, torch.arange(800) + 0.5, indexing="ij")
    y, x = row[None] - 400, column[None] - 400
    inside = inside_polygon(y, x, torch.full((1, 1, 1), 40_000.0), torch.full((1, 1, 1), 0.3), sides)
    assert inside.sum().item() == pytest.approx(40_000, rel=0.01)
    radius = (y**2 + x**2).sqrt()[inside].max().item()  # of the circle through the corners
    of_area = {
        0: math.sqrt(40_000 / math.pi),
        3: math.sqrt(40_000 * 4 / (3 * math.sqrt(3))),
        4: math.sqrt(40_000 / 2),
    }
    assert radius == pytest.approx(of_area[sides], rel=0.01)


def test_without_noise_the_stripes_tell_the_class() -> None:
    images, masks = textured_shapes(200, 32, shapes=1, noise=0.0, generator=torch.Generator().manual_seed(0))
    step = (images[..., 1:] - images[..., :-1]).square().mean(1).sqrt()
    same = masks[..., 1:] == masks[..., :-1]  # not across an outline
    change = [step[same & (masks[..., 1:] == kind)].mean().item() for kind in range(4)]
    assert change == sorted(change)
    assert change[3] > 2 * change[0]
    present = [set(mask.unique().tolist()) for mask in masks]
    assert all(len(kinds) <= 2 for kinds in present)
    for kind in (1, 2, 3):
        assert sum(kind in kinds for kinds in present) > 40


def test_later_shapes_cover_and_noise_is_added() -> None:
    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(1)

    clean, masks = textured_shapes(20, 16, 3, 0.0, generator())
    noisy, again = textured_shapes(20, 16, 3, 0.5, generator())
    assert torch.equal(masks, again)
    assert (noisy - clean).std().item() == pytest.approx(0.5, rel=0.03)


def test_splits_do_not_depend_on_the_number_of_training_images() -> None:
    few, many = ShapesDataModule(num_images=3, val_images=4), ShapesDataModule(num_images=30, val_images=4)
    assert torch.equal(few.test_set[0][0], many.test_set[0][0])
    assert torch.equal(few.val_set[0][0], many.val_set[0][0])
    firsts = [part[0][0] for part in (few.train_set, few.val_set, few.test_set)]
    assert not torch.equal(firsts[0], firsts[1])
    assert not torch.equal(firsts[1], firsts[2])
    assert ShapesDataModule().val_set is None
    other = ShapesDataModule(seed=1)
    assert not any(torch.equal(other.train_set[0][0], first) for first in firsts)


def test_which_layers_of_the_u_net_can_be_mixed() -> None:
    report = eligible_layers(UNet(4), torch.randn(3, 3, 16, 16))
    assert {"input", "enc1", "dec1"} <= set(report.eligible)
    assert not {"enc2", "enc3", "dec2", "up1", "head"} & set(report.eligible)


def test_iou_by_hand() -> None:
    data = ShapesDataModule(test_images=30, eval_batch_size=20)  # the last batch is shorter
    module = SegmentationModule(UNet(4, channels=2), num_classes=4)
    with torch.no_grad():
        module.model.head.bias.copy_(torch.tensor([2.0, 1.0, 1.0, 1.0]))
    trainer = make_trainer()
    trainer.test(module, datamodule=data, verbose=False)
    images, masks = data.test_set.inputs, data.test_set.labels
    module.eval()
    with torch.no_grad():
        predicted = module(images).argmax(1)
    ious = []
    for kind in range(4):
        either = ((predicted == kind) | (masks == kind)).sum()
        both = ((predicted == kind) & (masks == kind)).sum()
        ious.append((both / either).item())
    assert trainer.callback_metrics["test/iou"].item() == pytest.approx(sum(ious) / 4, abs=1e-6)


@pytest.mark.parametrize("layer", ["input", "model.enc1", "model.dec1"])
def test_a_mixed_step_by_hand(layer: str) -> None:
    data = ShapesDataModule(num_images=4, batch_size=4, size=8)
    module = SegmentationModule(UNet(4, channels=2), num_classes=4)
    seen = {}

    class Spy(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen["batch"] = batch

        def on_before_backward(self, trainer, pl_module, loss):
            seen.update(loss=loss.item(), state={k: v.clone() for k, v in module.state_dict().items()})

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen["gradients"] = [p.grad.clone() for p in module.parameters()]

    callback = ManifoldMixupCallback(layers=[layer], seed=1)
    draws = Draws(callback)
    make_trainer(callback, draws, Spy()).fit(module, datamodule=data)
    [(drawn, lam, partners)] = draws.drawn
    assert drawn == layer
    x, y = seen["batch"]
    twin = UNet(4, channels=2)
    twin.load_state_dict({k.removeprefix("model."): v for k, v in seen["state"].items() if k.startswith("model.")})

    def mixed(h, name):
        return lam * h + (1 - lam) * h[partners] if name == layer else h

    first = mixed(twin.enc1(mixed(x, "input")), "model.enc1")
    second = twin.enc2(twin.pool(first))
    second = twin.dec2(torch.cat([twin.up2(twin.enc3(twin.pool(second))), second], 1))
    logits = twin.head(mixed(twin.dec1(torch.cat([twin.up1(second), first], 1)), "model.dec1"))
    loss = lam * F.cross_entropy(logits, y) + (1 - lam) * F.cross_entropy(logits, y[partners])
    assert seen["loss"] == pytest.approx(loss.item(), rel=1e-5)
    expected = torch.autograd.grad(loss, list(twin.parameters()))
    for one, other in zip(seen["gradients"], expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
