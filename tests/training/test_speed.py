"""What must not happen in a step, counted rather than timed: waiting for the device, dense labels, a second softmax."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Accuracy

import lightning_manifold_mixup
from lightning_manifold_mixup import ManifoldMixupCallback, Mix, draw_mix
from lightning_manifold_mixup._step.check.modes import reads_mode
from lightning_manifold_mixup._step.check.proof import Proof
from lightning_manifold_mixup._step.labels.targets import plain
from lightning_manifold_mixup._step.mix.drawing import Draws
from lightning_manifold_mixup._step.mix.randomness import Stream, generator

# What reads a number from a device, or has a shape that depends on its data.
WAITING = ("_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero", "unique")


class Counting(TorchDispatchMode):
    """Counts, of all operations, those for which a host waits where the data are on a device."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.from_python = 0  # tensors made of Python's numbers
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        device = kwargs.get("device")
        copied = name == "_to_copy" and device is not None and device.type == "cpu" and not kwargs.get("non_blocking")
        if name in WAITING or (copied and args[0].device.type != "cpu"):
            self.waits.append(name)
        self.from_python += name == "lift_fresh"
        output = func(*args, **kwargs)
        if isinstance(output, Tensor):
            self.sizes.append(output.numel())
        return output


@pytest.fixture
def device_like(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of all devices but the CPU, where reading lam on the host is no wait."""
    from lightning_manifold_mixup._step.mix import interpolation

    monkeypatch.setattr(interpolation, "HOSTS", set())


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class WithMetric(Classifier):
    """The same labels go to a metric, and the loss and the metric are logged."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = Accuracy(task="multiclass", num_classes=3, validate_args=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self.net(x)
        loss = F.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.log_dict({"loss": loss, "accuracy": self.accuracy}, on_step=True, on_epoch=True)
        return loss


class CountingSteps(L.Callback):
    """Counts from the start of a batch, before the mixing callback has it, to the start of the next."""

    def __init__(self) -> None:
        self.waits: list[list[str]] = []
        self.from_python: list[int] = []
        self.mode: Counting | None = None

    def on_train_batch_start(self, *args: Any) -> None:
        self.stop()
        self.mode = Counting()
        self.mode.__enter__()

    def on_train_epoch_end(self, *args: Any) -> None:
        self.stop()

    def stop(self) -> None:
        if self.mode is not None:
            self.mode.__exit__(None, None, None)
            self.waits.append(self.mode.waits)
            self.from_python.append(self.mode.from_python)
            self.mode = None


def fit(
    *callbacks: L.Callback, accelerator: str = "cpu", module: Callable[[], Classifier] = Classifier, epochs: int = 1
) -> None:
    data = TensorDataset(torch.randn(20, 6), torch.randint(3, (20,)))
    trainer = L.Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        accelerator=accelerator,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module(), DataLoader(data, batch_size=5))


def waits(*callbacks: L.Callback, module: type[Classifier]) -> list[list[str]]:
    counting = CountingSteps()
    fit(counting, *callbacks, module=module)
    assert len(counting.waits) == 4
    return counting.waits[1:]  # the layers are checked on the first batch


@pytest.mark.usefixtures("device_like")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("module", [Classifier, WithMetric])
@pytest.mark.parametrize("log_mixing", [False, True])
@pytest.mark.parametrize("layers", [["input"], ["net.1"], ["input", "net.1"]])
def test_a_step_waits_no_more_than_one_without(layers: list[str], log_mixing: bool, module: type[Classifier]) -> None:
    """What Lightning's own step reads, and the metric's, is all."""
    ours = ManifoldMixupCallback(layers=layers, log_mixing=log_mixing, seed=0)
    assert waits(ours, module=module) == waits(module=module)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_logging_sends_no_numbers_to_the_device() -> None:
    """``torch.tensor(3.0, device="cuda")`` waits until the number is there."""
    counts = {}
    for log_mixing in (False, True):
        counting = CountingSteps()
        fit(counting, ManifoldMixupCallback(layers=["net.1"], log_mixing=log_mixing, seed=0))
        counts[log_mixing] = counting.from_python[2:]  # Lightning prepares what it logs at the first time
    assert counts[True] == counts[False]


class Reading(L.Callback):
    """A callback that waits for the device in each hook where the mixing callback does something."""

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        module.net[0].bias.sum().item()

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        module.net[0].bias.sum().item()


def test_the_count_sees_the_waits_of_a_callback() -> None:
    """At both ends of a batch."""
    with_reading, without = waits(Reading(), module=Classifier), waits(module=Classifier)
    assert [len(a) - len(b) for a, b in zip(with_reading, without, strict=True)] == [2, 2, 2]


def test_the_count_sees_a_wait() -> None:
    with Counting() as counting:
        torch.ones(3).sum().item()
    assert counting.waits == ["_local_scalar_dense"]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.usefixtures("device_like")
def test_mixing_on_a_device_without_data_reads_nothing(transposed: bool) -> None:
    """A meta tensor has no data: whatever asks for some, raises."""
    from lightning_manifold_mixup._step.mix.interpolation import interpolate

    h, lam, partners = (torch.empty(4, 3), torch.tensor(0.3), torch.arange(4))
    mixed = interpolate(*(t.to("meta") for t in (h, lam, partners)), 0, transposed=transposed)
    assert mixed.device.type == "meta"


def test_the_loss_of_many_classes_makes_nothing_dense_of_the_labels() -> None:
    """All large tensors are log-probabilities (and their gradients), no more than for two plain losses."""
    logits = torch.randn(8, 50_000, requires_grad=True)
    y = torch.randint(50_000, (8,))
    mix = Mix(torch.tensor(0.3), torch.randperm(8))
    with Counting() as two:
        for labels in (y, y[mix.partners]):
            F.cross_entropy(logits, labels)
    with Counting() as mixed:
        F.cross_entropy(logits, mix.target(y))
    assert large(mixed, logits) <= large(two, logits)


@pytest.mark.parametrize("stream", [0, 3])
@pytest.mark.parametrize("counts", [(0, 1, 2), (7, 7), (2**40, 5)])
def test_one_generator_for_all_batches_draws_what_a_new_one_for_each_would(
    counts: tuple[int, ...], stream: int
) -> None:
    """Whatever the batch before has used of it, half of a 64-bit number included."""
    kept = Stream(11, stream)
    for count in counts:
        ours, theirs = kept.at(count), generator(11, count, stream)
        for number in (ours, theirs):
            number.integers(5, dtype=np.uint32)
        assert ours.beta(0.3, 2.0) == theirs.beta(0.3, 2.0)
        assert ours.permutation(33).tolist() == theirs.permutation(33).tolist()
        ours.integers(5, dtype=np.uint32)


@pytest.mark.parametrize("n", [(8, 8, 8, 8, 8), (8, 8, 5, 8, 8), (2000, 2000, 2000, 2000, 2000)])
def test_draws_made_ahead_are_those_of_each_batch_alone(n: tuple[int, ...]) -> None:
    """Whatever is asked for first, and whatever the batches before have asked for; after a resume, too."""
    draws = Draws(5, rank=2)
    for count, samples in zip((3, 4, 5, 6, 40), n, strict=True):
        shared, own = generator(5, count, 0), generator(5, count, 3)
        draws.start(count)
        if count == 4:
            assert draws.own.random() == own.random()
        if count == 5:
            assert draws.shared.random() == shared.random()
        assert [draws.uniform() for _ in range(3)] == [shared.random() for _ in range(3)]
        for _ in range(2):
            ours, theirs = draws.mix(samples, 2.0), draw_mix(samples, 2.0, own)
            assert (ours.lam, ours.partners.tolist()) == (theirs.lam, theirs.partners.tolist())
        assert (draws.own.random(), draws.shared.random()) == (own.random(), shared.random())


class Deepest(L.Callback):
    """How many of our functions stand above each other at most, within a step."""

    def __init__(self) -> None:
        self.depth = 0
        self.root = str(Path(lightning_manifold_mixup.__file__).parent)

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            sys.setprofile(self.profile)

    def on_before_optimizer_step(self, *args: Any) -> None:
        sys.setprofile(None)

    def profile(self, frame: FrameType | None, event: str, argument: Any) -> None:
        depth = 0
        while frame is not None:
            depth += frame.f_code.co_filename.startswith(self.root)
            frame = frame.f_back
        self.depth = max(self.depth, depth)


@pytest.mark.parametrize("layer", ["input", "net.1"])
def test_a_step_is_at_most_six_functions_deep(layer: str) -> None:
    deepest = Deepest()
    fit(deepest, ManifoldMixupCallback(layers=[layer], seed=0))
    assert 3 <= deepest.depth <= 6


@pytest.mark.parametrize("layer", ["input", "net.1"])
def test_small_and_large_states_are_mixed_alike(layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By PyTorch's operations with their own gradients, and by ours."""
    weights = []
    for small in (0, 1 << 14):
        monkeypatch.setattr("lightning_manifold_mixup._step.mix.interpolation.SMALL", small)
        torch.manual_seed(1)
        after = Weights()
        fit(ManifoldMixupCallback(layers=[layer], seed=0), after)
        weights.append(after.weights)
    torch.testing.assert_close(*weights)


class Weights(L.Callback):
    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        self.weights = [parameter.detach().clone() for parameter in module.parameters()]


class Varying(Classifier):
    """A loop of another length in each batch, as over time steps."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        for _ in range(batch_idx % 7):
            loss = loss * 1.0
        return loss


class Calls(L.Callback):
    """Counts the calls of functions, of Python and of C, from the start of each batch to that of the next."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.numbers.append(0)
        sys.setprofile(self.note)

    def note(self, frame: FrameType, event: str, arg: Any) -> None:
        self.numbers[-1] += event in ("call", "c_call")

    def on_train_end(self, *args: Any) -> None:
        sys.setprofile(None)


def test_what_a_step_does_in_python_does_not_grow_with_the_network() -> None:
    """The time does, a little: after a long forward pass the code that mixes is no longer in the processor's caches."""

    class Deep(Classifier):
        def __init__(self, depth: int) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 8), *[nn.ReLU() for _ in range(depth)], nn.Linear(8, 3))

    def added(depth: int) -> float:
        numbers = []
        for callbacks in ([], [ManifoldMixupCallback(layers=["net.0"], seed=0)]):
            calls = Calls()
            fit(calls, *callbacks, module=partial(Deep, depth), epochs=3)
            numbers.append(statistics.median(calls.numbers))
        return numbers[1] - numbers[0]

    assert added(64) == added(2) > 0


def test_a_step_that_is_built_anew_each_time_is_checked_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    check = Proof.check

    def noted(self: Proof, *args: Any, **kwargs: Any) -> None:
        asked.append(args[4])
        check(self, *args, **kwargs)

    monkeypatch.setattr(Proof, "check", noted)
    fit(ManifoldMixupCallback(layers=["net.1"], seed=0), module=Varying, epochs=6)
    # The first batch; the second and third as they come; the fourth kind, met again in the 8th batch, after 4 more; and
    # the batch of number 10. Nothing is new after that.
    assert asked == [0, 2, 3, 8, 10]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"reduction": "sum"},
        {"reduction": "none"},
        {"weight": torch.tensor([0.2, 1.0, 3.0])},
        {"ignore_index": 1},
        {"size_average": False},
        {"reduce": False},
        {"label_smoothing": 0.1},
    ],
)
@pytest.mark.parametrize("lam", [0.25, 0.7])
@pytest.mark.filterwarnings("ignore:size_average and reduce")
def test_the_short_way_through_cross_entropy(arguments: dict[str, Any], lam: float) -> None:
    """Value and gradient are those of two plain losses, weighted by hand."""
    logits = torch.randn(6, 3, requires_grad=True)
    y, partners = torch.tensor([0, 1, 2, 2, 1, 0]), torch.tensor([1, 2, 3, 4, 5, 0])
    loss = plain(F.cross_entropy(logits, Mix(torch.tensor(lam), partners).target(y), **arguments))
    first, second = (F.cross_entropy(logits, labels, **arguments) for labels in (y, y[partners]))
    expected = lam * first + (1 - lam) * second
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(value.sum(), logits)[0] for value in (loss, expected))
    torch.testing.assert_close(ours, theirs)


class Own(nn.Identity):
    def forward(self, x: Tensor) -> Tensor:
        return self.of(x)

    def of(self, x: Tensor) -> Tensor:
        return x if self.training else 2 * x


@pytest.mark.parametrize(
    "layer",
    [
        Own(),
        nn.Linear(6, 6),
        nn.ReLU(),
        nn.LayerNorm(6),
        nn.Dropout(),
        nn.AlphaDropout(),
        nn.RReLU(),
        nn.BatchNorm1d(6),
        nn.InstanceNorm1d(4, track_running_stats=True),
        nn.LSTM(6, 6, num_layers=2, dropout=0.5),
        nn.MultiheadAttention(6, 2, dropout=0.5),
        nn.TransformerEncoderLayer(6, 2, 8),
    ],
)
def test_no_module_that_asks_for_its_mode_is_left_out_of_what_is_watched(layer: nn.Module) -> None:
    x = torch.randn(4, 6)
    outputs = []
    for training in (True, False):
        torch.manual_seed(0)
        output = layer.train(training)(*[x] * (3 if isinstance(layer, nn.MultiheadAttention) else 1))
        outputs.append(output if isinstance(output, Tensor) else output[0])
    depends = not torch.equal(*outputs)
    assert depends <= any(reads_mode(type(part)) for part in layer.modules())
    assert depends or not reads_mode(type(layer))


def large(counting: Counting, logits: Tensor) -> int:
    return sum(size >= logits.numel() for size in counting.sizes)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device; the waits are counted without one above"
)
@pytest.mark.parametrize("log_mixing", [False, True])
@pytest.mark.parametrize("layers", [["input"], ["net.1"]])
def test_no_synchronisation_on_a_gpu(layers: list[str], log_mixing: bool) -> None:
    """From before the mixing callback starts with a batch until after it has ended with it."""

    class Strict(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx > 1:
                torch.cuda.set_sync_debug_mode("error")

    class Lenient(L.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            torch.cuda.set_sync_debug_mode("default")

    ours = ManifoldMixupCallback(layers=layers, log_mixing=log_mixing, seed=0)
    try:
        fit(Strict(), ours, Lenient(), accelerator="gpu")
    finally:
        torch.cuda.set_sync_debug_mode("default")
