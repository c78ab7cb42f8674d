"""The draw, public: chosen by strategies, options and overriding; seen by anybody; logged only where it was made."""

import collections
import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_manifold_mixup import AlphaSchedule, Draw, ManifoldMixupCallback, Mix, eligible_layers
from lightning_manifold_mixup._step.batch.keys import Keys
from lightning_manifold_mixup._step.mix.drawing import contexts_of
from lightning_manifold_mixup.partners import ClassBalancedPartners, LabelDistancePartners
from tests.exactness import Module, by_hand, data, train
from tests.helpers import LAYERS, Classifier, Draws, loader, trainer

REFERENCE = Path(__file__).parents[3] / "notebooks" / "07_reference.ipynb"


def draws_of(batches=400, n=6, **options):
    module = Module(F.cross_entropy)
    callback = ManifoldMixupCallback(**{"layers": ["input", "model.1"], "self_check": False} | options)
    draws = Draws(callback)
    x, y = data(n)
    trainer(callback, draws).fit(module, DataLoader(TensorDataset(x.repeat(batches, 1), y.repeat(batches)), n))
    return draws.drawn


def test_weights_of_layers():
    counts = collections.Counter(layer for layer, _, _ in draws_of(layers={"input": 1, "model.1": 3}, seed=1))
    assert counts["model.1"] / 400 == pytest.approx(0.75, abs=4 * np.sqrt(0.75 * 0.25 / 400))


@pytest.mark.parametrize(
    ("layers", "match"),
    [
        (["input", "model.1", "model.1"], r"each layer once, got \['model.1'\].*layers=\{input: 1, model.1: 2\}"),
        ({"input": 1, "model.1": 0}, "weight of layer 'model.1' to be a number > 0, got 0"),
        ({"model.1": 1, "model.[1]": 2}, "one weight for each layer, got two for 'model.1'"),
    ],
)
def test_wrong_weights(layers, match):
    with pytest.raises(ValueError, match=match):
        draws_of(1, layers=layers)


def test_lam_of_a_pair_and_folded():
    lams = np.array([lam for _, lam, _ in draws_of(alpha=(4.0, 1.0), seed=2)])
    assert lams.mean() == pytest.approx(0.8, abs=4 * 0.163 / 20)  # Beta(4, 1): mean 4/5, standard deviation 0.163
    lams = np.array([lam for _, lam, _ in draws_of(alpha=1.0, dominant=True, seed=2)])
    assert lams.min() >= 0.5
    assert lams.mean() == pytest.approx(0.75, abs=4 * 0.144 / 20)  # uniform on [1/2, 1]


@pytest.mark.parametrize("partners", [LabelDistancePartners(0.5), ClassBalancedPartners()], ids=["distance", "classes"])
def test_strategies_train_exactly(partners):
    """Repeated partners: the gradient is that of the formula."""
    module = Module(F.cross_entropy)
    x, y = data()
    if isinstance(partners, LabelDistancePartners):
        module.loss = lambda z, y: F.mse_loss(z[:, 0], y)
        y = y.double() + torch.rand(24)
    batches = DataLoader(TensorDataset(x, y), 8)
    seen, _ = train(module, batches, ManifoldMixupCallback(layers=["model.1"], seed=0, partners=partners))
    assert any(len(set(draw.mix.partners.tolist())) < 8 for draw, *_ in seen)

    def step(twin, batch, choose, mix):
        labels = mix(batch[1]) if batch[1].is_floating_point() else choose(batch[1])
        return module.loss(twin.model[2:](mix(twin.model[:2](batch[0]))), labels)

    for (draw, weights, value, grads), batch in zip(seen, batches, strict=True):
        wanted, wanted_grads = by_hand(module, step, batch, draw, weights)
        torch.testing.assert_close(value, wanted)
        for name in grads:
            torch.testing.assert_close(grads[name], wanted_grads[name])


def test_lam_for_each_sample():
    class Each(ManifoldMixupCallback):
        def draw(self, context):
            return Draw("model.1", Mix(torch.from_numpy(context.own.random(context.n)), context.draw_mix().partners))

    module = Module(F.cross_entropy)
    x, y = data(8)
    [(draw, weights, value, grads)], _ = train(module, DataLoader(TensorDataset(x, y), 8), Each(layers=["model.1"]))
    lam, p = draw.mix.lam, draw.mix.partners
    module.load_state_dict(weights)
    h = module.model[:2](x)
    z = module.model[2:](lam[:, None] * h + (1 - lam[:, None]) * h[p])
    each = [F.cross_entropy(z, labels, reduction="none") for labels in (y, y[p])]
    expected = (lam * each[0] + (1 - lam) * each[1]).mean()
    torch.testing.assert_close(value, expected.detach())
    for (name, _), grad in zip(
        module.named_parameters(), torch.autograd.grad(expected, module.parameters()), strict=True
    ):
        torch.testing.assert_close(grads[name], grad)


def cell_with(text):
    """The source of the cell of the reference notebook that has a text."""
    cells = json.loads(REFERENCE.read_text(encoding="utf-8"))["cells"]
    return next(source for cell in cells if text in (source := "".join(cell["source"])) and cell["cell_type"] == "code")


def test_the_example_in_the_reference():
    source = cell_with("class NearestByLabel").split("class Classifier")[0]
    names = {"ManifoldMixupCallback": ManifoldMixupCallback}
    exec(source, names)
    callback = names["NearestByLabel"](layers=["model.1"], seed=0)
    callback.should_mix = lambda trainer, batch_idx: True
    x, y = data()
    seen, _ = train(Module(F.cross_entropy), DataLoader(TensorDataset(x, y), 8), callback)
    for (draw, *_), labels in zip(seen, y.split(8), strict=True):
        order = labels.argsort().tolist()
        assert all(draw.mix.partners[i] == order[place - 1] for place, i in enumerate(order))


def test_a_draw_that_does_not_fit():
    class Wrong(ManifoldMixupCallback):
        def draw(self, context):
            return Draw("model.3", context.draw_mix())

    with pytest.raises(ValueError, match=r"Expected `draw` to give one of S = \['model.1'\] and 8 partners, got layer"):
        train(Module(F.cross_entropy), DataLoader(TensorDataset(*data()), 8), Wrong(layers=["model.1"]))


def test_last_draw_is_of_the_batch_in_progress():
    callback = ManifoldMixupCallback(layers=LAYERS, probability=0.5, seed=3)
    module, seen = Classifier(), []
    plain_step = module.training_step
    module.training_step = lambda *a: seen.append(callback.last_draw) or plain_step(*a)
    draws = Draws(callback)
    trainer(callback, draws, max_epochs=4).fit(module, loader())
    assert callback.last_draw is None
    real = [None if draw is None else draw.layer for draw in seen[-12:]]
    assert real[-6:] == [None if drawn is None else drawn[0] for drawn in draws.drawn][-6:]
    assert None in real


def test_nothing_stale_is_logged(tmp_path):
    logger = CSVLogger(tmp_path, "")
    callback = ManifoldMixupCallback(
        alpha=AlphaSchedule(0.2, 2.0, 5), layers=LAYERS, probability=0.5, log_mixing=True, seed=1
    )
    draws = Draws(callback)
    trainer(callback, draws, logger=logger, log_every_n_steps=1, max_epochs=4).fit(Classifier(), loader())
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["loss"]]
    assert len(rows) == len(draws.drawn) == 12
    assert None in draws.drawn
    for step, (row, drawn) in enumerate(zip(rows, draws.drawn, strict=True)):
        logged = {name for name, value in row.items() if name.startswith("manifold_mixup/") and value}
        if drawn is None:
            assert not logged
        else:
            assert logged == {f"manifold_mixup/{name}" for name in ("lam", "layer", "alpha", f"loss/{drawn[0]}")}
            assert float(row["manifold_mixup/lam"]) == pytest.approx(drawn[1].item())
            assert float(row["manifold_mixup/alpha"]) == pytest.approx(0.2 + 1.8 * (step // 3) / 5)
    settings = (Path(logger.log_dir) / "hparams.yaml").read_text()
    assert "manifold_mixup/layers: '0: input, 1: model.layer1, 2: model.layer2'" in settings
    assert "manifold_mixup/seed: 1" in settings


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_yaml():
    parser = ArgumentParser()
    parser.add_class_arguments(ManifoldMixupCallback, "callback")
    config = parser.parse_object(
        {
            "callback": {
                "layers": {"input": 1, "model.1": 2},
                "alpha": [2.0, 1.0],
                "passes": 2,
                "target_key": ["label", "mask"],
                "partners": {
                    "class_path": "lightning_manifold_mixup.partners.LabelDistancePartners",
                    "init_args": {"bandwidth": 0.5},
                },
            }
        }
    )
    callback = parser.instantiate_classes(config).callback
    assert isinstance(callback.partners, LabelDistancePartners)
    assert callback.layers == {"input": 1, "model.1": 2}
    assert list(callback.alpha) == [2.0, 1.0]
    assert callback.passes == 2


def test_said_at_the_start(caplog):
    def said(**options):
        caplog.clear()
        callback = ManifoldMixupCallback(**options)
        with caplog.at_level("INFO"):
            trainer(callback).fit(Classifier(), loader())
        return callback, [r.message for r in caplog.records if r.message.startswith("Manifold Mixup")]

    callback, [message] = said(layers=LAYERS)
    assert message == "Manifold Mixup: alpha 2.0, S = {input, model.layer1, model.layer2}, input 0, targets 1"
    assert str(callback) == message
    assert callback.layers_ == LAYERS
    _, [message] = said(alpha=0.0)
    assert message == "Manifold Mixup: alpha 0.0, S = auto, not yet chosen: nothing is mixed."
    _, [message, _] = said(layers=LAYERS, self_check=False)
    assert "self_check=False" in message


def test_plain_loop_of_the_reference():
    loop = cell_with("for x, y in loader")
    source = loop[loop.index("import random") : loop.index("model = Classifier")] + loop[loop.index("layers = ") :]
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    x, y = torch.randn(32, 6), torch.randint(3, (32,))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = [p.clone() for p in model.parameters()]
    names = {
        "model": model,
        "example": x[:4],
        "loader": DataLoader(TensorDataset(x, y), 8),
        "optimizer": optimizer,
        "F": F,
    }
    names["eligible_layers"] = eligible_layers
    exec(source, names)
    assert names["layers"] == ["input", "1"]
    assert not any(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def returns(value):
    return type("Own", (ManifoldMixupCallback,), {"draw": lambda self, context: value})(layers=["model.1"])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: returns(None), TypeError, r"Expected `draw` to return `Draw\(layer, mix\)`, got NoneType"),
        (lambda: returns(("model.1", 0.5)), TypeError, r"Expected `draw` to return `Draw\(layer, mix\)`, got tuple"),
        (
            lambda: ManifoldMixupCallback(partners=ClassBalancedPartners),
            TypeError,
            "Expected partners to be a strategy",
        ),
        (lambda: ManifoldMixupCallback(partners="uniform"), TypeError, "partners to be a strategy"),
        (lambda: ManifoldMixupCallback(partners=lambda *_: None), TypeError, r"Expected partners as an \(n,\) int64"),
        (lambda: ManifoldMixupCallback(partners=lambda t, n, g: g.permutation(n)), TypeError, "got ndarray"),
        (
            lambda: ManifoldMixupCallback(partners=lambda t, n, g: torch.arange(3)),
            ValueError,
            "partners of the 8 samples",
        ),
        (lambda: ManifoldMixupCallback(seed=-1), ValueError, "Expected seed to be an integer >= 0.*got -1"),
        (lambda: ManifoldMixupCallback(seed=1.5), ValueError, "Expected seed to be an integer >= 0.*got 1.5"),
    ],
)
def test_misuse(make, error, message):
    """Said before any weight has changed."""
    module = Module(F.cross_entropy)
    before = [p.clone() for p in module.parameters()]

    def trained():
        callback = make()
        callback.layers = ["model.1"]
        train(module, DataLoader(TensorDataset(*data()), 8), callback)

    with pytest.raises(error, match=message):
        trained()
    assert all(torch.equal(old, new) for old, new in zip(before, module.parameters(), strict=True))


def test_each_group_of_samples_is_drawn_for_by_its_own_targets():
    x, u = torch.zeros(4, 3), torch.zeros(6, 3)
    batch = {"a": (x, torch.arange(4)), "b": (u, torch.arange(6), torch.ones(6))}
    places = Keys(input_key=["a.0", "b.0"], target_key=["a.1", "b.1", "b.2"]).locate(batch)
    one, two = contexts_of(batch, places, layers={}, alpha=1.0, epoch=0, draws=None)
    assert (one.n, two.n) == (4, 6)
    assert one.targets is batch["a"][1]
    assert all(target is other for target, other in zip(two.targets, batch["b"][1:], strict=True))
