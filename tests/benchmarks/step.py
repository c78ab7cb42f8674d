"""A training step with the callback, and the way others do it, over one without, through Lightning's Trainer."""

from __future__ import annotations

import logging
import statistics
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_manifold_mixup import ManifoldMixupCallback, draw_mix
from lightning_manifold_mixup.paper.models import MLP, PreActResNet

from .measure import Measure, Section

warnings.filterwarnings("ignore", module="lightning")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Repeated(IterableDataset[Any]):
    """One batch, again and again: no time goes into data."""

    def __init__(self, shape: tuple[int, ...], classes: int, times: int, device: str = "cpu") -> None:
        x, y = torch.randn(shape, device=device), torch.randint(classes, (shape[0],), device=device)
        if device == "cuda" and x.ndim == 4:
            x = x.to(memory_format=torch.channels_last)
        self.batch, self.times = (x, y), times

    def __iter__(self) -> Iterator[Any]:
        return iter([self.batch] * self.times)


class Classifier(L.LightningModule):
    """As a user writes it."""

    def __init__(self, model: nn.Module, layer: str) -> None:
        super().__init__()
        self.model, self.layer = model, layer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.model(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-4, momentum=0.9)


class Peer(Classifier):
    """Somebody's own mixing, in every second batch, as the callback here."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.mixed_step(*batch) if is_mixed(batch_idx) else super().training_step(batch, batch_idx)

    def mixed_step(self, x: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError


class EverySecond(ManifoldMixupCallback):
    """So that mixed steps and others are timed in turn, and in one fit."""

    def should_mix(self, trainer: L.Trainer, batch_idx: int) -> bool:
        return is_mixed(batch_idx)


def is_mixed(batch_idx: int) -> bool:
    return batch_idx % 2 == 1


class OneHot(Peer):
    """One-hot labels made on the host, the state mixed by two multiplications, a loss of soft labels."""

    def mixed_step(self, x: Tensor, y: Tensor) -> Tensor:
        mix = draw_mix(len(x))
        lam, partners = mix.lam.item(), mix.partners.to(x.device)
        handle = self.get_submodule(self.layer).register_forward_hook(
            lambda module, args, h: lam * h + (1 - lam) * h[partners]
        )
        logits = self.model(x)
        handle.remove()
        labels = F.one_hot(y.cpu(), logits.shape[1]).float()
        target = (lam * labels + (1 - lam) * labels[partners.cpu()]).to(x.device)
        return -(target * F.log_softmax(logits, dim=1)).sum(dim=1).mean()


class Rebound(Peer):
    """The layer's ``forward`` replaced for the step, the loss of both labellings."""

    def mixed_step(self, x: Tensor, y: Tensor) -> Tensor:
        mix = draw_mix(len(x))
        lam, partners = mix.lam.item(), mix.partners.to(x.device)
        layer = self.get_submodule(self.layer)
        original = layer.forward

        def forward(*args: Any) -> Tensor:
            h: Tensor = original(*args)
            return lam * h + (1 - lam) * h[partners]

        layer.forward = forward
        logits = self.model(x)
        del layer.forward
        return lam * F.cross_entropy(logits, y) + (1 - lam) * F.cross_entropy(logits, y[partners])


class TwoForwards(Peer):
    """The partners have a forward pass of their own, up to the layer."""

    def mixed_step(self, x: Tensor, y: Tensor) -> Tensor:
        mix = draw_mix(len(x))
        lam, partners = mix.lam.item(), mix.partners.to(x.device)
        kept: list[Tensor] = []

        def keep(module: nn.Module, args: Any, h: Tensor) -> None:
            kept.append(h)
            raise StopIteration

        layer = self.get_submodule(self.layer)
        handle = layer.register_forward_hook(keep)
        try:
            self.model(x[partners])
        except StopIteration:
            handle.remove()
        handle = layer.register_forward_hook(lambda module, args, h: lam * h + (1 - lam) * kept[0])
        logits = self.model(x)
        handle.remove()
        return lam * F.cross_entropy(logits, y) + (1 - lam) * F.cross_entropy(logits, y[partners])


class PerSample(Peer):
    """A lam for each sample, and ``torch.lerp``."""

    def mixed_step(self, x: Tensor, y: Tensor) -> Tensor:
        partners = torch.randperm(len(x), device=x.device)
        lam = torch.rand(len(x), device=x.device)
        handle = self.get_submodule(self.layer).register_forward_hook(
            lambda module, args, h: torch.lerp(h[partners], h, lam.to(h.dtype).view(-1, *[1] * (h.ndim - 1)))
        )
        logits = self.model(x)
        handle.remove()
        losses = (F.cross_entropy(logits, labels, reduction="none") for labels in (y, y[partners]))
        first, second = losses
        return torch.lerp(second, first, lam).mean()


WARM_UP = 2


class Spy(L.Callback):
    """Times the steps, the first ones aside; or takes the peak of memory of the last, beyond what is held before it."""

    def __init__(self, measure: Measure, steps: int, memory: bool = False, warm_up: int = WARM_UP) -> None:
        self.measure, self.steps, self.memory, self.warm_up = measure, steps, memory, warm_up
        self.times: list[float] = []
        self.peak = 0
        self._start = 0.0

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        if self.memory:
            self._peak = self.measure.peak()
            self._result = self._peak.__enter__()

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        now = self.measure.now()
        if batch_idx > self.warm_up:
            self.times.append(now - self._start)
        if self.memory and batch_idx == self.steps - 1:
            self.measure.from_here()
        self._start = self.measure.now()

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        if self.memory:
            self._peak.__exit__(None, None, None)
            self.peak = self._result[0]


def fit(measure: Measure, module: Classifier, shape: tuple[int, ...], classes: int, steps: int, **kwargs: Any) -> Spy:
    """Some steps of training; kwargs are `memory`, `warm_up`, `callbacks` and of the Trainer."""
    spy = Spy(measure, steps, kwargs.pop("memory", False), kwargs.pop("warm_up", WARM_UP))
    options: dict[str, Any] = {"accelerator": "cpu", "devices": 1}
    if measure.device == "cuda":
        options |= {"accelerator": "gpu", "precision": "bf16-mixed"}
    options |= kwargs
    trainer = L.Trainer(
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options | {"callbacks": [spy, *kwargs.get("callbacks", [])]},
    )
    trainer.fit(module, DataLoader(Repeated(shape, classes, steps, measure.device), batch_size=None))
    return spy


Method = tuple[type[Classifier], Callable[[str], list[L.Callback]]]


def no_callbacks(layer: str) -> list[L.Callback]:
    return []


METHODS: dict[str, Method] = {
    "callback": (Classifier, lambda layer: [EverySecond(alpha=1.0, layers=[layer], seed=0)]),
    "callback, at the input": (Classifier, lambda layer: [EverySecond(alpha=1.0, layers=["input"], seed=0)]),
    "one-hot on the host, two products": (OneHot, no_callbacks),
    "forward rebound": (Rebound, no_callbacks),
    "two forwards": (TwoForwards, no_callbacks),
    "lam per sample, lerp": (PerSample, no_callbacks),
}


def networks(measure: Measure) -> Iterator[tuple[str, nn.Module, str, tuple[int, ...], int, int, float]]:
    """Name, network, layer, input, classes, steps of a fit, target."""
    small = measure.device == "cpu"  # what a core does in minutes
    yield "MLP 3x512, batch 512", MLP(784, 10, (512, 512, 512)), "model.layer1", (512, 784), 10, 61, 1.15
    net = PreActResNet(18, 10, initial_channels=16 if small else 64)
    name = "PreActResNet18, width 16" if small else "PreActResNet18"
    yield f"{name}, batch 128", net, "model.layer1", (128, 3, 32, 32), 10, 13 if small else 61, 1.01
    if not small:
        yield "ResNet-50, batch 128", timm.create_model("resnet50"), "model.layer1", (128, 3, 224, 224), 1000, 61, 1.01
    vit = timm.create_model("vit_small_patch16_224", num_classes=1000)
    n = 2 if small else 128
    yield f"ViT-S/16, batch {n}", vit, "model.blocks.2", (n, 3, 224, 224), 1000, 13 if small else 61, 1.01


def run(measure: Measure, rounds: int = 3) -> Section:
    section = Section(
        "The step: mixing at a layer over a step without, through the Trainer; and the same as others write it",
        ["network", "method", "time", "target", "peak MB", "beyond plain MB", "one output MB"],
        [],
        "Time: every second batch is mixed; the median of mixed steps over the steps just before them.\n"
        "Memory: the peak of a mixed step; target: at most one output of the mixed layer beyond plain.\n"
        "On a GPU: bfloat16 (autocast), channels_last.",
    )
    for name, net, layer, shape, classes, steps, target in networks(measure):
        if measure.device == "cuda":
            net = net.to(memory_format=torch.channels_last)
        ratios: dict[str, list[float]] = {method: [] for method in METHODS}
        for _ in range(rounds):
            for method, (kind, callbacks) in METHODS.items():
                times = fit(measure, kind(net, layer), shape, classes, steps, callbacks=callbacks(layer)).times
                ratios[method] += [mixed / plain for plain, mixed in zip(times[::2], times[1::2], strict=False)]
        peaks = {
            method: fit(measure, kind(net, layer), shape, classes, WARM_UP + 2, callbacks=each(layer), memory=True).peak
            for method, (kind, each) in ({"without": (Classifier, no_callbacks)} | METHODS).items()
        }
        output = size_of_output(net, layer, shape)
        section.add(name, "without", "1", "", f"{peaks['without'] / 2**20:.2f}", "", "")
        for method, each in ratios.items():
            ours = METHODS[method][0] is Classifier
            one = 4 * torch.Size(shape).numel() if "input" in method else output
            section.add(
                "",
                method,
                f"{statistics.median(each):.3f}",
                target if ours else "",
                *(f"{size / 2**20:.2f}" for size in (peaks[method], peaks[method] - peaks["without"], one)),
            )
    return section


def size_of_output(net: nn.Module, layer: str, shape: tuple[int, ...]) -> int:
    """Bytes of what the layer puts out for a batch."""
    sizes: list[int] = []
    handle = net.get_submodule(layer.removeprefix("model.")).register_forward_hook(
        lambda module, args, h: sizes.append(h.nbytes)
    )
    with torch.no_grad():
        net.cpu()(torch.zeros(shape))
    handle.remove()
    return sizes[0]
