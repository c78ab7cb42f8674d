"""Fewer messages from Lightning, for commands of which training is only a part."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["IN_MEMORY", "quiet_lightning"]

IN_MEMORY = (
    r".*does not have many workers",
    r"The number of training batches",
    r"You defined a `validation_step` but have no `val_dataloader`",
)
"""Warnings that do not apply to small data in memory: their patterns, for ``quiet_lightning``."""

# torch 2.14 deprecates a function that Lightning 2.6 calls.
_ITS_OWN = (r"`isinstance\(treespec, LeafSpec\)` is deprecated",)


@contextmanager
def quiet_lightning(level: int = logging.INFO, *ignored: str) -> Iterator[None]:
    """Run a block, or decorate a function, without Lightning messages that its user cannot act on.

    Its advertisements, and torch's warnings about calls that Lightning makes, are always dropped: Lightning has no
    setting for that.

    Args:
        level: the least severe messages of Lightning that are shown, as in ``logging``. If a stricter level is set
            already, it stays.
        ignored: patterns of warnings that are dropped as well.

    Example:
        >>> with quiet_lightning(logging.WARNING):
        ...     logging.getLogger("lightning.pytorch").info("GPU available: False")
    """
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    advertiser = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    advertiser.addFilter(_no_advertisement)
    for logger, before in zip(loggers, levels, strict=True):
        logger.setLevel(max(level, before))
    try:
        with warnings.catch_warnings():
            for pattern in (*_ITS_OWN, *ignored):
                warnings.filterwarnings("ignore", pattern)
            yield
    finally:
        for logger, before in zip(loggers, levels, strict=True):
            logger.setLevel(before)
        advertiser.removeFilter(_no_advertisement)


def _no_advertisement(record: logging.LogRecord) -> bool:
    return "💡 Tip" not in record.getMessage()
