"""When the oracles of ``self_check.py`` are asked, and what follows from their answers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import chain, cycle
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_manifold_mixup._step.check.diagnosis import explain
from lightning_manifold_mixup._step.check.ghost import NoGhostError
from lightning_manifold_mixup._step.check.padding import all_seen, mask_from_tokens
from lightning_manifold_mixup._step.check.random_states import random_states, same_random_states
from lightning_manifold_mixup._step.check.self_check import ROUNDING, UNUSED, Verdict, pair, swap
from lightning_manifold_mixup._step.check.trials import Mixes, Outcome, Trials
from lightning_manifold_mixup._step.labels.reads import Line, place_of
from lightning_manifold_mixup._step.labels.targets import MixingError
from lightning_manifold_mixup._step.step import Site

Passes = Literal["auto", 1, 2]
ORACLES = ("swap", "pair")
# How many more batches pass each time before a step that is built otherwise again is checked again: one that is built
# anew for each batch (a loop over time steps, layers that are dropped at random) is checked a few times in a fit.
_PATIENCE = 4


class Proof:
    """Keeps what has been proven in a fit, and decides whether the training step runs once or twice.

    Args:
        trainer: for one verdict on all ranks.
        enabled: whether the oracles are asked at all.
        passes: what the user wants: 1, 2, or ``"auto"``.

    Attributes:
        passes: how often the training step runs for a mixed batch; None until that is decided.
        copies: whether the module can be copied, as far as anybody knows.
        harmless: lines of code that read values which depend on the labels, without an effect on the loss.
    """

    def __init__(self, trainer: Any, *, enabled: bool, passes: Passes, decided: int | None) -> None:
        self.trainer = trainer
        self.enabled = enabled
        self.copies = True
        self._wanted = passes
        self.passes = 2 if passes == 2 else decided
        self.harmless: set[Line] = set()
        self._open: set[tuple[str, str]] = set()  # oracles without a verdict yet on some rank, each with its layer
        self._verdicts: dict[tuple[str, str], Verdict] = {}  # of this rank, in the check that is running
        self._asked = False  # in this fit, about all layers
        self._next = 10
        self._turns = chain([ORACLES], cycle([("pair",), ("swap",)]))  # after batch 10, a check asks one oracle
        self._ask: Sequence[str] = ORACLES
        self._retry_at = 0
        self._seen: dict[Any, set[Any]] = {}
        self._steps = 0
        self._last: Any = None
        self._wait_until = 0
        self._wait = 1
        self._said: set[str] = set()

    def due(self, layers: Collection[str], layer: str, mixed: int) -> list[str]:
        """Which layers to check before a batch is trained on.

        Args:
            layers: S.
            layer: the one that was drawn.
            mixed: how many batches have been mixed in this fit.
        """
        if not self.enabled:
            return []
        if not self._asked:
            return list(layers)
        is_open = self._open and any(where == layer for _, where in self._open)
        if mixed >= self._next:
            self._next *= 10
            turn = next(self._turns)
            self._ask = ORACLES if is_open else turn  # the same on all ranks
            return [layer]
        return [layer] if is_open and mixed >= self._retry_at else []

    def passes_at(self, layer: str) -> int:
        """How often the training step runs for a batch that is mixed at a layer.

        Twice also where the pair oracle could not tell yet: that is exact for any code.
        """
        unproven = self._wanted == "auto" and ("pair", layer) in self._open
        return 2 if unproven else self.passes or 1

    def without_copies(self) -> None:
        """Ask no oracles from here on, since the module, or the batch, cannot be copied."""
        self.enabled = self.copies = False

    def is_new(
        self, layer: str, passes: int, built: Any, calls: int, *, reads: Mapping[Line, str], checked: bool
    ) -> bool:
        """Whether a training step was built otherwise than all before it, and is to be checked again.

        Args:
            layer: where it was mixed.
            passes: how often it ran.
            built: what tells how it was built, whatever the layer.
            calls: how often the layer was called.
            reads: lines of code that have read labels, and that the oracles know nothing of; and how they did.
            checked: whether the oracles have been asked about this batch.
        """
        self._steps += 1
        if reads and not self.copies:
            self._warn_of(reads)
        how = passes, built, layer, calls
        if how == self._last and not reads:
            return False
        seen, seen_calls = self._seen.setdefault(passes, set()), self._seen.setdefault(layer, set())
        new = (built not in seen and bool(seen)) or (calls not in seen_calls and bool(seen_calls))
        wanted = (new or bool(reads)) and self.enabled and not checked
        if wanted and not reads:
            if self._steps < self._wait_until:
                return False
            self._wait_until, self._wait = self._steps + self._wait, self._wait * _PATIENCE
        seen.add(built)
        seen_calls.add(calls)
        self._last = how
        return wanted

    def check(
        self,
        trials: Trials | None,
        sites: Sequence[Site],
        permutations: Mixes,
        draws: Mixes,
        mixed: int,
        *,
        again: bool = False,
    ) -> None:
        """Ask the oracles about a batch: both, or the one whose turn it is.

        Args:
            trials: the step on that batch; None if it has one sample, which tells nothing.
            sites: the layers.
            permutations: for the swap oracle, with lam 0.
            draws: for the pair oracle.
            mixed: how many batches have been mixed before.
            again: whether the module has run its step on this batch already, because that was new to this rank.
                Otherwise all ranks are here, with the same layers, and decide together. They always ask each other the
                same questions, whatever their own batches have shown: a rank that did not would leave the others
                waiting.

        Raises:
            MixingError: if something else than layer k and the targets reaches the loss; no weight has changed.
        """
        failure = reason = None
        ask, self._ask, self._asked = self._ask, ORACLES, True
        self._verdicts = {("swap", site.layer): Verdict.NO_POWER for site in sites if trials is None}
        if trials is not None:
            try:
                failure = self._swaps(trials, sites, permutations) if "swap" in ask else None
                if failure is None and self._wanted != 2 and "pair" in ask:
                    failure, reason = self._pairs(trials, sites, draws)
            except NoGhostError as error:
                self._say(f"{error}, so Manifold Mixup could not check itself on its training step")
                self.without_copies()
        together = bool if again else self._on_all_ranks
        if "pair" in ask and torch.is_autocast_enabled(self.trainer.strategy.root_device.type):
            settled = not together(failure is None and Verdict.FAILED not in self._of_pairs())
            sure = together(self._of_pairs() <= {Verdict.PASSED})
            # Half precision may hide a mistake, or look like one. If one rank has to ask again without it, all do:
            # their steps may wait for each other.
            if not settled and not sure and trials is not None and self.copies:
                failure, reason = self._pairs(replace(trials, autocast=False), sites, draws)
        once = together(reason is None)
        if not once and failure is None:
            failure = self._decide_for_two(reason or "so it is on another rank", again=again)
        if not together(failure is None):
            raise MixingError(failure or "The self-check has failed on another rank; see its message.")
        if not again:
            self.enabled = together(self.enabled)
            for asked in [(oracle, site.layer) for oracle in ask for site in sites]:
                if together(self._verdicts.get(asked) is not Verdict.NO_POWER):
                    self._open.discard(asked)
                else:
                    self._open.add(asked)
            self._retry_at = 2 * mixed + 1
            if trials is not None and self._wanted == "auto" and any(oracle == "pair" for oracle, _ in self._open):
                self._say("a mistake would not show in the loss yet; until it would, such steps run twice")
        if once and trials is not None and self._wanted != 2:
            self.passes = self.passes or 1

    def run_twice(self, reason: str, *, again: bool = False) -> None:
        """Run the training step once for each labelling from now on.

        Args:
            reason: why.
            again: whether the module has run its step on this batch already.
        """
        if self.passes != 2:
            late = (
                " The loss of this one batch sees what the step keeps on the module after its update." if again else ""
            )
            rank_zero_warn(
                "Manifold Mixup runs the training step twice for each mixed batch from here on, once for each "
                f"labelling: {reason.rstrip('.')}. The loss is exact; it costs a second forward pass.{late} To avoid "
                "that, compute the loss with `mixed_loss(function, logits, y)`, or in a criterion module (nn.Module). "
                "`passes=2` silences this."
            )
        self.passes = 2

    def _swaps(self, trials: Trials, sites: Sequence[Site], permutations: Mixes) -> str | None:
        plain_run, trials, reason = _plain_run(all_seen(trials, sites[0].places))
        if plain_run is None:
            self._say(f"the swap oracle has no verdict ({reason})")
            return None
        try:
            return self._swapped(trials, sites, permutations, plain_run)
        except torch.OutOfMemoryError:  # it is in full precision, which training may not be
            self._say("the swap oracle has no verdict (too little memory)")
            return None

    def _swapped(self, trials: Trials, sites: Sequence[Site], permutations: Mixes, plain_run: Outcome) -> str | None:
        wrong = None
        for site in sites:
            wrong = wrong or trials.run(site, states=permutations)
            finding = swap(trials, site, permutations, plain_run, wrong)
            self._verdicts["swap", site.layer] = finding.verdict
            if finding.verdict is Verdict.UNDECIDED:
                self._say(f"the swap oracle has no verdict ({finding.reason})")
            elif finding.verdict is Verdict.FAILED and (mask := mask_from_tokens(trials, site, permutations)):
                self._warn(mask)
            elif finding.verdict is Verdict.FAILED:
                why = explain(trials, site, permutations, plain_run)
                return (
                    f"Manifold Mixup at {site.layer!r} would be wrong for this training step: {finding.reason}, so "
                    f"something else reaches the loss. {why} `self_check=False` switches this check off. No weight "
                    "has changed in this step."
                )
        return None

    def _pairs(self, trials: Trials, sites: Sequence[Site], draws: Mixes) -> tuple[str | None, str | None]:
        """Return the error that two passes would not mend, and why superposition is not exact; or None for each."""
        for site in sites:
            try:
                finding, lines = pair(trials, site, draws)
            except (NoGhostError, MixingError):
                raise
            except Exception as error:  # the step does not run on a ghost
                self._say(f"the pair oracle has no verdict ({type(error).__name__}: {error})")
                break
            if finding.verdict is not Verdict.FAILED:
                self.harmless |= lines
            if finding.reason != UNUSED:
                self._verdicts["pair", site.layer] = finding.verdict
            elif not site.target_modules:  # which may be all that the loss compares with
                failure = (
                    f"Manifold Mixup: {UNUSED}, which it takes from elsewhere. Set `target_key` (now "
                    f"{list(site.places.targets)}) to the key of the labels, or to a list of keys; where the input is "
                    "the target, name it in `input_key`, too. No weight has changed in this step."
                )
                return failure, None
            if finding.verdict is Verdict.UNDECIDED:
                self._say(f"the pair oracle has no verdict ({finding.reason})")
            if finding.verdict is Verdict.FAILED:
                return None, finding.reason
        return None, ROUNDING if Verdict.UNSURE in self._of_pairs() else None

    def _of_pairs(self) -> set[Verdict]:
        return {verdict for (oracle, _), verdict in self._verdicts.items() if oracle == "pair"}

    def _decide_for_two(self, reason: str, *, again: bool) -> str | None:
        """Go over to two passes; if that is not possible, return why."""
        if self._wanted == 1 or not self.trainer.lightning_module.automatic_optimization:
            how = "`passes=1`" if self._wanted == 1 else "manual optimization"
            return (
                f"Manifold Mixup cannot follow this training step with labels in superposition: {reason}. Under {how} "
                "it cannot run once for each labelling instead. Compute the loss with `mixed_loss(function, logits, "
                "y)`, or in a criterion module (nn.Module). No weight has changed in this step."
            )
        self.run_twice(reason, again=again)
        return None

    def _warn_of(self, reads: Mapping[Line, str]) -> None:
        """Warn of a line that nobody can check, unless it reads a metric, whose value seldom gets into a loss."""
        if (line := next((line for line, how in reads.items() if how != "compute"), None)) is not None:
            self._warn(
                f"{place_of(line)} reads what depends on the labels, and nothing shows here whether the loss depends "
                "on that. If it does, it goes on with the dominant labels alone: compute it with "
                "`mixed_loss(function, logits, y)`, or in a criterion module (nn.Module)"
            )

    def _on_all_ranks(self, decision: bool) -> bool:  # noqa: FBT001
        return bool(self.trainer.strategy.reduce_boolean_decision(decision, all=True))

    def _warn(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            rank_zero_warn(f"Manifold Mixup: {what}.")

    def _say(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            rank_zero_info(f"Manifold Mixup, self-check: {what}.")


def _plain_run(trials: Trials) -> tuple[Outcome | None, Trials, str]:
    """Run the step on the plain batch: in eval mode, or in training mode if it draws no random numbers there.

    Without the Trainer's autocast, whose rounding would hide a mistake, unless the step cannot do without.

    Returns:
        What came out, None if it cannot be compared with anything; trials in that mode; and why there is nothing.
    """
    reason = "the step skips the batch"
    modes = [(False, False), (True, False), *([(True, True)] if trials.finer() else [])]
    for train, autocast in modes:
        trials, before = replace(trials, train=train, autocast=autocast), random_states(trials.module.parameters())
        try:
            outcome = trials.run()
        except NoGhostError:
            raise
        except Exception as error:  # any error of the user's code in eval mode
            reason = f"the step does not run on a copy of the module: {type(error).__name__}: {error}"
            continue
        if outcome.loss is None:
            continue
        if not bool(torch.isfinite(outcome.loss)):
            reason = "the loss is not finite"
        elif train and not same_random_states(before, outcome.random):
            reason = "the step does not run in eval mode, and draws random numbers in training mode"
        else:
            return outcome, trials, ""
    return None, trials, reason
