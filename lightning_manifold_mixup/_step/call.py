"""A call of ``training_step``, and the loss in what it returned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor


class Call(NamedTuple):
    """The arguments that Lightning hands to ``training_step``."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def batch(self) -> Any:
        """The batch among them."""
        return self.kwargs["batch"] if "batch" in self.kwargs else self.args[0]

    def on(self, batch: Any) -> Call:
        """Return the same call with another batch."""
        if "batch" in self.kwargs:
            return Call(self.args, {**self.kwargs, "batch": batch})
        return Call((batch, *self.args[1:]), self.kwargs)

    def of(self, training_step: Callable[..., Any], batch: Any) -> Any:
        """Call a training step with another batch."""
        call = self.on(batch)
        return training_step(*call.args, **call.kwargs)


def loss_of(output: Any) -> Tensor | None:
    """Return the loss in what a training step returned; None if it skips the batch."""
    if isinstance(output, Tensor):
        return output
    loss = output.get("loss") if isinstance(output, Mapping) else None
    return loss if isinstance(loss, Tensor) else None


def with_loss(output: Any, loss: Tensor) -> Any:
    """Return what a training step returned, with another loss."""
    return {**output, "loss": loss} if isinstance(output, Mapping) else loss
