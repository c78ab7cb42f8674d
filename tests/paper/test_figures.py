import csv
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lightning_manifold_mixup import draw_mix
from lightning_manifold_mixup._step.mix.randomness import generator
from lightning_manifold_mixup.cli import figure as command
from lightning_manifold_mixup.paper.figures import bottleneck, spectrum, spirals
from lightning_manifold_mixup.paper.figures.training import (
    Method,
    Problem,
    digits,
    layers_after,
    probabilities_on_grid,
    square_around,
    train,
)
from lightning_manifold_mixup.paper.models import BottleneckMLP

FIGURES = {"spirals": spirals, "bottleneck": bottleneck, "spectrum": spectrum}


def read(path):
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


def states_of(network, x, layer):
    """By hand: module after module, without hooks."""
    h = x
    for name, module in network.named_children():
        h = module(h)
        if name == layer:
            return h.detach().double().numpy()
    raise KeyError(layer)


@pytest.fixture(scope="module")
def small():
    inputs = torch.rand(60, 4, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(60) % 3
    shape = {"in_features": 4, "num_classes": 3, "before": [8], "bottleneck": 2, "after": [8]}
    return Problem((inputs, labels), (inputs, labels), shape, batch_size=20)


def test_training_is_the_plain_loop(small):
    """Same start, same order, draws as the callback documents them, Manifold Mixup written out."""
    trained = train(small, Method(alpha=2.0, weight_decay=1e-3), epochs=3, seed=5)

    torch.manual_seed(5)
    network = BottleneckMLP(**small.network)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, weight_decay=1e-3)
    x, y = small.train_set
    count = 0
    for _ in range(3):
        torch.empty((), dtype=torch.int64).random_()  # a DataLoader's iterator draws a seed for workers
        order = torch.randperm(
            60, generator=torch.Generator().manual_seed(int(torch.empty((), dtype=torch.int64).random_()))
        )
        for batch in order.split(20):
            count += 1
            mix = draw_mix(20, 2.0, generator(5, count, stream=1))
            h = network.bottleneck(network.layer1(x[batch]))
            h = mix.lam * h + (1 - mix.lam) * h[mix.partners]
            logits = network.linear(network.layer2(h))
            loss = mix.lam * F.cross_entropy(logits, y[batch])
            loss = loss + (1 - mix.lam) * F.cross_entropy(logits, y[batch][mix.partners])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(trained.get_parameter(name), parameter, msg=name)


def test_training_is_reproducible_and_leaves_the_global_generator(small):
    state = torch.get_rng_state()
    method = Method(network={"dropout": 0.5, "noise": 0.1})
    first, again, other = (train(small, method, 2, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.linear.weight, again.linear.weight)
    assert not torch.equal(first.linear.weight, other.linear.weight)
    assert not first.training


def test_training_does_not_depend_on_the_number_of_threads():
    """Which rounds sums over a batch in another order: with two threads, the digits' network ends elsewhere."""
    threads = torch.get_num_threads()
    weights = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            weights.append(train(bottleneck.problem(), Method(), epochs=4, seed=0).linear.weight)
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*weights)


def test_methods_differ(small):
    methods = [Method(), Method(weight_decay=0.1), Method(alpha=2.0), Method(alpha=2.0, layer="input")]
    weights = [train(small, method, 1, 0).linear.weight for method in methods]
    for i, first in enumerate(weights):
        assert not any(torch.equal(first, second) for second in weights[:i])


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    (x, y), (x_test, y_test) = digits()
    ours = {
        (tuple(row), label)
        for row, label in zip((16 * torch.cat([x, x_test])).tolist(), [*y.tolist(), *y_test.tolist()], strict=True)
    }
    data = load_digits()
    assert ours == {(tuple(row), label) for row, label in zip(data.data.tolist(), data.target.tolist(), strict=True)}


def test_layers_after_go_on_from_the_bottleneck(small):
    network = BottleneckMLP(**small.network)
    x = small.train_set[0]
    h = torch.from_numpy(states_of(network, x, "bottleneck")).float()
    torch.testing.assert_close(layers_after(network)(h), network(x))


def test_grid_has_the_probability_of_the_point_drawn_there():
    points = torch.tensor([[0.0, 0.0], [2.0, 1.0]])
    centre, radius = square_around(points, margin=0.5)
    assert (centre.tolist(), radius) == ([1.0, 0.5], 1.5)
    grid = probabilities_on_grid(lambda p: torch.stack([p[:, 0], p[:, 1]], 1), centre, radius, size=31)
    row, column = 4, 20
    x, y = -0.5 + 3 * column / 30, -1 + 3 * row / 30
    assert grid[row, column, 0].item() == pytest.approx(np.exp(x) / (np.exp(x) + np.exp(y)), rel=1e-5)


def test_spectrum_rows_are_numpys_singular_values(monkeypatch):
    monkeypatch.setattr(spectrum, "METHODS", {"none": Method(), "manifold": Method(alpha=2.0)})
    report = spectrum.make(epochs=2, seeds=2)
    task = spectrum.problem()
    networks = [train(task, Method(alpha=2.0), 2, seed) for seed in (0, 1)]
    for layer in ("bottleneck", "layer4", "layer1"):
        for states, (x, y) in (("train", task.train_set), ("test", task.test_set)):
            largest, rest = [], []
            for network in networks:
                h = states_of(network, x, layer)
                values = [np.linalg.svd(h[y.numpy() == c], compute_uv=False) for c in range(10)]
                largest.append(np.mean([v[0] for v in values]))
                rest.append(np.mean([v[1:].sum() for v in values]))
            (row,) = (r for r in report.rows if (r["method"], r["layer"], r["states"]) == ("manifold", layer, states))
            # a layer of 256 has directions of rounding only: 1e-8 times the largest value each, see `ClassSpectrum`
            assert row["largest"] == pytest.approx(np.mean(largest), rel=1e-5)
            assert row["rest"] == pytest.approx(np.mean(rest), rel=1e-3)
            assert row["largest_std"] == pytest.approx(np.std(largest, ddof=1), rel=1e-3)
    x, y = task.test_set
    errors = [100 * np.mean(n(x).argmax(1).numpy() != y.numpy()) for n in networks]
    assert row["test_error"] == pytest.approx(np.mean(errors))


def test_spirals_rows_are_those_of_the_networks(monkeypatch):
    monkeypatch.setattr(spirals, "METHODS", {name: spirals.METHODS[name] for name in ("none", "batch norm")})
    report = spirals.make(epochs=2, seeds=1)
    task = spirals.problem()
    network = train(task, spirals.METHODS["batch norm"], 2, 0)
    x, y = task.train_set
    h = states_of(network, x, "bottleneck")
    values = [np.linalg.svd(h[y.numpy() == c], compute_uv=False) for c in (0, 1)]
    row = report.rows[1]
    assert row["method"] == "batch norm"
    assert row["bottleneck_largest"] == pytest.approx(np.mean([v[0] for v in values]), rel=1e-5)
    assert row["bottleneck_rest"] == pytest.approx(np.mean([v[1] for v in values]), rel=1e-4)
    assert row["bottleneck_rest_std"] is None
    assert len(report.figure.axes) == 3 * 2 + 1


def test_bottleneck_confidence(monkeypatch):
    monkeypatch.setattr(bottleneck, "METHODS", {"manifold": Method(alpha=2.0)})
    report = bottleneck.make(epochs=1, seeds=1)
    task = bottleneck.problem()
    network = train(task, Method(alpha=2.0), 1, 0)
    h = states_of(network, task.train_set[0], "bottleneck")
    low, high = h.min(0), h.max(0)
    half = 1.25 * (high - low).max() / 2
    across, up = (np.linspace(m - half, m + half, 200, dtype=np.float32) for m in (low + high) / 2)
    points = torch.from_numpy(np.stack(np.meshgrid(across, up), -1).reshape(-1, 2))
    with torch.no_grad():
        sure = network.linear(network.layer4(network.layer3(points))).softmax(1).amax(1)
    assert report.rows[0]["confidence"] == pytest.approx(sure.mean().item(), rel=1e-4)


def test_command_writes_picture_and_numbers(tmp_path, capsys):
    command.main(["bottleneck", "--epochs", "1", "--seeds", "2", "--out", str(tmp_path)])
    assert "manifold" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bottleneck.csv", "bottleneck.json", "bottleneck.png"]
    rows = read(tmp_path / "bottleneck.csv")
    assert [row["method"] for row in rows] == ["none", "input", "manifold"]
    assert float(rows[0]["test_error_std"]) >= 0
    details = json.loads((tmp_path / "bottleneck.json").read_text())
    assert (details["epochs"], details["seeds"]) == (1, 2)
    assert details["rows"][2]["test_nll"] == pytest.approx(float(rows[2]["test_nll"]))
    assert (tmp_path / "bottleneck.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("args", [["bottlneck"], [], ["spirals", "--epochs", "0"], ["spirals", "--seeds", "one"]])
def test_wrong_arguments_are_refused_before_training(args, capsys):
    with pytest.raises(SystemExit) as error:
        command.main(args)
    assert error.value.code == 2
    assert "usage: manifold-mixup figure" in capsys.readouterr().err


def test_every_figure_has_its_options(capsys):
    assert command.FIGURES.keys() == FIGURES.keys()
    for name, module in FIGURES.items():
        with pytest.raises(SystemExit):
            command.main([name, "--help"])
        assert f"(default: {module.EPOCHS})" in capsys.readouterr().out


@pytest.mark.slow
def test_manifold_mixup_flattens_the_mixed_layer():
    """The project's target on digits, over 3 seeds."""
    rows = [row for row in spectrum.make(seeds=3).rows if row["layer"] == "bottleneck" and row["states"] == "train"]
    rest = {row["method"]: row["rest"] for row in rows}
    assert rest["manifold"] < 0.5 * rest["none"]
    assert rest["manifold"] < rest["input"]
    assert rest["manifold"] < rest["weight decay"]
    error = {row["method"]: row["test_error"] for row in rows}
    assert error["manifold"] < error["none"]
