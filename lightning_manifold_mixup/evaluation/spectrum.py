"""Flattening: in how many directions, and how far, the hidden states of each class vary.

The paper (Verma et al., arXiv 1806.05236) takes the singular values of the hidden states of one class at one layer, and
compares the largest with the sum of the others: Manifold Mixup leaves classes with fewer directions of variance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor, nn
from torchmetrics import Metric
from typing_extensions import Unpack, override

from lightning_manifold_mixup._step.devices import float64_device
from lightning_manifold_mixup._step.extras import require
from lightning_manifold_mixup.evaluation.report import EvaluationCallback, EvaluationOptions, Row, axes
from lightning_manifold_mixup.layers.names import INPUT, named_layers, resolve_layers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["ClassSpectrum", "RepresentationCallback", "hidden_states", "plot_spectrum", "spectrum_summary"]

MAX_BYTES = 2**31
"""Limit for the second moments of one layer; 10 classes of 4096 features take 1.25 GiB."""


def spectrum_summary(singular_values: Tensor, num_directions: int) -> dict[str, Tensor]:
    """Summarise each spectrum in a few numbers.

    Args:
        singular_values: (..., features), in descending order.
        num_directions: how many directions count for "variance_share".

    Returns:
        Each (...): "largest", and "rest", the sum of all others; "effective_rank", the exponential of the entropy of
        the singular values scaled to sum 1 (Roy & Vetterli, EUSIPCO 2007); "variance_share", of the sum of squares
        that lies in the first ``num_directions``. The last two are NaN where all singular values are 0.

    Example:
        >>> summary = spectrum_summary(torch.tensor([3.0, 3.0, 0.0]), num_directions=1)
        >>> {name: round(value.item(), 4) for name, value in summary.items()}
        {'largest': 3.0, 'rest': 3.0, 'effective_rank': 2.0, 'variance_share': 0.5}
    """
    squares = singular_values.square()
    share = singular_values / singular_values.sum(-1, keepdim=True)
    return {
        "largest": singular_values[..., 0],
        "rest": singular_values[..., 1:].sum(-1),
        "effective_rank": torch.special.entr(share).sum(-1).exp(),
        "variance_share": squares[..., :num_directions].sum(-1) / squares.sum(-1),
    }


class ClassSpectrum(Metric):
    """Singular values of each class's hidden states, accumulated over batches.

    The matrix of a class has the shape (n_c, features); its mean is subtracted if ``centred``. The values grow with the
    square root of n_c, as in the paper. Only counts, sums and second moments are kept, in float64: memory is
    num_classes * features^2 * 8 bytes, whatever the number of samples, and ranks are reduced by addition.

    Singular values are square roots of eigenvalues of the second moments, so a singular value is only known to about
    1e-8 times the largest one before centring. A class on a subspace gives values of that size, not 0, in the other
    directions.

    Args:
        num_classes: number of classes.
        num_features: size of a hidden state.
        centred: subtract the mean of the class.

    Raises:
        ValueError: if the second moments would not fit into 2 GiB.

    Example:
        >>> metric = ClassSpectrum(num_classes=2, num_features=3)
        >>> states = torch.tensor([[0.0, 0, 0], [2, 0, 0], [0, 1, 1], [0, 3, 1]])
        >>> metric.update(states, torch.tensor([0, 0, 1, 1]))
        >>> metric.compute()["largest"]
        tensor([1.4142, 1.4142], dtype=torch.float64)
        >>> metric.compute()["rest"].round(decimals=6)
        tensor([0., 0.], dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    count: Tensor
    total: Tensor
    moment: Tensor

    def __init__(self, num_classes: int, num_features: int, centred: bool = True) -> None:
        super().__init__()
        needed = num_classes * num_features**2 * 8
        if needed > MAX_BYTES:
            raise ValueError(
                f"the second moments of {num_classes} classes of {num_features} features need {needed / 2**30:.1f} "
                f"GiB, more than {MAX_BYTES / 2**30:.0f}: choose a smaller layer, or average over positions "
                "(`RepresentationCallback(pool=True)`)"
            )
        self.centred = centred
        shape = (num_classes, num_features)
        self.add_state("count", torch.zeros(num_classes, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("moment", torch.zeros(*shape, num_features, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, states: Tensor, target: Tensor) -> None:
        """Add hidden states.

        Args:
            states: (n, num_features).
            target: (n,) class indices.

        Raises:
            ValueError: on other shapes, or class indices outside [0, num_classes).
        """
        num_classes, num_features = self.total.shape
        if states.ndim != 2 or states.shape[1] != num_features or target.shape != states.shape[:1]:
            raise ValueError(
                f"expected states (n, {num_features}) and target (n,), "
                f"got {tuple(states.shape)} and {tuple(target.shape)}"
            )
        states, target = states.detach().to(self.total), target.to(self.total.device)
        for c in torch.unique(target).tolist():
            if not 0 <= c < num_classes:
                raise ValueError(f"expected class indices in [0, {num_classes}), got {c}")
            of_class = states[target == c]
            self.count[c] += len(of_class)
            self.total[c] += of_class.sum(0)
            self.moment[c] += of_class.T @ of_class

    def compute(self) -> dict[str, Tensor]:
        """Compute the spectra and their summaries.

        Returns:
            "singular_values" (num_classes, num_features), descending, and the entries of ``spectrum_summary``, each
            (num_classes,), with num_classes - 1 directions, as many as Theorem 1 needs. NaN for a class not seen.
        """
        moment = self.moment
        if self.centred:
            mean = self.total / self.count.clamp_min(1)[:, None]
            moment = moment - self.count[:, None, None] * mean[:, :, None] * mean[:, None, :]
        values = torch.linalg.eigvalsh(moment).clamp_min(0).sqrt().flip(-1)
        values = values.masked_fill(self.count[:, None] == 0, torch.nan)
        return {"singular_values": values, **spectrum_summary(values, len(values) - 1)}

    @override
    def plot(self, val: dict[str, Tensor] | None = None, ax: Axes | None = None) -> tuple[Figure | None, Axes]:
        """Draw the spectrum of each class, and their mean.

        Args:
            val: the result of ``compute``; computed if None.
            ax: to draw on; a new figure's if None.

        Returns:
            The figure (None if ``ax`` was given) and the axes.

        Raises:
            ModuleNotFoundError: without matplotlib.
        """
        val = self.compute() if val is None else val
        figure, ax = require("matplotlib.pyplot", "cli").subplots() if ax is None else (None, ax)
        plot_spectrum(ax, val["singular_values"].cpu())
        return figure, ax


def plot_spectrum(ax: Axes, singular_values: Tensor) -> None:
    """Draw spectra: a line per class, and the mean over classes.

    Args:
        ax: to draw on.
        singular_values: (classes, features), descending.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = Figure().subplots()
        >>> plot_spectrum(ax, torch.tensor([[3.0, 1.0], [5.0, 2.0]]))
        >>> ax.lines[-1].get_ydata().tolist()  # the mean over classes
        [4.0, 1.5]
    """
    index = range(1, singular_values.shape[1] + 1)
    marker = "." if len(index) <= 64 else ""
    ax.locator_params("x", integer=True)
    for c, values in enumerate(singular_values.tolist()):
        ax.plot(index, values, color="C0", alpha=0.35, linewidth=1, marker=marker, label=None if c else "each class")
    ax.plot(index, singular_values.nanmean(0).tolist(), color="k", marker=marker, label="mean over classes")
    seen = singular_values[singular_values > 0]
    ax.set(xlabel="index", ylabel="singular value", yscale="log")
    if len(seen):
        top = seen.max().item()
        ax.set_ylim(max(seen.min().item() / 2, top * 1e-4), top * 2)  # smaller values are rounding errors
    ax.legend(loc="upper right")


def hidden_states(
    model: nn.Module,
    images: Tensor,
    layers: Sequence[str],
    pool: bool = False,
    forward: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run a model once, and return the outputs of some of its layers with its own.

    The forward hooks exist during this call only. A compiled model is run uncompiled, because compiled code
    ignores new hooks.

    Args:
        model: holds the layers.
        images: (n, ...).
        layers: names of submodules, and globs, as ``ManifoldMixupCallback`` takes them; "input" is the input itself.
        pool: average over all dimensions behind the second (positions of images and sequences) instead of flattening.
        forward: runs the model on the images; the model itself if None.

    Returns:
        The model's output, and for each layer its states, (n, features).

    Raises:
        ValueError: if a layer does not exist or does not run exactly once; near misses are named.
        TypeError: if a layer does not give one tensor.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 2), nn.ReLU())
        >>> output, states = hidden_states(model, torch.ones(3, 4), ["input", "0"])
        >>> states["input"].shape, torch.equal(states["0"].relu(), output)
        (torch.Size([3, 4]), True)
    """
    seen: dict[str, list[Any]] = {layer: [] for layer in resolve_layers(model, layers)}
    modules = named_layers(model)
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for layer in seen.keys() - {INPUT}:
            hook = modules[layer].register_forward_hook(lambda _, __, out, layer=layer: seen[layer].append(out))
            stack.callback(hook.remove)
        output = (forward or model)(images)
    if INPUT in seen:
        seen[INPUT].append(images)
    return output, {layer: _flat(layer, outputs, pool) for layer, outputs in seen.items()}


def _flat(layer: str, outputs: list[Any], pool: bool) -> Tensor:
    if len(outputs) != 1:
        raise ValueError(
            f"expected layer {layer!r} to run once in a forward, it ran {len(outputs)} times: choose another"
        )
    (out,) = outputs
    if not isinstance(out, Tensor):
        raise TypeError(
            f"expected layer {layer!r} to give a tensor, got {type(out).__name__}: choose a layer inside it"
        )
    return out.flatten(2).mean(2) if pool and out.ndim > 2 else out.flatten(1)


class RepresentationCallback(EvaluationCallback):
    """Report how flat the classes are at some layers, in every validation (also during ``fit``) and test.

    Writes ``<stage>_representations.csv``, ``.json`` (with the singular values) and ``.png``, and logs the numbers,
    means over classes (``val_representations/model.layer1_rest``), and the figure. Costs one more forward pass per
    batch.

    Args:
        layers: names of the module's submodules, and globs (``"model.layer*"``); "input" is the input itself.
        pool: average over positions of images and sequences instead of flattening.
        centred: subtract each class's mean.
        kwargs: the arguments of ``EvaluationCallback``; nothing is random here, so ``seed`` has no effect.

    Raises:
        ValueError: without layers, at construction; for a layer that is not there, when a fit or a test starts.

    Example:
        >>> callback = RepresentationCallback(layers=["model.layer1", "model.layer2"], pool=True)
        >>> trainer = L.Trainer(callbacks=[callback], logger=False, enable_checkpointing=False)
    """

    family = "representations"

    def __init__(
        self, layers: Sequence[str], pool: bool = False, centred: bool = True, **kwargs: Unpack[EvaluationOptions]
    ) -> None:
        super().__init__(**kwargs)
        if isinstance(layers, str) or not layers:
            raise ValueError(f"expected a list of layer names, got {layers!r}")
        self.layers = list(layers)
        self.pool = pool
        self.centred = centred
        self.spectra: dict[str, ClassSpectrum] = {}

    @override
    def should_evaluate(self, trainer: L.Trainer) -> bool:
        return not trainer.sanity_checking

    @override
    def start(self) -> None:
        super().start()
        self.spectra = {}

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        resolve_layers(pl_module, self.layers)  # a misspelt name is an error before the first epoch

    @override
    def update(self, pl_module: L.LightningModule, images: Tensor, target: Tensor) -> None:
        logits, states = hidden_states(pl_module, images, self.layers, self.pool, partial(self.logits, pl_module))
        for layer, state in states.items():
            if layer not in self.spectra:  # made here, where its size is known
                metric = ClassSpectrum(logits.shape[1], state.shape[1], self.centred)
                self.spectra[layer] = metric.to(float64_device(state.device))
            self.spectra[layer].update(state, target)

    @override
    def compute(self) -> tuple[list[Row], dict[str, Any]]:
        rows: list[Row] = []
        values = {}
        for layer, metric in self.spectra.items():
            spectrum = metric.compute()
            values[layer] = spectrum.pop("singular_values").tolist()
            rows.append({"layer": layer} | {name: value.nanmean().item() for name, value in spectrum.items()})
        return rows, {"singular_values": values}

    @override
    def plot(self, rows: list[Row], details: dict[str, Any]) -> Figure:
        figure, panels = axes(len(rows), 4.2 * len(rows), 3.8)
        for ax, row in zip(panels, rows, strict=True):
            plot_spectrum(ax, torch.tensor(details["singular_values"][row["layer"]]))
            ax.set_title(
                f"{row['layer']}\nlargest {row['largest']:.2f}, sum of the others {row['rest']:.2f}", fontsize=10
            )
        return figure
