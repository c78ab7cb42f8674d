"""One fit with Manifold Mixup: the hooks on the user's modules, and what takes the place of training_step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_manifold_mixup._step.batch.keys import Keys, Places
from lightning_manifold_mixup._step.call import Call, loss_of
from lightning_manifold_mixup._step.check.compiled import compiled_parts, fresh_graphs
from lightning_manifold_mixup._step.check.compiled_check import Eager, eager_step
from lightning_manifold_mixup._step.check.first_batch import watch
from lightning_manifold_mixup._step.check.ghost import NoGhostError, batch_of_ghosts
from lightning_manifold_mixup._step.check.modes import modes_of, nodes_made, reads_mode
from lightning_manifold_mixup._step.check.proof import Passes, Proof
from lightning_manifold_mixup._step.check.random_states import random_states
from lightning_manifold_mixup._step.check.trials import Mixes, Trials
from lightning_manifold_mixup._step.labels.criteria import CriterionHooks, criterion_candidates, plain_metrics
from lightning_manifold_mixup._step.labels.reads import Answers
from lightning_manifold_mixup._step.labels.targets import Superposition
from lightning_manifold_mixup._step.mix.drawing import Draws, cycle
from lightning_manifold_mixup._step.mix.hooks import MixingHook, TargetHook, hand_plain_inputs
from lightning_manifold_mixup._step.stand_in import StandIn
from lightning_manifold_mixup._step.step import Site, Step
from lightning_manifold_mixup.layers import INPUT, LayerReport, named_layers
from lightning_manifold_mixup.mixing import Mix


@dataclass
class FitState:
    """What is decided once in a fit, and saved in its checkpoints.

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
class _Observed:
    """What the first batch of a fit has shown.

    Attributes:
        dims: for each layer of S, the batch dimension of each tensor of its output.
        classes: keys of float targets that hold classes.
    """

    dims: dict[str, Any] = field(default_factory=dict)
    classes: frozenset[Any] = frozenset()


class Fit:
    """The hooks, the training step and the proofs of one fit.

    Args:
        trainer: of the fit.
        module: whose ``training_step`` is mixed.
        options: what the user has set.
        state: what is decided once; completed here.
    """

    def __init__(self, trainer: Any, module: Any, options: Options, state: FitState) -> None:
        self.trainer, self.module, self.options, self.state = trainer, module, options, state
        self.proof = Proof(trainer, enabled=options.self_check, passes=options.passes, decided=state.passes)
        self.draws = Draws(state.seed, trainer.global_rank)
        self.step: Step | None = None
        self._observed: _Observed | None = None
        self._mixed = 0
        self.observes = self._plain_inputs = False
        self._checked = False  # in this batch
        self._compared = 0  # up to which batch the compiled step was compared with the eager one
        self._hooks: dict[str, MixingHook] = {}
        self._target_hooks: list[TargetHook] = []
        self._answers = Answers()
        self._random_states: Any = None  # of the random generators, before the step; None if it draws no numbers
        self._written: set[nn.Parameter] = set()  # by the training step itself
        self._writes_batch = self._draws_random = False  # whether it does, and whether it draws random numbers
        self._parts = [part for part in module.modules() if reads_mode(part.__class__)]
        self._compiled = bool(compiled_parts(module))
        self._places: Places | None = None  # of the sites below, by layer
        self._sites: dict[str, Site] = {}
        self._armed: list[MixingHook] = []
        self._stack = ExitStack()
        plain_metrics(module, self._stack)
        self._criteria = ExitStack()
        self._stack.callback(self._criteria.close)
        self._hook_criteria(criterion_candidates(module))
        named = named_layers(module)
        for name in options.target_modules:
            self._target_hooks.append(TargetHook(options.batch_dim))
            self._stack.callback(named[name].register_forward_hook(self._target_hooks[-1]).remove)
        if state.layers is not None:
            self._hook_layers(state.layers)
        self._stand_in = StandIn(self)
        self._stack.callback(self._stand_in.leave)

    # ------------------------------------------------------------------------------------------------- one batch

    def arm(self, layer: str | None, mixes: Mixes, places: Places) -> None:
        """Mix the next training step.

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
        hook = self._hooks.get(layer) if layer else None
        self._armed = [*self._target_hooks] if hook is None else [hook, *self._target_hooks]
        superposition = Superposition(mixes[0].lam, mixes[0].number).to(mixes[0].partners.device)
        self.step = Step(self.module, self._site(layer or "", places), mixes, hook, superposition, self._written)
        self.observes = layer is None
        for target_hook in self._target_hooks:
            target_hook.arm(mixes if layer not in (None, INPUT) else ())

    def disarm(self) -> None:
        """Mix nothing until ``arm`` is called again."""
        self.end_batch()
        self.step = None

    def end_batch(self) -> None:
        """Mix no further forward pass in this batch, and end the superposition of its labels."""
        for hook in self._armed:
            hook.disarm()
        if self.step is not None:
            self.step.superposition.close()

    def leave(self) -> None:
        """Give ``training_step`` back until the next batch is armed."""
        self._stand_in.leave()

    def close(self) -> None:
        """Take everything back."""
        self.disarm()
        self._stack.close()

    def run(self, training_step: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run the training step of an armed batch."""
        step = self.step
        assert step is not None
        call = Call(args, kwargs)
        if self._observed is None and (observed := self._observe(training_step, call)) is not None:
            self.disarm()  # it ran as it was observed: unmixed
            return observed[0]
        if self.observes:
            self._prove(self.state.layers or (), step, call)
            return training_step(*args, **kwargs)
        proof, layer = self.proof, step.site.layer
        if not self._checked:
            if due := proof.due(self.state.layers or (), layer, self._mixed):
                self._prove(due, step, call)
            self._mixed += 1
        eager = self._eager(step, call) if self._checked else None
        passes, weight, wanted = self._prepare(step), self.options.clean_weight, call
        if self._writes_batch:  # the batch may be asked for again
            call = call.on(batch_of_ghosts(call.batch))
        before = nodes_made()
        if weight:
            output = step.beside_clean(training_step, call, weight, passes)
        else:
            output = (step.twice if passes == 2 else step.once)(training_step, call)
        nodes = nodes_made() - before - step.nodes
        if (failure := step.superposition.failure) is not None:
            proof.run_twice(str(failure).split(". ")[0], again=True)
            output = output if weight else step.after_all(output, wanted, self._random_states)
        loss = loss_of(output)
        if eager is not None and loss is not None:
            self._stack.callback(eager.compare(loss).remove)
        # What tells that a training step is built as before: its batch, its modes and the size of its graph, to which a
        # compiler adds nodes of its own while it traces.
        built = id(step.site.places), modes_of(self._parts), loss is None or self._compiled or nodes
        calls, checked = step.hook.calls if step.hook else 0, self._checked or failure is not None
        if proof.is_new(layer, passes, built, calls, reads=self._answers.new, checked=checked):
            decided = proof.passes
            self._prove([layer], step, wanted, again=True)
            if proof.passes != decided:
                if weight:
                    output = step.beside_clean(training_step, wanted, weight, self._prepare(step))
                else:
                    output = step.after_all(output, wanted, self._random_states)
        self._checked = True
        return output

    def _prepare(self, step: Step) -> int:
        """How often the step is to run; and what it needs, should that turn out to be wrong."""
        proof, passes = self.proof, self.options.passes
        able = proof.copies and self.module.automatic_optimization and not step.superposition.lam.ndim
        step.reader = self._answers = Answers(proof.harmless, deciding=passes == 1 and proof.enabled)
        step.superposition.forgiving = able and passes == "auto"
        # Where the oracles have seen nothing of the kind, PyTorch's alone, or none: to note them all takes time.
        proven = proof.enabled and proof.passes == 1 and not proof.harmless
        self._random_states = random_states(()) if not proven else torch.get_rng_state() if self._draws_random else None
        return proof.passes_at(step.site.layer) if able else proof.passes or 1

    def _eager(self, step: Step, call: Call) -> Eager | None:
        """Run the eager step to compare the compiled one with; None if the oracles were not asked about the batch."""
        plain = not (step.superposition.lam.ndim or self.options.clean_weight or self._observed is None)
        if not plain or not self.module.automatic_optimization or not self._compiled:
            return None
        if not self.proof.enabled or self._compared >= self._mixed:  # an LBFGS closure runs several times for a batch
            return None
        self._compared = self._mixed
        return eager_step(Trials(self.module, call), step.site, step.mixes)

    # ---------------------------------------------------------------------------------------------- the first batch

    def _prove(self, layers: Collection[str], step: Step, call: Call, *, again: bool = False) -> None:
        if not layers or not self.proof.enabled:
            return
        assert self._observed is not None
        self._checked = True
        places = step.site.places
        sizes = places.sizes(call.batch)
        generator = np.random.default_rng([self._mixed, *sizes])
        device = step.mixes[0].partners.device
        partners = [torch.from_numpy(cycle(n, generator, places.rows_of(call.batch))) for n in sizes]
        draws, permutations = (
            tuple(Mix(torch.tensor(lam, dtype=torch.float32), some).to(device) for some in partners)
            for lam in (0.4, 0.0)
        )
        trials = Trials(self.module, call) if min(sizes) > 1 else None
        sites = [self._site(layer, places) for layer in layers]
        self.proof.check(trials, sites, permutations, draws, self._mixed, again=again)
        if trials is not None:
            self._written |= trials.seen.written
            self._writes_batch |= trials.seen.writes_batch
            self._draws_random |= trials.seen.random
        self.state.passes = self.proof.passes
        if trials is not None and trials.seen.superposed:
            self._hook_criteria(sorted(trials.seen.fired))

    def _observe(self, training_step: Callable[..., Any], call: Call) -> tuple[Any] | None:
        """Observe the step on a ghost: S is chosen, or checked. Return its output if it had to run for real."""
        step = self.step
        assert step is not None
        places = step.site.places
        real: tuple[Any] | None = None
        for layer in self.state.layers or ["not yet chosen"]:  # raises for what cannot be mixed, before anything runs
            self._site(layer, places).mixed(call.batch, step.mixes, step.mixes, "partners")
        try:
            seen = watch(self.module, call, step.site, step.mixes)
        except NoGhostError as error:
            rank_zero_info(
                f"Manifold Mixup, self-check: {error}, so the checks on a copy are left out, and this first batch is "
                "observed without being mixed."
            )
            self.proof.without_copies()
            seen = watch(self.module, call, step.site, step.mixes, training_step)
            real = (seen.output,)
        if seen.report is None:  # the user skips this batch
            return real or (training_step(*call.args, **call.kwargs),)
        for key, line in seen.classes.items():
            rank_zero_info(f"Manifold Mixup: the float target at {key!r} is treated as classes ({line}).")
        self._observed = _Observed(classes=frozenset(seen.classes))
        self._written |= seen.written
        self._decide_layers(seen.report)
        self._places = None
        step.site = self._site(step.site.layer, places)
        return real

    def _decide_layers(self, report: LayerReport) -> None:
        state = self.state
        if state.layers is None:
            names = self.trainer.strategy.broadcast(report.default)
            state.layers = dict.fromkeys(names, 1.0)
            if INPUT in names and self.step is not None:
                self.step.site.places.require_inputs()
            _announce_default(names, report)
            self._hook_layers(state.layers)
        elif refusals := [refusal for name in state.layers if (refusal := report.refusal(name))]:
            raise MisconfigurationException("\n".join(refusals))
        assert self._observed is not None
        for name, hook in self._hooks.items():
            row = report.row(name)
            if report.batch_size > 1:  # the shapes of one sample do not tell which dimension counts the samples
                hook.dims = [dim for dim, shape in zip(row.batch_dims, row.shapes, strict=True) if shape]
                self._observed.dims[name] = hook.dims
            if row.ambiguous and any(len(shape) == 3 for shape in row.shapes):  # a sequence may be time-major
                rank_zero_warn(
                    f"The output of {name!r} has shape {row.shapes[0]}: two dimensions have the size of the batch. The "
                    f"samples are taken to be in dimension {row.batch_dim}; set `batch_dim` to say so, or otherwise."
                )

    # ------------------------------------------------------------------------------------------------------- hooks

    def _site(self, layer: str, places: Places) -> Site:
        if places is not self._places:
            self._places, self._sites = places, {}
        site = self._sites.get(layer)
        if site is None:
            observed, options = self._observed or _Observed(), self.options
            site = Site(layer, places, observed.dims, options.batch_dim, observed.classes, options.target_modules)
            self._sites[layer] = site
        return site

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


def _announce_default(layers: Sequence[str], report: LayerReport) -> None:
    why = "`manifold-mixup layers` and `print(eligible_layers(model, x))` show why"
    if not layers:
        called = [(row.order or 0, row.name) for row in report.rows if row.shapes and row.name != INPUT]
        example = f" For example: {report.refusal(min(called)[1])}" if called else ""
        raise MisconfigurationException(
            f"layers='auto' found no place where the whole state can be mixed; {why} of each layer.{example}"
        )
    if list(layers) == [INPUT]:
        rank_zero_warn(f"layers='auto' found no eligible layer but the input, so this is input mixup; {why}.")
