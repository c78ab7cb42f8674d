import json

import numpy as np
import pytest
import torch
from torch import nn

from lightning_manifold_mixup.evaluation import ClassSpectrum, RepresentationCallback, hidden_states, spectrum_summary
from tests.evaluation.classifier import CLASSES, Classifier, loader, normalise, pixels_and_target, trainer
from tests.processes import together


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(42)


def states_and_target(n=300, features=12, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(classes, features, features, generator=generator)
    target = torch.randint(classes, (n,), generator=generator)
    states = torch.einsum("ni,nij->nj", torch.randn(n, features, generator=generator), mixing[target])
    return states + 5 * torch.randn(classes, features, generator=generator)[target], target


def svd(states, centred):
    states = states.double().numpy()
    return np.linalg.svd(states - states.mean(0) if centred else states, compute_uv=False)


@pytest.mark.parametrize("centred", [True, False])
def test_spectrum_is_numpys_svd(centred):
    states, target = states_and_target()
    metric = ClassSpectrum(4, 12, centred)
    for x, y in zip(states.split(70), target.split(70), strict=True):
        metric.update(x, y)
    result = metric.compute()
    for c in range(4):
        values = svd(states[target == c], centred)
        np.testing.assert_allclose(result["singular_values"][c], values, rtol=1e-9)
        assert result["largest"][c].item() == pytest.approx(values[0])
        assert result["rest"][c].item() == pytest.approx(values[1:].sum())
        p = values / values.sum()
        assert result["effective_rank"][c].item() == pytest.approx(np.exp(-(p * np.log(p)).sum()))
        assert result["variance_share"][c].item() == pytest.approx((values[:3] ** 2).sum() / (values**2).sum())


def test_tiny_singular_values_are_known_to_1e_8_of_the_largest():
    """Squares lose half of the digits: the docstring's claim, with a class on a line far from the origin."""
    states = 1000 + torch.randn(200, 1, dtype=torch.float64) * torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    metric = ClassSpectrum(1, 3)
    metric.update(states, torch.zeros(200, dtype=torch.int64))
    values = metric.compute()["singular_values"][0]
    assert values[0].item() == pytest.approx(svd(states, True)[0], rel=1e-9)
    assert values[1] < 3e-8 * svd(states, False)[0]


def test_class_without_samples_or_without_variance():
    metric = ClassSpectrum(3, 2)
    metric.update(torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.0, 0.0], [0.0, 4.0]]), torch.tensor([0, 0, 1, 1]))
    result = metric.compute()
    assert result["largest"].nan_to_num(-1).tolist() == pytest.approx([0, 8**0.5, -1])
    assert result["effective_rank"].isnan().tolist() == [True, False, True]
    summary = spectrum_summary(torch.tensor([2.0, 2.0, 2.0, 0.0]), 1)
    assert summary["effective_rank"].item() == pytest.approx(3)
    assert summary["variance_share"].item() == pytest.approx(1 / 3)


def test_memory_is_constant_and_bounded():
    metric = ClassSpectrum(4, 12)
    size = sum(state.numel() for state in metric.metric_state.values())
    for seed in range(3):
        metric.update(*states_and_target(seed=seed))
    assert sum(state.numel() for state in metric.metric_state.values()) == size
    assert all(state.dtype == torch.float64 for state in metric.metric_state.values())
    with pytest.raises(ValueError, match=r"10 classes of 65536 features need 320.0 GiB.*pool=True"):
        ClassSpectrum(10, 65536)


def test_wrong_inputs_are_refused():
    metric = ClassSpectrum(4, 12)
    with pytest.raises(ValueError, match=r"expected states \(n, 12\) and target \(n,\), got \(5, 3\) and \(5,\)"):
        metric.update(torch.zeros(5, 3), torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"expected class indices in \[0, 4\), got 7"):
        metric.update(torch.zeros(1, 12), torch.tensor([7]))


def _rank(rank, path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/init", rank=rank, world_size=2)
    states, target = states_and_target()
    metric = ClassSpectrum(4, 12)
    part = slice(0, 100) if rank == 0 else slice(100, None)
    metric.update(states[part], target[part])
    torch.save(metric.compute(), f"{path}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_add_up(tmp_path):
    together(_rank, tmp_path)
    states, target = states_and_target()
    for rank in range(2):
        result = torch.load(tmp_path / f"{rank}.pt")
        for c in range(4):
            np.testing.assert_allclose(result["singular_values"][c], svd(states[target == c], True), rtol=1e-9)


def test_plot_is_torchmetrics_way(tmp_path):
    import matplotlib.pyplot as plt

    metric = ClassSpectrum(4, 12)
    metric.update(*states_and_target())
    figure, ax = metric.plot()
    assert len(ax.lines) == 5
    np.testing.assert_allclose(ax.lines[1].get_ydata(), metric.compute()["singular_values"][1])
    assert metric.plot(metric.compute(), ax)[0] is None
    plt.close(figure)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.act, self.lstm = nn.ReLU(), nn.LSTM(4, 4)

    def forward(self, x):
        return self.act(self.lstm(self.act(x))[0])


def test_hidden_states_errors():
    x = torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"name of a layer of Twice, got 'actt'. Did you mean 'act'"):
        hidden_states(Twice(), x, ["actt"])
    with pytest.raises(ValueError, match=r"layer 'act' to run once in a forward, it ran 2 times"):
        hidden_states(Twice(), x, ["act"])
    with pytest.raises(TypeError, match=r"layer 'lstm' to give a tensor, got tuple"):
        hidden_states(Twice(), x, ["lstm"])


def test_hidden_states_leave_no_hook_behind_even_after_an_error():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(4, 2))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        hidden_states(model, torch.ones(2, 4), ["0"])
    assert not any(module._forward_hooks for module in model.modules())


def test_hidden_states_of_a_compiled_model():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    compiled = torch.compile(nn.Sequential(model, nn.Identity()), backend="eager")
    x = torch.randn(5, 4)
    compiled(x)  # compiled code that knows no hooks
    _, states = hidden_states(compiled, x, ["0.1"])
    torch.testing.assert_close(states["0.1"], model[1](model[0](x)))


def test_globs_are_those_of_the_mixing_callback():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), nn.Linear(3, 2))
    x = torch.randn(5, 4)
    _, states = hidden_states(model, x, ["0.*", "input", "0"])
    assert list(states) == ["0.0", "0.1", "input", "0"]  # a glob stays within one part of a name
    torch.testing.assert_close(states["0.0"], model[0][0](x))
    assert torch.equal(states["0"], states["0.1"])


@pytest.mark.parametrize("pool", [False, True])
def test_callback_reports_what_numpy_gives(tmp_path, pool):
    module = Classifier()
    layers = ["input", "model.3", "model.6"]
    callback = RepresentationCallback(layers, pool=pool, dirname=str(tmp_path))
    t = trainer(callback)
    t.test(module, loader(), verbose=False)
    result = json.loads((tmp_path / "test_representations.json").read_text())
    pixels, target = pixels_and_target()
    images = normalise(pixels)
    module.eval()
    with torch.no_grad():
        states = [images, module.model[:4](images), module(images)]
    for layer, state, row in zip(layers, states, result["rows"], strict=True):
        state = state.mean((2, 3)) if pool and state.ndim == 4 else state.flatten(1)
        spectra = [svd(state[target == c], True) for c in range(CLASSES)]
        rank = min(len(spectra[0]), state.shape[1])
        for got, expected in zip(result["singular_values"][layer], spectra, strict=True):
            np.testing.assert_allclose(got[: len(expected)][:rank], expected, rtol=1e-5, atol=2e-5)
        assert row["largest"] == pytest.approx(np.mean([values[0] for values in spectra]), rel=1e-5)
        assert row["rest"] == pytest.approx(np.mean([values[1:].sum() for values in spectra]), rel=1e-4)
        logged = t.callback_metrics[f"test_representations/{layer}_largest"]
        assert logged.item() == pytest.approx(row["largest"], rel=1e-5)
    assert not any(m._forward_hooks for m in module.modules())


def test_callback_runs_in_the_validation_of_fit_but_not_in_the_sanity_check(tmp_path):
    callback = RepresentationCallback(["model.3"], dirname=str(tmp_path))
    seen = []
    update = callback.update
    callback.update = lambda *args: (seen.append(1), update(*args))
    trainer(callback, max_epochs=2, num_sanity_val_steps=2).fit(Classifier(), loader(), loader(shuffle=False))
    assert len(seen) == 2 * 3
    assert (tmp_path / "val_representations.png").exists()


def test_misspelt_layer_stops_fit_at_once():
    with pytest.raises(ValueError, match=r"got 'model.33'. Did you mean .*'model.3'"):
        trainer(RepresentationCallback(["model.33"]), max_epochs=1).fit(Classifier(), loader(), loader())
    with pytest.raises(ValueError, match="expected a list of layer names, got 'model'"):
        RepresentationCallback("model")
