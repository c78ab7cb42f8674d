"""Machinery of one training step. Nothing here is public; the public names are those of the package."""
