"""Manifold Mixup (Verma et al., ICML 2019) for any LightningModule, by adding one callback."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_manifold_mixup._step.labels.mixed_loss import mixed_loss as mixed_loss
    from lightning_manifold_mixup._step.labels.mixed_target import MixedTarget as MixedTarget
    from lightning_manifold_mixup._step.labels.targets import MixingError as MixingError
    from lightning_manifold_mixup._step.mix.drawing import AlphaSchedule as AlphaSchedule
    from lightning_manifold_mixup._step.mix.drawing import DrawContext as DrawContext
    from lightning_manifold_mixup.callback import ManifoldMixupCallback as ManifoldMixupCallback
    from lightning_manifold_mixup.layers import eligible_layers as eligible_layers
    from lightning_manifold_mixup.mixing import Draw as Draw
    from lightning_manifold_mixup.mixing import Mix as Mix
    from lightning_manifold_mixup.mixing import draw_mix as draw_mix
    from lightning_manifold_mixup.mixing import mixing as mixing
    from lightning_manifold_mixup.mixing import unmixed as unmixed
    from lightning_manifold_mixup.modules.classification import ManifoldMixupModule as ManifoldMixupModule
    from lightning_manifold_mixup.modules.losses import SoftLabelLossMixin as SoftLabelLossMixin
    from lightning_manifold_mixup.modules.semi_supervised import (
        SemiSupervisedManifoldMixupModule as SemiSupervisedManifoldMixupModule,
    )

__version__ = "0.1.0"

# Imported when they are first used: torch and lightning take seconds, and `manifold-mixup --help` needs neither.
_HOMES = {
    "AlphaSchedule": "_step.mix.drawing",
    "Draw": "mixing",
    "DrawContext": "_step.mix.drawing",
    "ManifoldMixupCallback": "callback",
    "ManifoldMixupModule": "modules.classification",
    "Mix": "mixing",
    "MixedTarget": "_step.labels.mixed_target",
    "MixingError": "_step.labels.targets",
    "SemiSupervisedManifoldMixupModule": "modules.semi_supervised",
    "SoftLabelLossMixin": "modules.losses",
    "draw_mix": "mixing",
    "eligible_layers": "layers",
    "mixed_loss": "_step.labels.mixed_loss",
    "mixing": "mixing",
    "unmixed": "mixing",
}
_WINGS = ("evaluation", "layers", "paper", "partners")

__all__ = list(_HOMES)  # the same names as above, which a test compares


def __getattr__(name: str) -> Any:
    if name in _WINGS:
        return import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_WINGS})


class _Face(ModuleType):
    """Keeps ``mixing`` the function: Python puts each file of a package that it has imported under the file's name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Face
