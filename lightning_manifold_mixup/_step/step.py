"""One training step under Manifold Mixup: the mixed batch goes in, a checked and plain result comes out.

The loss is ``lam * L(y) + (1 - lam) * L(y[partners])``, in one of two ways:

- **one pass**: the labels are in superposition (``targets.py``), and the loss is taken for both labellings;
- **two passes**: the whole step runs once for each labelling, the second time on a ghost (``ghost.py``). Exact for any
  code, at the price of a second forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_manifold_mixup._step.batch import tree as batches
from lightning_manifold_mixup._step.batch.names import marks_padding
from lightning_manifold_mixup._step.call import Call, loss_of, with_loss
from lightning_manifold_mixup._step.check.ghost import batch_of_ghosts, ghost_of
from lightning_manifold_mixup._step.check.random_states import random_states, replayed
from lightning_manifold_mixup._step.labels.criteria import plain_metrics
from lightning_manifold_mixup._step.labels.targets import SAMPLES, MixingError, Superposition, SuperpositionError, plain
from lightning_manifold_mixup._step.mix.draw_check import check_target
from lightning_manifold_mixup._step.mix.hooks import MixingHook, TargetHook, hand_plain_inputs, remember_original
from lightning_manifold_mixup._step.mix.switches import input_mixed, nothing
from lightning_manifold_mixup.layers import INPUT, named_layers

if TYPE_CHECKING:
    from lightning_manifold_mixup._step.batch.keys import Places
    from lightning_manifold_mixup._step.labels.reads import Answers
    from lightning_manifold_mixup.mixing import Mix

How = Literal["superposed", "labels", "partners", "dominant", "other"]


@dataclass(frozen=True)
class Site:
    """Where a batch is mixed, and how its parts are found.

    Attributes:
        layer: k, by name.
        places: where inputs, targets and masks are in the batch.
        dims: for each layer of S, the batch dimension of each tensor of its output, as observed.
        batch_dim: what the user said about it.
        classes: keys of float targets that hold classes: they are put into superposition like integer labels.
        target_modules: names of modules whose output is a target, such as teachers.
    """

    layer: str
    places: Places
    dims: Mapping[str, Any]
    batch_dim: int | None = None
    classes: Collection[Any] = ()
    target_modules: tuple[str, ...] = ()

    def hook(self, module: nn.Module, mixes: tuple[Mix, ...], stack: ExitStack, *, in_eval: bool = False) -> MixingHook:
        """Register hooks on a ghost, which then mixes at this site until ``stack`` is closed."""
        hook = MixingHook(self.batch_dim, self.dims.get(self.layer))
        hook.in_eval = in_eval
        hook.arm(mixes)
        if self.layer != INPUT:
            if self.places.shared:
                hand_plain_inputs(module, stack)
            named = named_layers(module)
            stack.callback(named[self.layer].register_forward_hook(hook).remove)
            for name in self.target_modules:
                target_hook = TargetHook(self.batch_dim)
                target_hook.arm(mixes)
                stack.callback(named[name].register_forward_hook(target_hook).remove)
        return hook

    def mixed(
        self,
        batch: Any,
        inputs: tuple[Mix, ...],
        labels: tuple[Mix, ...],
        how: How,
        superposition: Superposition | None = None,
    ) -> Any:
        """Return the batch that a training step is handed; the batch itself stays as it is.

        Args:
            batch: as the data loader gave it.
            inputs: the draw of each group of samples, for the inputs; they are mixed if k is ``"input"``.
            labels: the same for the targets; empty leaves them as they are.
            how: integer labels: both labellings in superposition, or one of them. Floats that are values are mixed.
            superposition: of the labels.

        Attention masks become the union of both: what a mixed state holds of a partner must be seen.
        """
        if self.layer == INPUT and inputs:
            self.places.require_inputs()
        values: dict[Any, Any] = {}
        for number, group in enumerate(self.places.groups):
            if labels:
                mix = labels[number]
                for key in group.targets:
                    target, classes = self.places.of(batch, key), key in self.classes
                    values[key] = (
                        self._label(target, mix, how, superposition, classes=classes)
                        if isinstance(target, Tensor)
                        else apply_to_collection(target, Tensor, self._label, mix, how, superposition, classes=classes)
                    )
                for key in group.masks:
                    mask = self.places.of(batch, key)
                    of_partners = mask[mix.partners.to(mask.device, non_blocking=mask.is_cuda)]
                    values[key] = union(mask, of_partners, padding=marks_padding(key))
            if self.layer == INPUT and inputs:
                for key in group.inputs:
                    value = self.places.of(batch, key)
                    try:
                        values[key] = inputs[number](value, self.batch_dim)
                    except MixingError as error:
                        raise _unmixable(value, key, error) from None
        return self.places.replace(batch, values)

    def _label(
        self, target: Tensor, mix: Mix, how: How, superposition: Superposition | None, *, classes: bool
    ) -> Tensor:
        dim = self.places.target_dim if target.ndim > self.places.target_dim else 0
        check_target(target, mix.partners.shape[0], dim)
        if target.is_floating_point() and not classes:
            mixed = mix(target, dim)
            return remember_original(mixed, target) if self.layer != INPUT and self.places.shared else mixed
        if how == "labels":
            return target
        indices = mix.partners
        if indices.device != target.device:
            indices = indices.to(target.device, non_blocking=target.is_cuda)
        partners = target.index_select(dim, indices)
        if how == "partners":
            return partners
        assert superposition is not None
        if how == "superposed":  # a copy: what the step writes into its labels must not reach the batch
            own = (target.detach() if target.requires_grad else target).clone()
            superposition.holds_labels = True
            superposed: Tensor = superposition.hold(*superposition.ordered(own, partners), steady=True, averaged=False)
            return superposed
        return superposition.ordered(target, partners)[0 if how == "dominant" else 1]


def _unmixable(value: Any, key: Any, error: MixingError) -> Exception:
    if not any(tensor.is_floating_point() for tensor in batches.tensors(value)):
        return ValueError(
            f"'input' is in S, but the input at {key!r} is {batches.describe(value, '')}: integers, such as token "
            "ids, have no mixture. Take 'input' out of `layers` and mix after the embedding instead."
        )
    return MixingError(f"The input at {key!r} and the target do not hold the same samples. {error}")


def union(mask: Tensor, of_partners: Tensor, *, padding: bool) -> Tensor:
    """Return what is seen of a sample or of its partner; ``padding`` says that the masks tell what is not seen."""
    if mask.dtype == torch.bool:
        return mask & of_partners if padding else mask | of_partners
    return torch.minimum(mask, of_partners) if padding else torch.maximum(mask, of_partners)


class Step:
    """The training step of one batch.

    Args:
        module: whose ``training_step`` is run.
        site: where it is mixed.
        mixes: the draw of each group of samples, on the batch's device; one unless there are several data loaders.
        hook: the hook at layer k of ``module``, or None if k is the input.
        superposition: of the labels.
        written: parameters that the step itself writes into; a ghost that is trained on has copies of them.
    """

    def __init__(
        self,
        module: Any,
        site: Site,
        mixes: tuple[Mix, ...],
        hook: MixingHook | None,
        superposition: Superposition,
        written: Collection[nn.Parameter] = (),
    ) -> None:
        self.module, self.site, self.mixes, self.hook = module, site, mixes, hook
        self.superposition, self.written = superposition, written
        self.reader: Answers | None = None
        self.hooks: list[MixingHook] = []  # of the module, or of the ghosts that are mixed in its place or beside it

    def once(self, training_step: Callable[..., Any], call: Call, hook: MixingHook | None = None) -> Any:
        """Run one pass, with the labels in superposition. An LBFGS closure does so several times, mixed the same."""
        hook = hook or self.hook
        if hook is not None:
            hook.arm(self.mixes)
            self.hooks = [hook]
        superposition = self.superposition
        superposition.open, superposition.used, superposition.reader = True, False, self.reader
        superposition.failure, superposition.read_late = None, False
        try:
            batch = self.site.mixed(call.batch, self.mixes, self.mixes, "superposed", superposition)
            args, kwargs = call.on(batch)
            with input_mixed if self.site.layer == INPUT else nothing:
                output = training_step(*args, **kwargs)
            self._check(output, hook, None if superposition.failure else superposition, batch)
            result = plain(output)
            del batch, args, output  # what nobody holds from here on needs not be made plain
            return result
        finally:
            # The backward pass that is to come must not read the labels; a step of manual optimization has had its own.
            (superposition.end if self.module.automatic_optimization else superposition.close)()

    def twice(self, training_step: Callable[..., Any], call: Call, hook: MixingHook | None = None) -> Any:
        """Run two passes, one for each labelling: the module sees the dominant labels, a ghost of it the others."""
        hook = hook or self.hook
        if not self.module.automatic_optimization:
            raise MixingError(
                f"{self.where} under manual optimization a training step cannot run once for each labelling. Compute "
                "the loss with `mixed_loss(function, logits, y)` or in a criterion module (nn.Module)."
            )
        if self.superposition.lam.ndim:
            raise MixingError(
                f"{self.where} lam has one value for each sample, and the training step runs once for each labelling: "
                f"its loss has been summed up without their lam. Draw one lam for the batch, or {SAMPLES}."
            )
        ghost, second_call = ghost_of(self.module, self.written), call.on(batch_of_ghosts(call.batch))
        states = random_states(self.module.parameters())
        first = self._pass(training_step, call, "dominant", hook)
        # Hooked for good: activation checkpoints run it again in backward.
        beside = self.site.hook(ghost, self.mixes, ExitStack())
        with replayed(self.module.parameters(), states):  # the same dropout in both passes: one state, two labellings
            second = self._pass(ghost.training_step, second_call, "other", beside)
        self.hooks = [beside] if hook is None else [hook, beside]
        loss, other = loss_of(first), loss_of(second)
        if loss is None or other is None:
            return None
        return with_loss(first, self.superposition.mean(loss, other))

    def after_all(self, output: Any, call: Call, states: Any) -> Any:
        """Two passes for a batch whose step the module has run already, in one: both on ghosts.

        So the module has run it once. What the ghosts see of it is as the step has left it.

        Args:
            output: what the step returned.
            call: what it was called with.
            states: of the random generators before it; of PyTorch's alone, as a tensor; or None.
        """
        # Not as they were: those of the devices, and others that nobody has noted. But the same for both.
        after = random_states(self.module.parameters())
        host, _, *others = after if states is None else (states, *after[1:]) if isinstance(states, Tensor) else states
        losses = []
        for how in ("dominant", "other"):
            ghost = ghost_of(self.module, self.written)
            hook = self.site.hook(ghost, self.mixes, ExitStack())
            with replayed(self.module.parameters(), (host, after[1], *others)):
                losses.append(self._pass(ghost.training_step, call.on(batch_of_ghosts(call.batch)), how, hook))
        first, second = map(loss_of, losses)
        return None if first is None or second is None else with_loss(output, self.superposition.mean(first, second))

    def _pass(self, training_step: Callable[..., Any], call: Call, how: How, hook: MixingHook | None) -> Any:
        if hook is not None:
            hook.arm(self.mixes)
        batch = self.site.mixed(call.batch, self.mixes, self.mixes, how, self.superposition)
        with input_mixed if self.site.layer == INPUT else nothing:
            output = call.of(training_step, batch)
        self._check(output, hook, None, batch)
        return output

    def beside_clean(self, training_step: Callable[..., Any], call: Call, weight: float, passes: int) -> Any:
        """Run the mixed batch on a ghost, and add ``weight`` times the clean loss (RegMixup, Pinto et al. 2022)."""
        ghost, mixed_call = ghost_of(self.module, self.written), call.on(batch_of_ghosts(call.batch))
        states = random_states(self.module.parameters())
        clean = call.of(training_step, call.batch)
        plain_metrics(ghost, ExitStack())
        hook = self.site.hook(ghost, self.mixes, ExitStack())
        with replayed(self.module.parameters(), states):
            mixed = (self.once if passes == 1 else self.twice)(ghost.training_step, mixed_call, hook)
            if passes == 1 and self.superposition.failure is not None:
                mixed = self.after_all(mixed, mixed_call, states)
        loss, other = loss_of(clean), loss_of(mixed)
        if loss is None or other is None:
            return None
        return with_loss(clean, weight * loss + other)

    # ---------------------------------------------------------------------------------------------------------- checks

    def _check(self, output: Any, hook: MixingHook | None, superposition: Superposition | None, batch: Any) -> None:
        """Check that the state was mixed at layer k, and that a loss has used the mixed target."""
        if loss_of(output) is None and self.module.automatic_optimization:  # the user skips this batch
            return
        if self.site.layer != INPUT and hook is not None and not hook.calls:
            raise self.unmixed()
        if self.site.target_modules:  # they may be all that the loss compares with
            return
        if superposition is not None and superposition.holds_labels and not superposition.used:
            if self.reader is None or not self.reader.new:
                raise self.unused_target(batch)
            superposition.give_up(SuperpositionError("The loss is of labels that Python code or NumPy has read."))

    def check_halves(self) -> None:
        """Check, before a backward pass or an optimizer step of the user's own, that states are mixed if labels are.

        Raises:
            MixingError: if only one of them is mixed so far.
        """
        if self.superposition.used and self.site.layer != INPUT and self.hooks and not self.hooks[0].calls:
            raise self.unmixed()

    def check_backward(self) -> None:
        """Check after the backward pass that nothing in it has read the labels, which were plain by then.

        Raises:
            MixingError: if a hook or an activation checkpoint has.
        """
        if self.superposition.read_late:
            raise MixingError(
                f"{self.where} code that runs in the backward pass (a hook, an activation checkpoint) has read the "
                "labels, and got the dominant ones alone. Set `passes=2`, which runs the training step once for each "
                "labelling. No weight has changed in this step."
            )

    @property
    def nodes(self) -> int:
        """How many nodes of the autograd graph the mixing of states has taken."""
        return sum([hook.nodes for hook in self.hooks])

    @property
    def where(self) -> str:
        """Name the step, for messages."""
        trainer = self.module.trainer
        return f"Manifold Mixup, epoch {trainer.current_epoch}, step {trainer.global_step}, layer {self.site.layer!r}:"

    def unused_target(self, batch: Any) -> MixingError:
        """Return the error for a batch whose mixed target no loss has used."""
        return MixingError(
            f"{self.where} the target was mixed, but no loss with a gradient used it: the loss takes its labels from "
            f"elsewhere. Set `target_key` (now {_quoted(self.site.places.targets)}) to the key of the labels, or to a "
            f"list of keys. The batch is:\n{batches.describe(batch)}"
        )

    def unmixed(self) -> MixingError:
        """Return the error for a batch whose state has not been mixed."""
        return MixingError(
            f"{self.where} expected the output of this layer to be mixed in training_step, but it was not: the layer "
            "was not called, or only under torch.no_grad() or in eval mode. Take it out of `layers`, or call "
            "`.train()` on it; if the network was compiled and run before this fit, call `torch._dynamo.reset()` first."
        )


def _quoted(keys: Collection[Any]) -> str:
    return ", ".join(map(repr, keys))
