"""Runs of the user's training step on ghosts, under conditions that the oracles choose, and what came out of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_manifold_mixup._step.batch import tree as batches
from lightning_manifold_mixup._step.call import Call, loss_of
from lightning_manifold_mixup._step.check.ghost import (
    Backwards,
    batch_of_ghosts,
    ghost_of,
    isolated,
    out_of_reach,
)
from lightning_manifold_mixup._step.check.random_states import random_states, same_random_states
from lightning_manifold_mixup._step.devices import float64
from lightning_manifold_mixup._step.labels.criteria import criterion_hooks, plain_metrics
from lightning_manifold_mixup._step.labels.pairs import tensors
from lightning_manifold_mixup._step.labels.targets import Reader, Superposition, plain
from lightning_manifold_mixup._step.step import How, Site
from lightning_manifold_mixup.mixing import Mix

# How many modules before the loss have their gradients compared.
_HEADS = 3
# Elements of a parameter's gradient that are compared, about: an odd number apart, so spread over rows and columns.
_ELEMENTS = 1 << 16
Mixes = tuple[Mix, ...]


@dataclass(frozen=True)
class Outcome:
    """What one run of the step gave.

    Attributes:
        loss: float64, 0-d; the sum of all losses under manual optimization. None if the step skipped the batch.
        gradient: of the loss by the parameters of the last modules, as one vector.
        precision: of the numbers that the loss is computed from, relative: of the coarsest in the last modules.
        own: the precision of the loss itself; under autocast it is finer.
        random: the states of the random generators at the end.
        used: whether the loss has used the labels in superposition.
        inspected: whether the step knows of the superposition, and has asked for one of the labellings.
        late: whether labels were read in the backward pass, by a hook or in an activation checkpoint.
        beside: the gradient by one more parameter, where it was asked for.
    """

    loss: Tensor | None
    gradient: Tensor
    precision: float
    random: Any
    used: bool = True
    inspected: bool = False
    late: bool = False
    beside: Tensor | None = None
    own: float = 0.0


@dataclass
class Seen:
    """What runs of a training step have shown, whatever their conditions were.

    Attributes:
        unfit: names of modules that were taken for criteria, and are none.
        fired: names of the criteria, modules that were handed labels in superposition.
        superposed: whether any run had labels in superposition.
        written: parameters that the step itself writes into.
        writes_batch: whether the step writes into tensors of its batch.
        random: whether the step has drawn random numbers in training mode.
    """

    unfit: set[str] = field(default_factory=set)
    fired: set[str] = field(default_factory=set)
    superposed: bool = False
    written: set[nn.Parameter] = field(default_factory=set)
    writes_batch: bool = False
    random: bool = False


@dataclass(frozen=True)
class Trials:
    """Runs the user's training step on ghosts, under chosen conditions.

    Attributes:
        module: the LightningModule, which stays as it is.
        call: what its training step was called with.
        train: whether it runs in training mode, or else in eval mode.
        autocast: whether the Trainer's autocast is left on.
        seen: what the runs have shown; shared with trials on other batches or in the other mode (``replace``).
    """

    module: Any
    call: Call
    train: bool = True
    autocast: bool = True
    seen: Seen = field(default_factory=Seen)

    def on(self, batch: Any) -> Trials:
        """Return the same trials on another batch."""
        return replace(self, call=self.call.on(batch))

    def run(
        self,
        site: Site | None = None,
        *,
        states: Mixes = (),
        labels: Mixes = (),
        how: How = "labels",
        also: Iterable[Any] = (),
        around: Callable[[nn.Module, ExitStack], None] | None = None,
        reader: Reader | None = None,
        seed: int | None = None,
        beside: nn.Parameter | None = None,
    ) -> Outcome:
        """Run the user's step on a ghost.

        Args:
            site: where states are mixed; None leaves the batch as it is.
            states: how they are mixed, for each group of samples; none leaves them as they are.
            labels: how the targets are.
            how: integer labels; see ``Site.mixed``.
            also: keys of further parts of the batch, which are permuted like the labels.
            around: called with the ghost, to hook it.
            reader: of host reads; see ``Superposition``.
            seed: of the random numbers; None goes on with those of the module.
            beside: one more parameter to take the gradient by.
        """
        ghost, superposition = ghost_of(self.module), None
        batch = batch_of_ghosts(self.call.batch)
        untouched = [(tensor, tensor._version) for tensor in batches.tensors(batch)]
        if not self.train:
            ghost.eval()
        with ExitStack() as stack:
            writes = stack.enter_context(isolated(self.module))
            stack.enter_context(out_of_reach(self.module))
            if not self.autocast:
                stack.enter_context(torch.autocast(self._device, enabled=False))
            if seed is not None:
                _seed_all(seed)
            plain_metrics(ghost, stack)
            if site is not None:
                if labels and how == "superposed":
                    superposition = Superposition(labels[0].lam).to(labels[0].partners.device)
                    superposition.reader = reader
                    stack.callback(superposition.close)
                batch = site.mixed(batch, states, labels, how, superposition)
                for key in also:
                    batch = batches.replaced(batch, key, batches.get(batch, key)[labels[0].partners])
                if states:
                    site.hook(ghost, states, stack, in_eval=not self.train)
            hooks = criterion_hooks(ghost, without=self.seen.unfit)
            heads = _Heads(ghost, stack)
            if around is not None:
                around(ghost, stack)
            if not ghost.automatic_optimization:
                stack.enter_context(Backwards(lambda loss: heads.note_loss(loss, writes=writes.count)))
            states_before = random_states(self.module.parameters())
            output = self.call.of(ghost.training_step, batch)
            states_after = random_states(self.module.parameters())
            drawn = self.train and not same_random_states(states_before, states_after)
            loss = plain(loss_of(output)) if ghost.automatic_optimization else None
            if superposition is not None:  # as in training: what runs in the backward pass sees plain labels
                superposition.end()
            if loss is not None:
                heads.note_loss(loss, beside)
            used = superposition is None or superposition.used or not superposition.holds_labels
            outcome = heads.outcome(states_after, used=used)
            if superposition is not None:
                outcome = replace(outcome, inspected=superposition.inspected, late=superposition.read_late)
        seen = self.seen
        seen.random |= drawn
        seen.written |= writes.found
        seen.writes_batch |= any(tensor._version != version for tensor, version in untouched)
        seen.superposed |= superposition is not None and superposition.holds_labels
        seen.unfit |= {name for name, hook in hooks.items() if hook.unfit}
        seen.fired |= {name for name, hook in hooks.items() if hook.fired and not hook.unfit}
        return outcome

    def finer(self) -> Trials | None:
        """Return the same trials without the Trainer's autocast; None if there is none."""
        return replace(self, autocast=False) if torch.is_autocast_enabled(self._device) else None

    @property
    def _device(self) -> str:
        return str(self.module.device.type)


class _Heads:
    """The last modules with parameters that a forward pass calls: the gradients that tell of the loss alone."""

    def __init__(self, ghost: nn.Module, stack: ExitStack) -> None:
        self._called: dict[nn.Module, None] = {}
        self._ghost = ghost
        self._losses: list[Tensor] = []
        self._gradients: list[Tensor] = []
        self._dtypes: set[torch.dtype] = set()
        self._beside: Tensor | None = None
        self._writes, self._own = 0, 0.0
        for module in ghost.modules():
            if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
                stack.callback(module.register_forward_hook(self._note).remove)

    def _note(self, module: nn.Module, args: Any, output: Any) -> None:
        self._called.pop(module, None)
        self._called[module] = None
        self._dtypes |= {t.dtype for t in tensors(output) if t.is_floating_point()}  # autocast may be the step's own

    def note_loss(self, loss: Tensor, beside: nn.Parameter | None = None, writes: int = 0) -> None:
        """Take a loss and its gradients, before its graph is freed or its parameters change.

        A loss after weights were written into (``writes`` counts that) is left out: as after an optimizer's step, it
        may depend on the gradient of the first, and is then no mean of two.
        """
        if writes != self._writes and self._losses:
            return
        self._writes = writes
        modules = list(self._called)[-_HEADS:] or [self._ghost]
        parameters = [p for m in modules for p in m.parameters(recurse=m is self._ghost) if p.requires_grad]
        if loss.requires_grad:
            wanted = [*parameters, *([] if beside is None else [beside])]
            found = self._gradients_of(loss.sum(), wanted) if wanted else ()
            self._beside = found[-1] if beside is not None else None
            some = [
                g.detach().flatten()[:: g.numel() // _ELEMENTS | 1] for g in found[: len(parameters)] if g is not None
            ]
            self._gradients += [float64(g) for g in some]
        self._dtypes |= {loss.dtype, *(parameter.dtype for parameter in parameters)}
        if torch.is_autocast_enabled(loss.device.type):
            self._dtypes.add(torch.get_autocast_dtype(loss.device.type))
        self._own = max(self._own, torch.finfo(loss.dtype).eps)
        self._losses.append(float64(loss.detach()).sum())

    def _gradients_of(self, loss: Tensor, wanted: Sequence[Tensor]) -> Sequence[Tensor | None]:
        try:
            return torch.autograd.grad(loss, wanted, allow_unused=True, retain_graph=True)
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
        # A reentrant activation checkpoint takes part in a whole backward pass alone.
        before = [(parameter, parameter.grad) for parameter in self._ghost.parameters()]
        for parameter, _ in before:
            parameter.grad = None
        try:
            loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
            return [tensor.grad for tensor in wanted]
        finally:
            for parameter, gradient in before:
                parameter.grad = gradient

    def outcome(self, random: Any, *, used: bool) -> Outcome:
        """Return what the run gave."""
        if not self._losses:
            return Outcome(None, torch.zeros(0), 0.0, random)
        loss = torch.stack(self._losses).sum()
        gradient = torch.cat(self._gradients or [torch.zeros(1, dtype=torch.float64, device=loss.device)])
        precision = max(torch.finfo(dtype).eps for dtype in self._dtypes)
        return Outcome(loss, gradient, precision, random, used, beside=self._beside, own=self._own)


def _seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
