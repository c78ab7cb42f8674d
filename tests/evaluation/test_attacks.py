import json
from functools import partial

import lightning as L
import pytest
import torch
import torchattacks
from PIL import Image

from lightning_manifold_mixup.evaluation import AttackCallback, adversarial_correct, fgsm, pgd
from tests.evaluation.classifier import (
    MEAN,
    STD,
    Classifier,
    loader,
    network,
    normalise,
    pixels_and_target,
    trainer,
)

NORMALISED = {"mean": MEAN, "std": STD}


def reference(attack, images, target):
    attack.set_normalization_used(mean=list(MEAN), std=list(STD))
    return attack(images, target)


@pytest.mark.parametrize("epsilon", [1 / 255, 8 / 255, 0.2])
def test_fgsm_equals_torchattacks(epsilon):
    net, (pixels, target) = network(), pixels_and_target()
    images = normalise(pixels)
    expected = reference(torchattacks.FGSM(net, eps=epsilon), images, target)
    torch.testing.assert_close(fgsm(net, images, target, epsilon, **NORMALISED), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("random_start", [False, True])
def test_pgd_equals_torchattacks(random_start):
    net, (pixels, target) = network(), pixels_and_target()
    images = normalise(pixels)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        attack = torchattacks.PGD(net, eps=8 / 255, alpha=2 / 255, steps=6, random_start=random_start)
        expected = reference(attack, images, target)
    generator = torch.Generator().manual_seed(7) if random_start else None
    got = pgd(net, images, target, 8 / 255, steps=6, step_size=2 / 255, generator=generator, **NORMALISED)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("attack", [fgsm, partial(pgd, steps=4, generator=torch.Generator())])
def test_attacked_images_stay_near_and_valid_and_have_a_higher_loss(attack):
    net, (pixels, target) = network(), pixels_and_target()
    pixels[0], pixels[1] = 0.0, 1.0  # nowhere to go below and above
    images, mean, std = normalise(pixels), torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    attacked = attack(net, images, target, 0.05, **NORMALISED)
    moved = attacked * std + mean
    assert moved.min() >= -1e-6
    assert moved.max() <= 1 + 1e-6
    assert (moved - pixels).abs().max() == pytest.approx(0.05, abs=1e-6)
    loss = torch.nn.functional.cross_entropy
    assert loss(net(attacked), target) > loss(net(images), target)


def test_attack_works_in_inference_mode_and_leaves_the_model_alone():
    net, (pixels, target) = network(), pixels_and_target()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net[0].weight.grad = torch.ones_like(net[0].weight)
    outside = fgsm(net, normalise(pixels), target, 0.03, **NORMALISED)
    with torch.inference_mode():
        inside = fgsm(net, normalise(pixels), target + 0, 0.03, **NORMALISED)
    assert torch.equal(inside, outside)
    assert not inside.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(module.training for module in net.modules())
    assert torch.equal(net[0].weight.grad, torch.ones_like(net[0].weight))
    assert all(p.grad is None for p in list(net.parameters())[1:])


def test_attack_is_not_blunted_by_autocast():
    """Gradients are taken in full precision, so the images are those that are found without autocast."""
    net, (pixels, target) = network(), pixels_and_target()
    images = normalise(pixels)
    expected = fgsm(net, images, target, 0.03, **NORMALISED)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fgsm(net, images, target, 0.03, **NORMALISED), expected)


def test_adversarial_correct_counts_by_hand():
    net, (pixels, target) = network(), pixels_and_target()
    images = normalise(pixels)
    attack = partial(fgsm, **NORMALISED)
    correct = adversarial_correct(net, images, target, [0, 0.02], attack)
    assert torch.equal(correct[0], net(images).argmax(1) == target)
    assert torch.equal(correct[1], net(attack(net, images, target, 0.02)).argmax(1) == target)
    assert correct[0].sum() > correct[1].sum()


def test_wrong_normalisation_is_an_error():
    net, (pixels, target) = network(), pixels_and_target()
    with pytest.raises(ValueError, match=r"pixels from -.* pass the mean and std"):
        fgsm(net, normalise(pixels), target, 0.03)
    with pytest.raises(ValueError, match="in pixel units, above 0 and at most 1, got \\[4\\]"):
        AttackCallback([4])


@pytest.mark.parametrize("stage", ["validate", "test"])
@pytest.mark.parametrize("inference_mode", [True, False])
def test_callback_reports_what_the_functions_give(tmp_path, stage, inference_mode):
    callback = AttackCallback(["2/255", 0.05], MEAN, STD, pgd_steps=3, dirname=str(tmp_path))
    module = Classifier()
    t = trainer(callback, inference_mode=inference_mode)
    getattr(t, stage)(module, loader(), verbose=False)
    rows = json.loads((tmp_path / f"{stage[:3] if stage == 'validate' else stage}_attacks.json").read_text())["rows"]
    assert [(row["attack"], row["epsilon"]) for row in rows] == [
        ("none", None), ("fgsm", "2/255"), ("fgsm", "0.05"), ("pgd", "2/255"), ("pgd", "0.05"),
    ]  # fmt: skip
    pixels, target = pixels_and_target()
    attack = partial(fgsm, **NORMALISED)
    expected = adversarial_correct(module.eval(), normalise(pixels), target, [0, 2 / 255, 0.05], attack)
    assert [row["accuracy"] for row in rows[:3]] == pytest.approx(expected.float().mean(1).tolist())
    key = f"{'val' if stage == 'validate' else 'test'}_attacks/fgsm_2_255_accuracy"
    assert t.callback_metrics[key].item() == pytest.approx(rows[1]["accuracy"])
    assert all(p.grad is None for p in module.parameters())


class Data(L.LightningDataModule):
    def test_dataloader(self):
        return loader()


def test_callback_asks_the_data_module_for_the_normalisation(tmp_path):
    data = Data()
    data.mean, data.std = MEAN, STD  # as those of this package have them
    asked = AttackCallback(["4/255"], pgd_steps=2, dirname=str(tmp_path / "asked"))
    trainer(asked).test(Classifier(), data, verbose=False)
    told = AttackCallback(["4/255"], MEAN, STD, pgd_steps=2, dirname=str(tmp_path / "told"))
    trainer(told).test(Classifier(), loader(), verbose=False)
    assert asked.rows == told.rows


def test_normalised_images_of_a_data_module_that_does_not_tell_are_refused():
    with pytest.raises(ValueError, match="pass the mean and std"):
        trainer(AttackCallback(["4/255"])).test(Classifier(), Data(), verbose=False)


def test_callback_is_reproducible_and_does_not_run_during_fit(tmp_path):
    results, states = [], []
    for run in "ab":
        callback = AttackCallback(["4/255"], MEAN, STD, pgd_steps=2, dirname=str(tmp_path / run))
        for callbacks in ([], [callback]):
            torch.manual_seed(0)
            trainer(*callbacks).test(Classifier(), loader(), verbose=False)
            states.append(torch.get_rng_state())
        results.append((tmp_path / run / "test_attacks.csv").read_text())
    assert results[0] == results[1]
    assert torch.equal(states[0], states[1])  # the global generator is as without the callback
    callback = AttackCallback(["4/255"], MEAN, STD, dirname=str(tmp_path / "fit"))
    trainer(callback, max_epochs=1).fit(Classifier(), loader(), loader())
    assert not (tmp_path / "fit").exists()


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_callback_in_other_precisions(tmp_path, precision):
    accuracy = {}
    for p in ("32-true", precision):
        t = trainer(AttackCallback(["4/255"], MEAN, STD, pgd_steps=2, dirname=str(tmp_path)), precision=p)
        t.test(Classifier(), loader(), verbose=False)
        accuracy[p] = {name: v.item() for name, v in t.callback_metrics.items() if "attacks" in name}
    assert accuracy[precision] == pytest.approx(accuracy["32-true"], abs=0.05)


def test_picture_is_written(tmp_path):
    trainer(AttackCallback(mean=MEAN, std=STD, pgd_steps=2, dirname=str(tmp_path))).test(
        Classifier(), loader(), verbose=False
    )
    with Image.open(tmp_path / "test_attacks.png") as picture:
        assert min(picture.size) > 400
        assert len(picture.convert("RGB").getcolors(1_000_000)) > 10  # something is drawn


def test_steps_are_checked():
    net, (pixels, target) = network(), pixels_and_target()
    with pytest.raises(ValueError, match="at least one step, got 0"):
        pgd(net, normalise(pixels), target, 0.03, steps=0, **NORMALISED)
    with pytest.raises(ValueError, match="pgd_steps of at least 0, got -1"):
        AttackCallback(pgd_steps=-1)
