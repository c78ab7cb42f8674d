"""Callbacks and modules for both names of Lightning, ``lightning.pytorch`` and ``pytorch_lightning``.

These are two packages with the same code, and no class of one is a class of the other. A Trainer refuses modules that
are not of its own package, and ``pytorch_lightning`` before 2.6 refuses callbacks, too ("Expected a parent"). So the
bases below are classes of both, from the moment when both have been imported.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import lightning.pytorch as pl
from lightning_utilities.core.overrides import is_overridden as _is_overridden
from typing_extensions import override

_TWIN = "pytorch_lightning"


def _classes(name: str, trainer: Any = None) -> tuple[type, ...]:
    """Return the class of that name in each package that has been imported, first in that of the trainer."""
    packages = [pl, *filter(None, [sys.modules.get(_TWIN)])]
    packages.sort(key=lambda package: not isinstance(trainer, package.Trainer))
    return tuple(getattr(package, name) for package in packages)


class Callback(pl.Callback):
    """Base of callbacks for the Trainer of ``lightning.pytorch`` and for that of ``pytorch_lightning``."""


class Module(pl.LightningModule):
    """Base of modules for the Trainer of ``lightning.pytorch`` and for that of ``pytorch_lightning``."""

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
    """Make the bases above classes of each package that has been imported."""
    Callback.__bases__ = _classes("Callback")
    Module.__bases__ = _classes("LightningModule")


class _Joins(Loader):
    """Loads ``pytorch_lightning`` as another loader does, and joins the bases after that."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    @override
    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    @override
    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        _join()


class _WhenImported(MetaPathFinder):
    """Waits for the import of ``pytorch_lightning``, which takes half a second where it is not used."""

    @override
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TWIN:
            return None
        sys.meta_path.remove(self)
        try:
            spec = find_spec(fullname)  # by the other finders
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            spec.loader = _Joins(spec.loader)
        return spec


_join()
sys.meta_path.insert(0, _WhenImported())


def is_overridden(method: str, instance: Any) -> bool:
    """Whether a module or data module, of either name, has another method than its base."""
    parents = [cls for name in ("LightningModule", "LightningDataModule") for cls in _classes(name)]
    return all(_is_overridden(method, instance, cls) for cls in parents if isinstance(instance, cls))
