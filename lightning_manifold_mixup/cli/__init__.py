"""The command line ``manifold-mixup``.

``app.py`` finds the command. ``training.py`` has the commands of Lightning's CLI, ``compare.py``, ``figure.py``,
``layers.py`` and ``recipes.py`` one command each. They share ``terminal.py``, ``request.py`` and ``runs.py``.
"""

from lightning_manifold_mixup.cli.app import main as main
