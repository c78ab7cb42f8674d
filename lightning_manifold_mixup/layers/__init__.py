"""Layers to mix at: their names, which of them are eligible, and the default set S."""

from lightning_manifold_mixup.layers.choice import default_layers as default_layers
from lightning_manifold_mixup.layers.names import INPUT as INPUT
from lightning_manifold_mixup.layers.names import named_layers as named_layers
from lightning_manifold_mixup.layers.names import resolve_layers as resolve_layers
from lightning_manifold_mixup.layers.names import unknown_layer as unknown_layer
from lightning_manifold_mixup.layers.names import weighted_layers as weighted_layers
from lightning_manifold_mixup.layers.observe import Observation as Observation
from lightning_manifold_mixup.layers.observe import eligible_layers as eligible_layers
from lightning_manifold_mixup.layers.observe import has_forward as has_forward
from lightning_manifold_mixup.layers.observe import observe as observe
from lightning_manifold_mixup.layers.report import LayerReport as LayerReport
from lightning_manifold_mixup.layers.report import LayerRow as LayerRow
