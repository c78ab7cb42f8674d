"""Machinery of one training step. Nothing here is public; the public names are those of the package.

- The life of a batch: ``fit.py`` (one fit), ``stand_in.py`` (replaces ``training_step``), ``step.py`` (one step),
  ``hooks.py`` (at layer k), ``logging.py``, ``clean.py``, ``arguments.py``, ``switches.py``, ``host.py``.
- The draw: ``drawing.py``, ``randomness.py``.
- The arithmetic: ``interpolation.py``, ``kernels.py``, ``dims.py`` (the dimension of the samples).
- What is in a batch: ``batch.py``, ``keys.py`` and ``places.py``, ``finding.py`` and ``names.py``, ``usage.py``.
- Labels: ``targets.py``, ``mixed_target.py``, ``operations.py``, ``pairs.py``, ``mixed_loss.py``, ``criteria.py``,
  ``reads.py``.
- The self-check: ``proof.py`` (when), ``self_check.py`` (what), ``trials.py``, ``ghost.py``, ``rebinding.py``,
  ``writes.py``, ``padding.py``, ``diagnosis.py``, ``first_batch.py``; ``compiled.py`` and ``compiled_check.py`` under
  torch.compile.

The words of this package:

- *labelling*: labels for all samples of a batch: the samples' own, or those of their partners. The one with the larger
  weight is the *dominant* one.
- *superposition*: a tensor that stands for both labellings until a loss has been taken; a *plain* tensor is an ordinary
  one (``targets.py``).
- *ghost*: a copy of a module that shares its parameters and nothing else (``ghost.py``).
- *oracle*: a test on ghosts that tells whether a training step is mixed correctly (``self_check.py``).
- *armed*: a hook that holds a draw is armed and mixes; without one it lets states through (``hooks.py``).
"""

from importlib.util import find_spec

from lightning_manifold_mixup._step.extras import require

if find_spec("lightning") is None:  # also where `pytorch_lightning` is used, whose classes are others
    require("lightning")  # not imported otherwise: `manifold-mixup --help` does without
