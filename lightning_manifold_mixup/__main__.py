"""``python -m lightning_manifold_mixup`` is ``manifold-mixup``."""

from lightning_manifold_mixup.cli import main

if __name__ == "__main__":
    main()
