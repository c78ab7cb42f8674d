"""Machinery of one training step. Nothing here is public; the public names are those of the package.

- The life of a batch: ``fit.py`` (one fit), ``stand_in.py`` (replaces ``training_step``), ``step.py`` (one step),
  ``call.py``, ``logging.py``, ``clean.py``; ``arguments.py``, ``host.py`` (both names of Lightning), ``devices.py``,
  ``extras.py``.
- ``batch/``, what is in a batch: ``tree.py`` (batches of any kind), ``keys.py`` and ``places.py`` (where everything
  is), ``finding.py`` and ``names.py`` (where nobody has said so).
- ``mix/``: the draw (``drawing.py``, ``randomness.py``, ``draw_check.py``), the arithmetic (``interpolation.py``,
  ``kernels.py``, ``dims.py``: the dimension of the samples), and where it happens (``hooks.py``, ``switches.py``).
- ``labels/``: labels in superposition (``targets.py``, ``mixed_target.py``, ``operations.py``, ``pairs.py``), and code
  that is handed them (``mixed_loss.py``, ``criteria.py``, ``reads.py``).
- ``check/``, the self-check: when (``proof.py``), what (``self_check.py``, ``trials.py``, ``padding.py``,
  ``diagnosis.py``), on what (``ghost.py``, ``random_states.py``, ``rebinding.py``, ``writes.py``, ``modes.py``), what
  the first batch shows (``first_batch.py``, ``usage.py``, ``recording.py``), and torch.compile (``compiled.py``,
  ``compiled_check.py``).

The words of this package:

- *labelling*: labels for all samples of a batch: the samples' own, or those of their partners. The one with the larger
  weight is the *dominant* one.
- *superposition*: a tensor that stands for both labellings until a loss has been taken; a *plain* tensor is an ordinary
  one (``targets.py``).
- *shown*: what code sees that does not know of the superposition: the dominant labels, and of a loss the mixed value.
- *ghost*: a copy of a module that shares its parameters and nothing else (``ghost.py``).
- *oracle*: a test on ghosts that tells whether a training step is mixed correctly (``self_check.py``).
- *armed*: a hook that holds a draw is armed and mixes; without one it lets states through (``hooks.py``).
"""

from importlib.util import find_spec

from lightning_manifold_mixup._step.extras import require

if find_spec("lightning") is None:  # also where `pytorch_lightning` is used, whose classes are others
    require("lightning")  # not imported otherwise: `manifold-mixup --help` does without
