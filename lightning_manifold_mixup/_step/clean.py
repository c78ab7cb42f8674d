"""What a training step logs on the unmixed batch, beside the mixed one that the module trains on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

from lightning_manifold_mixup._step.call import loss_of
from lightning_manifold_mixup._step.check.ghost import NoGhostError, batch_of_ghosts, ghost_of
from lightning_manifold_mixup._step.check.random_states import replayed
from lightning_manifold_mixup._step.logging import PREFIX


def log_clean(callback: Any, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
    """Log ``clean_values`` on the batches on which Lightning writes to its loggers."""
    if not trainer.log_every_n_steps or trainer.global_step % trainer.log_every_n_steps:
        return
    try:
        values = clean_values(module, batch, batch_idx)
    except NoGhostError as error:
        rank_zero_warn(f"Manifold Mixup: nothing is logged for log_clean=True, since {error}.")
        callback.log_clean = False
        return
    callback.log_dict(values, on_step=True, on_epoch=False, batch_size=1)


def clean_values(module: Any, batch: Any, batch_idx: int) -> dict[str, Tensor]:
    """Run the training step once more, unmixed, on a ghost; nothing of the module changes, nor do random numbers.

    Args:
        module: a LightningModule whose hooks are not armed.
        batch: as the training step was handed it, before it was mixed.
        batch_idx: its index.

    Returns:
        The loss, ``manifold_mixup/clean/loss``, and what the step logs, ``manifold_mixup/clean/<name>``: 0-d tensors.

    Raises:
        NoGhostError: if the module or the batch cannot be copied.
    """
    ghost, copied = ghost_of(module), batch_of_ghosts(batch)
    logged: dict[str, Any] = {}

    def log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        logged[name] = value

    def log_dict(values: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        logged.update(values)

    vars(ghost).update(log=log, log_dict=log_dict)
    with replayed(module.parameters()):
        output = ghost.training_step(copied, batch_idx)
    if (loss := loss_of(output)) is not None:
        logged["loss"] = loss
    found = {name: _number(value) for name, value in logged.items()}
    return {f"{PREFIX}/clean/{name}": value for name, value in found.items() if value is not None}


def _number(value: Any) -> Tensor | None:
    """Return what was logged as a 0-d tensor: of a metric, its value on this batch if the step has asked for it."""
    if isinstance(value, Metric):
        value = getattr(value, "_forward_cache", None)
    if not isinstance(value, (Tensor, int, float)) or (isinstance(value, Tensor) and value.numel() != 1):
        return None
    return torch.as_tensor(value).detach().reshape(())
