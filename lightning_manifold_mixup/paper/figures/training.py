"""What the figures share: the methods that they compare, and short training on tensors in memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_manifold_mixup._step.extras import require
from lightning_manifold_mixup.callback import ManifoldMixupCallback
from lightning_manifold_mixup.evaluation import ClassSpectrum, hidden_states
from lightning_manifold_mixup.evaluation.tables import Row, mean_and_std, plus_minus
from lightning_manifold_mixup.modules.classification import ManifoldMixupModule
from lightning_manifold_mixup.paper.data import DigitsDataModule
from lightning_manifold_mixup.paper.data.batches import VectorDataset, collate
from lightning_manifold_mixup.paper.models import BottleneckMLP
from lightning_manifold_mixup.paper.quiet import IN_MEMORY, quiet_lightning

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

__all__ = [
    "TITLES",
    "Method",
    "Problem",
    "Report",
    "cell",
    "digits",
    "evaluate",
    "layers_after",
    "means_and_stds",
    "plot_grid",
    "probabilities_on_grid",
    "spectra",
    "square_around",
    "train",
    "train_all",
]

Labelled = tuple[Tensor, Tensor]

TITLES = {"none": "no mixup", "input": "input mixup", "manifold": "Manifold Mixup"}
"""Names of methods in pictures, where they differ from those in tables."""


@dataclass(frozen=True)
class Report:
    """The result of a figure's ``make``.

    Attributes:
        rows: all numbers, for the CSV.
        tables: the most important numbers, for the terminal, by title.
        details: settings and spectra, written to the JSON file.
        figure: the picture.
    """

    rows: list[Row]
    tables: dict[str, list[Row]]
    details: dict[str, Any]
    figure: Figure


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        alpha: of the mixing; 0 for none.
        layer: where to mix, as ``ManifoldMixupCallback`` names it.
        weight_decay: coefficient of half the squared weights, added to the loss.
        network: more arguments of ``BottleneckMLP`` (dropout, noise, batch norm).
    """

    alpha: float = 0.0
    layer: str = "model.bottleneck"
    weight_decay: float = 0.0
    network: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """A classification problem and the network that learns it.

    Attributes:
        train_set: inputs (n, features) and labels (n,).
        test_set: likewise.
        network: arguments of ``BottleneckMLP``.
        learning_rate: of Adam.
        batch_size: of training.
    """

    train_set: Labelled
    test_set: Labelled
    network: Mapping[str, Any]
    learning_rate: float = 1e-3
    batch_size: int = 100


def digits() -> tuple[Labelled, Labelled]:
    """Load the 8x8 digits as vectors of 64 pixels in [0, 1]: 1,000 to train, 797 to test.

    Pixels are not standardised, so that the singular values can be compared with those of other implementations.

    Example:
        >>> (x, y), (x_test, _) = digits()
        >>> x.shape, y.shape, x_test.shape, x.min().item(), x.max().item()
        (torch.Size([1000, 64]), torch.Size([1000]), torch.Size([797, 64]), 0.0, 1.0)
    """
    data = DigitsDataModule()
    sets = [data.load("train"), data.load("test")]
    train_set, test_set = ((images.flatten(1) / 16, labels) for images, labels in sets)  # type: ignore[misc, union-attr]
    return train_set, test_set


def train(problem: Problem, method: Method, epochs: int, seed: int) -> BottleneckMLP:
    """Train with Adam, by Lightning. The same arguments give the same weights on processors of the same kind.

    Only one thread is used. More would not make such small networks faster, and the rounding of sums over a batch would
    depend on the number of threads.

    Args:
        problem: data and network.
        method: how to train.
        epochs: passes over the training set.
        seed: of initial weights, order of batches, dropout, noise and mixing. Torch's global generator and number of
            threads are put back.

    Returns:
        The network, in evaluation mode.

    Example:
        >>> (x, y), test_set = digits()
        >>> problem = Problem((x, y), test_set, dict(in_features=64, num_classes=10, before=[32], after=[32]))
        >>> network = train(problem, Method(alpha=2.0), epochs=1, seed=0)
        >>> network(x).shape
        torch.Size([1000, 10])
    """
    with torch.random.fork_rng(devices=[]), _one_thread(), quiet_lightning(logging.ERROR, *IN_MEMORY):
        torch.manual_seed(seed)
        network = BottleneckMLP(**problem.network, **method.network)
        optimizer = partial(torch.optim.Adam, lr=problem.learning_rate, weight_decay=method.weight_decay)
        module = ManifoldMixupModule(network, problem.network["num_classes"], alpha=0.0, optimizer=optimizer)
        trainer = L.Trainer(
            max_epochs=epochs,
            accelerator="cpu",  # networks this small are slower on a GPU
            devices=1,
            callbacks=[ManifoldMixupCallback(method.alpha, method.layer, seed=seed)] if method.alpha else [],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        loader = DataLoader(
            VectorDataset(*problem.train_set), batch_size=problem.batch_size, shuffle=True, collate_fn=collate
        )
        trainer.fit(module, loader)
    return network.eval()


def train_all(
    problem: Problem, methods: Mapping[str, Method], epochs: int, seeds: int
) -> dict[str, list[BottleneckMLP]]:
    """Train with each method and the seeds 0 to ``seeds`` - 1, and return the networks by method, then by seed."""
    jobs = [(name, seed) for name in methods for seed in range(seeds)]
    networks: dict[str, list[BottleneckMLP]] = {name: [] for name in methods}
    for name, seed in require("rich.progress", "cli").track(jobs, description=f"training {len(jobs)} networks"):
        networks[name].append(train(problem, methods[name], epochs, seed))
    return networks


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def evaluate(network: nn.Module, labelled: Labelled) -> dict[str, float]:
    """Compute "test_error" in percent and "test_nll" in nats.

    Example:
        >>> evaluate(nn.Identity(), (torch.tensor([[0.0, 0.0], [0.0, 100.0]]), torch.tensor([0, 0])))
        {'test_error': 50.0, 'test_nll': 50.34657287597656}
    """
    inputs, labels = labelled
    logits = network(inputs)
    error = (logits.argmax(1) != labels).double().mean()
    return {"test_error": 100 * error.item(), "test_nll": F.cross_entropy(logits, labels).item()}


def layers_after(network: BottleneckMLP, name: str = "bottleneck") -> nn.Sequential:
    """Return the part of the network after a layer: f_k, where the layer's output is g_k(x).

    Example:
        >>> network = BottleneckMLP(2, 2, before=[8], bottleneck=2, after=[8])
        >>> [type(layer).__name__ for layer in layers_after(network)]
        ['Sequential', 'Linear']
    """
    children = dict(network.named_children())
    return nn.Sequential(*list(children.values())[list(children).index(name) + 1 :])


@torch.no_grad()
def spectra(network: nn.Module, labelled: Labelled, layers: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """Compute the singular values of each class's hidden states, not centred: see ``ClassSpectrum``.

    With these data and networks they have the size that others report. Centred, the largest value would be a fifth of
    that.

    Args:
        network: in evaluation mode.
        labelled: inputs and labels.
        layers: names of the network's layers.

    Returns:
        For each layer the result of ``ClassSpectrum.compute``.
    """
    inputs, labels = labelled
    logits, states = hidden_states(network, inputs, layers)
    found = {}
    for layer, state in states.items():
        metric = ClassSpectrum(logits.shape[1], state.shape[1], centred=False)
        metric.update(state, labels)
        found[layer] = metric.compute()
    return found


@torch.no_grad()
def probabilities_on_grid(
    function: Callable[[Tensor], Tensor], centre: Tensor, radius: float, size: int = 200
) -> Tensor:
    """Compute class probabilities on a grid over a square of the plane.

    Args:
        function: points (n, 2) to logits (n, classes).
        centre: (2,), of the square.
        radius: half its side.
        size: points along a side.

    Returns:
        (size, size, classes); the first index follows the second coordinate, as ``imshow(origin="lower")`` expects.

    Example:
        >>> probabilities_on_grid(lambda points: points, torch.zeros(2), radius=1.0, size=2).argmax(2)
        tensor([[0, 0],
                [1, 0]])
    """
    steps = torch.linspace(-radius, radius, size)
    down, across = torch.meshgrid(steps, steps, indexing="ij")
    points = centre + torch.stack([across.flatten(), down.flatten()], 1)
    return function(points).softmax(1).view(size, size, -1)


def square_around(states: Tensor, margin: float = 0.25) -> tuple[Tensor, float]:
    """Return the centre and half the side of the smallest square around points of the plane, with a margin.

    Example:
        >>> square_around(torch.tensor([[0.0, 0.0], [4.0, 1.0]]), margin=0.5)
        (tensor([2.0000, 0.5000]), 3.0)
    """
    low, high = states.amin(0), states.amax(0)
    return (low + high) / 2, (1 + margin) * ((high - low).amax().item() / 2)


def plot_grid(ax: Axes, values: Tensor, centre: Tensor, radius: float, **options: Any) -> AxesImage:
    """Draw values (size, size) over a square of the plane, without ticks; ``options`` are those of ``imshow``."""
    (x, y), r = centre.tolist(), radius
    image: AxesImage = ax.imshow(values.numpy(), origin="lower", extent=(x - r, x + r, y - r, y + r), **options)
    ax.set(xticks=[], yticks=[], xlim=(x - r, x + r), ylim=(y - r, y + r))
    return image


def means_and_stds(results: Sequence[Mapping[str, float]]) -> dict[str, float | None]:
    """Average the numbers of several seeds; ``NAME_std`` is the standard deviation of ``NAME``.

    Example:
        >>> means_and_stds([{"nll": 1.0}, {"nll": 3.0}])
        {'nll': 2.0, 'nll_std': 1.4142135623730951}
    """
    summary: dict[str, float | None] = {}
    for name in results[0]:
        summary[name], summary[f"{name}_std"] = mean_and_std([result[name] for result in results])
    return summary


def cell(row: Mapping[str, Any], name: str, decimals: int) -> str:
    """Write the mean and standard deviation of one number, for the terminal.

    Example:
        >>> cell({"nll": 0.5, "nll_std": 0.25}, "nll", 2)
        '0.50 ± 0.25'
    """
    return plus_minus(row[name], row[f"{name}_std"], decimals)
