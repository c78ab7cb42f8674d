"""Manifold Mixup through one fit: the hooks on the user's modules, and what stands in the place of training_step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_manifold_mixup._step.call import Call, loss_of
from lightning_manifold_mixup._step.compiled import compiled_parts, fresh_graphs
from lightning_manifold_mixup._step.compiled_check import Eager, eager_step
from lightning_manifold_mixup._step.criteria import CriterionHooks, criterion_candidates, plain_metrics
from lightning_manifold_mixup._step.first_batch import watch
from lightning_manifold_mixup._step.ghost import NoGhostError, batch_of_ghosts, random_states
from lightning_manifold_mixup._step.hooks import MixingHook, TargetHook, hand_plain_inputs
from lightning_manifold_mixup._step.keys import Keys, Places
from lightning_manifold_mixup._step.proof import Passes, Proof
from lightning_manifold_mixup._step.randomness import Stream
from lightning_manifold_mixup._step.reads import Answers
from lightning_manifold_mixup._step.stand_in import StandIn
from lightning_manifold_mixup._step.step import Site, Step
from lightning_manifold_mixup._step.targets import Superposition
from lightning_manifold_mixup._step.trials import Mixes, Trials
from lightning_manifold_mixup.layers import INPUT, LayerReport, named_layers
from lightning_manifold_mixup.mixing import Mix

# Operations of the loss that tell whether it is built as before, from the loss backwards.
_OPERATIONS = 16
_is_training = attrgetter("training")


@dataclass
class Plan:
    """What is settled once, and saved in the checkpoint.

    Attributes:
        layers: S, with the weight of each layer; None until the first batch has been observed.
        seed: of all draws.
        passes: how often the training step runs for a mixed batch; None until that is decided.
    """

    layers: dict[str, float] | None = None
    seed: int | None = None
    passes: int | None = None


@dataclass(frozen=True)
class Options:
    """What the user has set; see ``ManifoldMixupCallback``."""

    keys: Keys
    batch_dim: int | None = None
    target_modules: tuple[str, ...] = ()
    self_check: bool = True
    passes: Passes = "auto"
    clean_weight: float = 0.0


@dataclass
class _Settled:
    """What the first batch of a fit has shown.

    Attributes:
        dims: for each layer of S, the batch dimension of each tensor of its output.
        classes: keys of float targets that hold classes.
        criteria: names of the criterion modules.
    """

    dims: dict[str, Any] = field(default_factory=dict)
    classes: frozenset[Any] = frozenset()
    criteria: list[str] = field(default_factory=list)


class Fit:
    """The hooks, the training step and the proofs of one fit.

    Args:
        trainer: of the fit.
        module: whose ``training_step`` is mixed.
        options: what the user has set.
        plan: S and the seed; completed here.
    """

    def __init__(self, trainer: Any, module: Any, options: Options, plan: Plan) -> None:
        self.trainer, self.module, self.options, self.plan = trainer, module, options, plan
        self.proof = Proof(trainer, options.self_check, options.passes, plan.passes)
        # Numbers that all ranks share, and those of this one.
        self.streams = tuple(Stream(plan.seed, stream) for stream in (0, 1 + trainer.global_rank))
        self.step: Step | None = None
        self.call_settles = False
        self._settled: _Settled | None = None
        self._mixed = 0
        self._plain_inputs = False
        self._checked = False  # in this batch
        self._compared = 0  # up to which batch the compiled step was compared with the eager one
        self._hooks: dict[str, MixingHook] = {}
        self._target_hooks: list[TargetHook] = []
        self._answers = Answers()
        self._states: Any = None  # of the random generators, before the step
        self._written: set[nn.Parameter] = set()  # by the training step itself
        self._writes_batch = False
        self._parts = [part for part in module.modules() if _reads_mode(part.__class__)]
        self._stack = ExitStack()
        plain_metrics(module, self._stack)
        self._criteria = ExitStack()
        self._stack.callback(self._criteria.close)
        self._hook_criteria(criterion_candidates(module))
        named = named_layers(module)
        for name in options.target_modules:
            self._target_hooks.append(TargetHook(options.batch_dim))
            self._stack.callback(named[name].register_forward_hook(self._target_hooks[-1]).remove)
        if plan.layers is not None:
            self._hook_layers(plan.layers)
        self._stand_in = StandIn(self)
        self._stack.callback(self._stand_in.leave)

    # ------------------------------------------------------------------------------------------------- one batch

    def arm(self, layer: str | None, mixes: Mixes, places: Places) -> None:
        """Mixes the next training step.

        Args:
            layer: k; None to observe the step, which chooses S.
            mixes: the draw of each group of samples.
            places: where the inputs and the targets are in the batch.
        """
        self._stand_in.enter()
        if places.shared and not self._plain_inputs:
            self._plain_inputs = True
            hand_plain_inputs(self.module, self._stack)
        self._checked = False
        device = mixes[0].partners.device
        self.step = Step(
            self.module,
            self._site(layer or "", places),
            mixes,
            self._hooks.get(layer) if layer else None,
            Superposition(mixes[0].lam, mixes[0]._number).to(device),
            self._written,
        )
        self.call_settles = layer is None
        for hook in self._target_hooks:
            hook.arm(mixes if layer not in (None, INPUT) else ())

    def disarm(self) -> None:
        """Nothing is mixed any more, until :meth:`arm`."""
        self.step = None
        self.disarm_hooks()

    def disarm_hooks(self) -> None:
        """No forward pass is mixed any more in this batch."""
        for hook in (*self._hooks.values(), *self._target_hooks):
            hook.disarm()

    def leave(self) -> None:
        """Gives ``training_step`` back until the next batch is armed."""
        self._stand_in.leave()

    def close(self) -> None:
        """Takes everything back."""
        self.disarm()
        self._stack.close()

    def run(self, training_step: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The training step of an armed batch."""
        step = self.step
        assert step is not None
        call = Call(args, kwargs)
        if self._settled is None and (settled := self._settle(training_step, call)) is not None:
            self.disarm()  # it ran as it was observed: unmixed
            return settled[0]
        if self.call_settles:
            self._prove(list(self.plan.layers or ()), step, call)
            return training_step(*args, **kwargs)
        if not self._checked:
            self._prove(self.proof.due(list(self.plan.layers or ()), step.site.layer, self._mixed), step, call)
            self._mixed += 1
        eager = self._eager(step, call) if self._checked else None
        output = self._evaluated(training_step, step, call)
        loss = loss_of(output)
        if eager is not None and loss is not None:
            self._stack.callback(eager.compare(loss).remove)
        calls = step.hook.calls if step.hook is not None else 0
        signature, reads = self._signature(step, output), bool(self._answers.new)
        if self.proof.is_new(step.site.layer, signature, calls, reads, self._checked):
            passes = self.proof.passes
            self._prove([step.site.layer], step, call, again=True)
            if self.proof.passes != passes:
                if self.options.clean_weight:
                    output = self._evaluated(training_step, step, call)
                else:
                    output = step.after_all(output, call, self._states)
        self._checked = True
        return output

    def _evaluated(self, training_step: Callable[..., Any], step: Step, call: Call) -> Any:
        able = self.module.automatic_optimization and not step.superposition.lam.ndim
        passes = self.proof.passes_at(step.site.layer) if able else self.proof.passes or 1
        wanted = call
        if self._writes_batch:  # the batch may be asked for again
            call = call.on(batch_of_ghosts(call.batch))
        deciding = self.options.passes == 1 and self.proof.enabled
        step.reader = self._answers = Answers(self.proof.harmless, deciding)
        step.superposition.forgiving = able and self.options.passes == "auto"
        # Where the oracles have seen nothing of the kind, PyTorch's alone: the others take longer to note.
        proven = self.proof.enabled and self.proof.passes == 1 and not self.proof.harmless
        self._states = torch.get_rng_state() if proven else random_states(())
        if self.options.clean_weight:
            output = step.beside_clean(training_step, call, self.options.clean_weight, passes)
        else:
            output = (step.twice if passes == 2 else step.once)(training_step, call)
        if (failure := step.superposition.failure) is not None:
            self.proof.run_twice(str(failure).split(". ")[0], again=True)
            output = output if self.options.clean_weight else step.after_all(output, wanted, self._states)
        return output

    def _eager(self, step: Step, call: Call) -> Eager | None:
        """What the compiled step of this batch is to be compared with, in a batch that the oracles were asked about."""
        plain = not (step.superposition.lam.ndim or self.options.clean_weight or self._settled is None)
        if not plain or not self.module.automatic_optimization or not compiled_parts(self.module):
            return None
        if not self.proof.enabled or self._compared >= self._mixed:  # an LBFGS closure comes again
            return None
        self._compared = self._mixed
        return eager_step(Trials(self.module, call), step.site, step.mixes)

    def _signature(self, step: Step, output: Any) -> Any:
        """What tells that a training step is built as before: its batch, modes and the end of its graph."""
        loss = loss_of(output)
        names: list[type] = []
        queue: list[Any] = [] if loss is None or loss.grad_fn is None else [loss.grad_fn]
        while queue and len(names) < _OPERATIONS:
            function = queue.pop(0)
            if function.name() == "InterpolateBackward":  # ours, elsewhere for each layer
                queue.insert(0, function.next_functions[0][0])
                continue
            names.append(type(function))
            queue += [following for following, _ in function.next_functions if following is not None]
        modes = tuple(map(_is_training, self._parts))
        return id(step.site.places), modes, tuple(names)

    # ---------------------------------------------------------------------------------------------- the first batch

    def _prove(self, layers: Sequence[str], step: Step, call: Call, again: bool = False) -> None:
        if not layers or not self.proof.enabled:
            return
        assert self._settled is not None
        self._checked = True
        places = step.site.places
        sizes = [places.samples(call.batch, group) for group in range(len(places.groups))]
        generator = np.random.default_rng([self._mixed, *sizes])
        device = step.mixes[0].partners.device
        rows = places.rows_of(call.batch)
        partners = [torch.from_numpy(_cycle(n, generator, rows)) for n in sizes]
        draws, permutations = (
            tuple(Mix(torch.tensor(lam, dtype=torch.float32), some).to(device) for some in partners)
            for lam in (0.4, 0.0)
        )
        trials = Trials(self.module, call) if min(sizes) > 1 else None
        sites = [self._site(layer, places) for layer in layers]
        self.proof.check(trials, sites, permutations, draws, self._mixed, again)
        if trials is not None:
            self._written |= trials.written
            self._writes_batch |= trials.writes_batch
        self.plan.passes = self.proof.passes
        if trials is not None and trials.superposed:
            self._hook_criteria(sorted(trials.fired))

    def _settle(self, training_step: Callable[..., Any], call: Call) -> tuple[Any] | None:
        """Observes the step on a ghost: S is chosen, or checked. Returns its output if it had to run for real."""
        step = self.step
        assert step is not None
        places = step.site.places
        real: tuple[Any] | None = None
        for layer in self.plan.layers or ["not yet chosen"]:  # what cannot be mixed is said before anything runs
            self._site(layer, places).mixed(call.batch, step.mixes, step.mixes, "partners")
        try:
            seen = watch(self.module, call, step.site, step.mixes)
        except NoGhostError as error:
            rank_zero_info(
                f"Manifold Mixup, self-check: {error}, so the checks on a copy are left out, and this first batch is "
                "observed without being mixed."
            )
            self.proof.enabled = False
            seen = watch(self.module, call, step.site, step.mixes, training_step)
            real = (seen.output,)
        if seen.report is None:  # the user skips this batch
            return real or (training_step(*call.args, **call.kwargs),)
        for key, line in seen.classes.items():
            rank_zero_info(f"Manifold Mixup: the float target at {key!r} is treated as classes ({line}).")
        self._settled = _Settled(classes=frozenset(seen.classes))
        self._written |= seen.written
        self._settle_layers(seen.report)
        step.site = self._site(step.site.layer, places)
        return real

    def _settle_layers(self, report: LayerReport) -> None:
        plan = self.plan
        if plan.layers is None:
            names = self.trainer.strategy.broadcast(report.default)
            plan.layers = dict.fromkeys(names, 1.0)
            if INPUT in names and self.step is not None:
                self.step.site.places.require_inputs()
            _announce_default(names)
            self._hook_layers(plan.layers)
        elif refusals := [refusal for name in plan.layers if (refusal := report.refusal(name))]:
            raise MisconfigurationException("\n".join(refusals))
        assert self._settled is not None
        for name, hook in self._hooks.items():
            row = report.row(name)
            if report.batch_size > 1:  # the shapes of one sample do not tell which dimension counts the samples
                hook.dims = [dim for dim, shape in zip(row.batch_dims, row.shapes, strict=True) if shape]
                self._settled.dims[name] = hook.dims
            if row.ambiguous and any(len(shape) == 3 for shape in row.shapes):  # a sequence may be time-major
                rank_zero_warn(
                    f"The output of {name!r} has shape {row.shapes[0]}: two dimensions have the size of the batch. The "
                    f"samples are taken to be in dimension {row.batch_dim}; set `batch_dim` to say so, or otherwise."
                )

    # ------------------------------------------------------------------------------------------------------- hooks

    def _site(self, layer: str, places: Places) -> Site:
        settled = self._settled or _Settled()
        options = self.options
        return Site(layer, places, settled.dims, options.batch_dim, settled.classes, options.target_modules)

    def _hook_layers(self, layers: Mapping[str, float]) -> None:
        named = named_layers(self.module)
        for name in layers:
            if name != INPUT:
                self._hooks[name] = MixingHook(self.options.batch_dim)
                self._stack.callback(named[name].register_forward_hook(self._hooks[name]).remove)
        if compiled_parts(self.module):
            self._stack.enter_context(fresh_graphs(len(layers)))

    def _hook_criteria(self, names: Sequence[str]) -> None:
        self._criteria.close()
        named = named_layers(self.module)
        for name in names:
            CriterionHooks().register(named[name], self._criteria)


def _cycle(n: int, generator: np.random.Generator, rows: Tensor | None) -> Any:
    """A random permutation in which every sample has another one for its partner: of those that are trained on."""
    order = generator.permutation(n if rows is None else rows.nonzero().flatten().cpu().numpy())
    partners = np.arange(n)
    partners[order] = np.roll(order, -1)
    return partners


@cache
def _reads_mode(kind: type) -> bool:
    """Whether modules of a class may run otherwise in eval mode: all but those of PyTorch's that never ask.

    A linear layer does not, and the flags of a large network lie far apart in memory.
    """
    if not kind.__module__.startswith("torch.nn."):
        return True
    functions = [function for cls in kind.__mro__ if cls is not nn.Module for function in vars(cls).values()]
    return any("training" in getattr(getattr(f, "__code__", None), "co_names", ()) for f in functions)


def _announce_default(layers: Sequence[str]) -> None:
    why = "`manifold-mixup layers` and `print(eligible_layers(model, x))` show why"
    if not layers:
        raise MisconfigurationException(f"layers='auto' found no place where the whole state can be mixed; {why}.")
    if list(layers) == [INPUT]:
        rank_zero_warn(f"layers='auto' found no eligible layer but the input, so this is input mixup; {why}.")
