"""Manifold Mixup (Verma et al., ICML 2019) for any LightningModule, by adding one callback."""

from lightning_manifold_mixup._step.drawing import AlphaSchedule as AlphaSchedule
from lightning_manifold_mixup._step.drawing import DrawContext as DrawContext
from lightning_manifold_mixup._step.mixed_loss import mixed_loss as mixed_loss
from lightning_manifold_mixup._step.mixed_target import MixedTarget as MixedTarget
from lightning_manifold_mixup._step.targets import MixingError as MixingError
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
