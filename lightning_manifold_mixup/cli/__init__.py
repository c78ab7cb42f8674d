"""The command line: `manifold-mixup`, one file for each command."""

from lightning_manifold_mixup.cli.app import main as main
