"""Machinery of one training step. Nothing here is public; the public names are those of the package."""

from lightning_manifold_mixup._step.extras import require

require("lightning")  # also where ``pytorch_lightning`` is used, whose classes are others
