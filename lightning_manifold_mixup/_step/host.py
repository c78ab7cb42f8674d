"""One callback for both names of Lightning, `lightning.pytorch` and `pytorch_lightning`.

These are two packages with the same code, and no class of one is a class of the other. A Trainer of either runs any
object that has the hooks of a callback, with one exception: `pytorch_lightning` before 2.6 refuses whatever is not its
own `Callback`, with "Expected a parent".
"""

from __future__ import annotations

import sys
from typing import Any

import lightning.pytorch as pl
from typing_extensions import Self


class Callback(pl.Callback):
    """Base of callbacks for the Trainer of `lightning.pytorch` and for that of `pytorch_lightning`.

    `pytorch_lightning` is never imported here: it would take half a second of everybody who does not use it. Whoever
    has a Trainer of it has imported it before the first callback is made, and so that is when its class is added.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """A callback that is one under each name of Lightning that has been imported."""
        twin = getattr(sys.modules.get("pytorch_lightning"), "Callback", None)
        if twin is not None and not issubclass(cls, twin):
            Callback.__bases__ = (*Callback.__bases__, twin)
        return super().__new__(cls)
