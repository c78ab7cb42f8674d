"""Callbacks and modules for both names of Lightning, ``lightning.pytorch`` and ``pytorch_lightning``.

These are two packages with the same code, and no class of one is a class of the other. A Trainer refuses modules that
are not of its own package, and ``pytorch_lightning`` before 2.6 refuses callbacks, too ("Expected a parent"). So the
bases below are classes of both, once both have been imported.
"""

from __future__ import annotations

import sys
from typing import Any

import lightning.pytorch as pl
from lightning_utilities.core.overrides import is_overridden as _is_overridden
from typing_extensions import Self, override


def _classes(name: str, trainer: Any = None) -> tuple[type, ...]:
    """Return the class of that name in each package that has been imported, first in that of the trainer.

    ``pytorch_lightning`` is never imported here: that would take half a second where it is not used. Who uses it
    has imported it before the first callback or module is made.
    """
    packages = [pl, *filter(None, [sys.modules.get("pytorch_lightning")])]
    packages.sort(key=lambda package: not isinstance(trainer, package.Trainer))
    return tuple(getattr(package, name) for package in packages)


class Callback(pl.Callback):
    """Base of callbacks for the Trainer of ``lightning.pytorch`` and for that of ``pytorch_lightning``."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Return a callback that is one under each name of Lightning that has been imported."""
        _join()
        return super().__new__(cls)


class Module(pl.LightningModule):
    """Base of modules for the Trainer of ``lightning.pytorch`` and for that of ``pytorch_lightning``."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Return a module that is one under each name of Lightning that has been imported."""
        _join()
        return super().__new__(cls)

    @property
    @override
    def trainer(self) -> Any:
        return super().trainer

    @trainer.setter
    def trainer(self, trainer: Any) -> None:
        # A Trainer takes a hook for the user's if it is not that of its own package, so that package comes first.
        if trainer is not None:
            Module.__bases__ = _classes("LightningModule", trainer)
        super(Module, type(self)).trainer.fset(self, trainer)  # type: ignore[attr-defined]

    def save_configuration(self) -> bool:
        """Save as hyperparameters what a LightningCLI makes this module of; tell whether one does."""
        for cls in Module.__bases__:
            function: Any = cls.save_hyperparameters  # type: ignore[attr-defined]
            if function.__globals__["_given_hyperparameters"].get() is not None:
                function(self)
                return True
        return False


def _join() -> None:
    for cls, name in ((Callback, "Callback"), (Module, "LightningModule")):
        if len(cls.__bases__) < len(bases := _classes(name)):
            cls.__bases__ = bases


_join()  # a LightningCLI asks for the base of a class before it makes one


def is_overridden(method: str, instance: Any) -> bool:
    """Whether a module or data module, of either name, has another method than its base."""
    parents = [cls for name in ("LightningModule", "LightningDataModule") for cls in _classes(name)]
    return all(_is_overridden(method, instance, cls) for cls in parents if isinstance(instance, cls))
