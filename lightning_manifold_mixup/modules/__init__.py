"""LightningModules that bring Manifold Mixup along: classification, with all labels and with few, and their losses."""
