"""Under torch.compile the oracles see eager code, so its loss and gradient are compared with the compiled ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_manifold_mixup._step.check.random_states import random_states, same_random_states
from lightning_manifold_mixup._step.check.trials import Mixes, Outcome, Trials
from lightning_manifold_mixup._step.devices import float64
from lightning_manifold_mixup._step.labels.targets import MixingError
from lightning_manifold_mixup._step.step import Site

# Compilers fuse and reorder operations; a mistake in the mixing would be larger.
_ACCURACY = 1e-3


@dataclass(frozen=True)
class Eager:
    """What a mixed batch gives without the compiler.

    Attributes:
        loss: ``lam * L(y) + (1 - lam) * L(y[partners])``, float64.
        accuracy: how far the compiled loss may be from it.
        parameter: the first of the module, usually before layer k.
        moves: whether the loss has a gradient by it.
    """

    loss: Tensor
    accuracy: float
    parameter: nn.Parameter
    moves: bool

    def compare(self, loss: Tensor) -> Any:
        """Compare the compiled loss, and the gradient by the parameter when it comes; return the hook's handle.

        Raises:
            MixingError: if the loss is another one. The hook raises it in backward, if the gradient has got lost.
        """
        if abs(float(float64(loss.detach()) - self.loss)) > self.accuracy:
            raise MixingError(
                f"Manifold Mixup: the compiled training step has the loss {float(loss.detach()):.6g} for a mixed "
                f"batch, the uncompiled one {float(self.loss):.6g}. {_REMEDY}"
            )
        return self.parameter.register_hook(self._gradient)  # type: ignore[no-untyped-call]

    def _gradient(self, gradient: Tensor) -> None:
        if self.moves and not bool(gradient.any()):
            raise MixingError(
                "Manifold Mixup: the compiled training step has no gradient below the mixed layer, the uncompiled one "
                f"has. {_REMEDY}"
            )


_REMEDY = "Upgrade torch, or train uncompiled. No weight has changed in this step."


def eager_step(trials: Trials, site: Site, mixes: Mixes) -> Eager | None:
    """Run the mixed batch uncompiled, on ghosts; None where that tells nothing: random numbers, a skipped batch."""
    parameter = next((p for p in trials.module.parameters() if p.requires_grad), None)
    before = random_states(trials.module.parameters())
    runs: list[Outcome] = []
    for how in ("labels", "partners"):
        run = trials.run(site, states=mixes, labels=mixes, how=how, beside=parameter)
        if run.loss is None or not same_random_states(before, run.random):
            return None
        runs.append(run)
    if parameter is None or runs[0].loss is None or runs[1].loss is None:
        return None
    lam = float64(mixes[0].lam).to(runs[0].loss.device)
    loss = lam * runs[0].loss + (1 - lam) * runs[1].loss
    scale = max(abs(float(run.loss)) for run in runs if run.loss is not None)
    accuracy = max(_ACCURACY, *(16 * run.precision for run in runs)) * max(scale, 1e-12)
    gradients = [run.beside for run in runs]
    moves = all(gradient is not None for gradient in gradients) and bool(
        torch.stack([g.abs().sum() for g in gradients if g is not None]).sum() > 0
    )
    return Eager(loss, accuracy, parameter, moves)
