"""Adversarial examples of one step and of several steps, and the accuracy under them.

Epsilons are in pixel units: 4/255 moves a pixel of an 8-bit image by at most 4 steps, whatever normalisation the
model's input went through. Images come in, and go out, as the model takes them; ``mean`` and ``std`` say how they were
normalised.

The paper (Verma et al., arXiv 1806.05236) reports FGSM without stating epsilon. It says that Manifold Mixup does not
resist attacks of several steps, which PGD can show.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack, override

from lightning_manifold_mixup.evaluation.report import EvaluationCallback, EvaluationOptions, Row, axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["AttackCallback", "adversarial_correct", "fgsm", "pgd", "plot_attacks"]

Model = Callable[[Tensor], Tensor]


def fgsm(
    model: Model,
    images: Tensor,
    target: Tensor,
    epsilon: float,
    *,
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 1.0,
) -> Tensor:
    """Move every pixel by epsilon in the direction that raises the loss (Goodfellow et al., arXiv 1412.6572).

    Args:
        model: gives logits (n, classes) for images. Used in the mode it is in: call ``model.eval()`` before.
        images: (n, channels, ...), normalised as the model takes them.
        target: (n,) class indices.
        epsilon: largest change of a pixel, in pixel units (pixels lie in [0, 1]).
        mean: subtracted from the pixels by the normalisation, one number or one per channel.
        std: divided by in the normalisation, one number or one per channel.

    Returns:
        The attacked images, normalised like ``images``, within epsilon of them and within the valid pixel range.

    Raises:
        ValueError: if ``mean`` and ``std`` do not take the images back to pixels in [0, 1].

    Example:
        >>> model = lambda x: torch.stack([-x.sum(1), x.sum(1)], 1)  # class 1 for bright images
        >>> fgsm(model, torch.tensor([[0.5, 0.9]]), torch.tensor([1]), 0.25)
        tensor([[0.2500, 0.6500]])
        >>> fgsm(model, torch.tensor([[0.5, 0.9]]), torch.tensor([0]), 0.25)
        tensor([[0.7500, 1.0000]])
    """
    return pgd(model, images, target, epsilon, steps=1, step_size=epsilon, mean=mean, std=std)


def pgd(
    model: Model,
    images: Tensor,
    target: Tensor,
    epsilon: float,
    *,
    steps: int = 10,
    step_size: float | None = None,
    generator: torch.Generator | None = None,
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 1.0,
) -> Tensor:
    """Take several signed gradient steps, staying within epsilon of the image (Madry et al., arXiv 1706.06083).

    Works inside ``torch.no_grad`` and ``torch.inference_mode``. Only the gradient with respect to the images is
    computed: no ``.grad`` of a parameter changes. It is computed without autocast, because float16 gradients of
    confident samples underflow to 0, and a zero gradient does not change the image.

    Args:
        model: gives logits (n, classes) for images. Used in the mode it is in: call ``model.eval()`` before.
        images: (n, channels, ...), normalised as the model takes them.
        target: (n,) class indices.
        epsilon: largest change of a pixel, in pixel units (pixels lie in [0, 1]).
        steps: number of gradient steps.
        step_size: length of one step in pixel units; 2.5 * epsilon / steps if None.
        generator: start at a uniformly random point within epsilon, drawn from it; at the image itself if None.
        mean: subtracted from the pixels by the normalisation, one number or one per channel.
        std: divided by in the normalisation, one number or one per channel.

    Returns:
        The attacked images, normalised like ``images``, within epsilon of them and within the valid pixel range.

    Raises:
        ValueError: if ``mean`` and ``std`` do not take the images back to pixels in [0, 1], or ``steps`` is below 1.

    Example:
        >>> model = lambda x: torch.stack([-x.sum(1), x.sum(1)], 1)
        >>> pgd(model, torch.tensor([[0.5, 0.9]]), torch.tensor([0]), 0.25, steps=3)
        tensor([[0.7500, 1.0000]])
    """
    if steps < 1:
        raise ValueError(f"expected at least one step, got {steps}")
    step_size = 2.5 * epsilon / steps if step_size is None else step_size
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
        images, target = images.clone(), target.clone()  # inference tensors cannot take part in autograd
        dtype = torch.promote_types(images.dtype, torch.float32)
        shift, scale = (_per_channel(value, images).to(dtype) for value in (mean, std))
        clean = images.to(dtype) * scale + shift
        _check_pixels(clean)
        pixels = clean
        if generator is not None:
            noise = torch.empty(clean.shape, dtype=dtype, device=generator.device)
            pixels = (clean + noise.uniform_(-epsilon, epsilon, generator=generator).to(clean.device)).clamp(0, 1)
        for _ in range(steps):
            pixels = pixels.detach().requires_grad_()
            logits = model(((pixels - shift) / scale).to(images.dtype))
            loss = F.cross_entropy(logits.to(dtype), target, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, pixels)
            moved = pixels.detach() + step_size * gradient.sign()
            pixels = (clean + (moved - clean).clamp(-epsilon, epsilon)).clamp(0, 1)
        return ((pixels.detach() - shift) / scale).to(images.dtype)


def adversarial_correct(
    model: Model,
    images: Tensor,
    target: Tensor,
    epsilons: Sequence[float],
    attack: Callable[[Model, Tensor, Tensor, float], Tensor] = fgsm,
) -> Tensor:
    """Find the images that are still classified correctly under an attack of each strength.

    Args:
        model: gives logits (n, classes) for images.
        images: (n, channels, ...), normalised as the model takes them.
        target: (n,) class indices.
        epsilons: strengths in pixel units; 0 is no attack.
        attack: ``fgsm``, ``pgd``, or either with its options bound: ``functools.partial(pgd, steps=20, mean=...,
            std=...)``.

    Returns:
        Booleans (len(epsilons), n). Their mean over all batches is the accuracy under attack.

    Example:
        >>> model = lambda x: torch.stack([0.5 - x.mean(1), x.mean(1) - 0.5], 1)
        >>> images, target = torch.tensor([[0.1, 0.2], [0.6, 0.5]]), torch.tensor([0, 1])
        >>> adversarial_correct(model, images, target, [0, 0.1, 0.5])
        tensor([[ True,  True],
                [ True, False],
                [False, False]])
    """
    attacked = (attack(model, images, target, epsilon) if epsilon else images for epsilon in epsilons)
    with torch.no_grad():
        return torch.stack([model(x).argmax(1) == target for x in attacked])


class AttackCallback(EvaluationCallback):
    """Report the accuracy under FGSM and PGD in ``trainer.validate`` and ``trainer.test``.

    Writes ``<stage>_attacks.csv``, ``.json`` and ``.png``, prints the table and logs the numbers
    (``test_attacks/fgsm_4_255_accuracy``) and the figure. A PGD pass costs ``pgd_steps`` forward and backward passes
    over the data for each epsilon.

    Args:
        epsilons: attack strengths in pixel units, as numbers (0.0157) or fractions ("4/255").
        mean: subtracted from the pixels by the data's normalisation, one number or one per channel. If None, the
            attribute ``mean`` of the Trainer's data module; 0 if it has none.
        std: divided by in the data's normalisation, likewise; 1 if the data module has none.
        pgd_steps: gradient steps of PGD, which starts at a random point; with 0 only FGSM is run.
        kwargs: the arguments of ``EvaluationCallback``; ``seed`` draws PGD's starting points.

    Raises:
        ValueError: for epsilons that are not in (0, 1], or fewer than 0 steps, at construction.

    Example:
        >>> callback = AttackCallback(["2/255", "4/255"], mean=[0.49, 0.48, 0.45], std=[0.25, 0.24, 0.26])
        >>> trainer = L.Trainer(callbacks=[callback], logger=False, enable_checkpointing=False)
    """

    family = "attacks"

    def __init__(
        self,
        epsilons: Sequence[float | str] = ("1/255", "2/255", "4/255", "8/255"),
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        pgd_steps: int = 10,
        **kwargs: Unpack[EvaluationOptions],
    ) -> None:
        super().__init__(**kwargs)
        self.epsilons = [float(Fraction(epsilon)) for epsilon in epsilons]
        if not self.epsilons or not all(0 < epsilon <= 1 for epsilon in self.epsilons):
            raise ValueError(f"expected epsilons in pixel units, above 0 and at most 1, got {list(epsilons)}")
        if pgd_steps < 0:
            raise ValueError(f"expected pgd_steps of at least 0, got {pgd_steps}")
        self.mean, self.std = mean, std
        self.pgd_steps = pgd_steps

    @override
    def update(self, pl_module: L.LightningModule, images: Tensor, target: Tensor) -> None:
        model = partial(self.logits, pl_module)
        data = getattr(pl_module.trainer, "datamodule", None)
        mean = getattr(data, "mean", 0.0) if self.mean is None else self.mean
        std = getattr(data, "std", 1.0) if self.std is None else self.std
        attacks = {"fgsm": partial(fgsm, mean=mean, std=std)}
        if self.pgd_steps:
            attacks["pgd"] = partial(pgd, steps=self.pgd_steps, generator=self.generator, mean=mean, std=std)
        self.record("none", adversarial_correct(model, images, target, [0.0])[0])
        for name, attack in attacks.items():
            correct = adversarial_correct(model, images, target, self.epsilons, attack)
            for epsilon, right in zip(self.epsilons, correct, strict=True):
                self.record(f"{name} {_label(epsilon)}", right)

    @override
    def compute(self) -> tuple[list[Row], dict[str, Any]]:
        rows: list[Row] = []
        for key, mean in self.means.items():
            name, _, epsilon = key.partition(" ")
            rows.append({"attack": name, "epsilon": epsilon or None, "accuracy": mean.compute().item()})
        return rows, {}

    @override
    def plot(self, rows: list[Row], details: dict[str, Any]) -> Figure:
        figure, (ax,) = axes(1, 5, 3.6)
        plot_attacks(ax, rows)
        return figure


def plot_attacks(ax: Axes, rows: list[Row]) -> None:
    """Draw accuracy over epsilon, one line per attack.

    Args:
        ax: to draw on.
        rows: with "attack", "epsilon" ("4/255" or "0.01") and "accuracy" in [0, 1]; the row of attack "none" begins all
            lines.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = Figure().subplots()
        >>> weak = {"attack": "fgsm", "epsilon": "2/255", "accuracy": 0.5}
        >>> plot_attacks(ax, [{"attack": "none", "epsilon": None, "accuracy": 0.9}, weak])
        >>> [(float(x), float(y)) for x, y in ax.lines[0].get_xydata()]
        [(0.0, 90.0), (2.0, 50.0)]
    """
    clean = [row for row in rows if row["attack"] == "none"]
    for name, marker in {"fgsm": "o", "pgd": "s"}.items():
        line = clean + [row for row in rows if row["attack"] == name]
        if len(line) > len(clean):
            x = [255 * float(Fraction(row["epsilon"] or 0)) for row in line]
            y = [100 * row["accuracy"] for row in line]
            ax.plot(x, y, marker=marker, label=name.upper(), clip_on=False)  # markers at 0 % are not cut
    ax.set(xlabel="ε (pixel steps of 1/255)", ylabel="accuracy (%)", ylim=(0, 100), title="Accuracy under attack")
    ax.grid(alpha=0.3)
    ax.legend()


def _label(epsilon: float) -> str:
    """Write an epsilon as usual, "4/255", or in decimals."""
    steps = epsilon * 255
    return f"{steps:.0f}/255" if abs(steps - round(steps)) < 1e-6 else f"{epsilon:.4g}"


def _per_channel(value: float | Sequence[float], images: Tensor) -> Tensor:
    """Make a tensor that broadcasts against images (n, channels, ...)."""
    tensor = torch.as_tensor(value, device=images.device)
    return tensor if tensor.ndim == 0 else tensor.view(-1, *[1] * (images.ndim - 2))


def _check_pixels(pixels: Tensor) -> None:
    low, high = (bound.item() for bound in torch.aminmax(pixels))
    if low < -0.01 or high > 1.01:
        raise ValueError(
            f"expected images that `mean` and `std` take back to pixels in [0, 1], got pixels from {low:.3g} to "
            f"{high:.3g}: pass the mean and std with which your data was normalised"
        )
