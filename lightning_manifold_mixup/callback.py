"""Manifold Mixup as a Lightning callback: draw, arm, check, disarm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_manifold_mixup._step.arguments import check_alone, check_arguments, check_module
from lightning_manifold_mixup._step.batch.keys import KeyOrKeys, Keys
from lightning_manifold_mixup._step.check.compiled import check_compiled
from lightning_manifold_mixup._step.check.proof import Passes
from lightning_manifold_mixup._step.clean import log_clean
from lightning_manifold_mixup._step.fit import Fit, FitState, Options
from lightning_manifold_mixup._step.host import Callback
from lightning_manifold_mixup._step.logging import forget, hyperparameters, values_of
from lightning_manifold_mixup._step.mix.drawing import Alpha, AlphaSchedule, DrawContext, check_draw, contexts_of
from lightning_manifold_mixup._step.mix.randomness import global_seed
from lightning_manifold_mixup.layers import named_layers, unknown_layer, weighted_layers
from lightning_manifold_mixup.mixing import Draw, Mix, check_alpha
from lightning_manifold_mixup.partners import Partners


class ManifoldMixupCallback(Callback):
    """Trains any LightningModule with Manifold Mixup (Verma et al., ICML 2019, section 2).

    For each training batch it draws a layer k from S, lam ~ Beta(alpha, alpha) and a partner for each sample; the
    output of layer k is replaced by ``lam * h + (1 - lam) * h[partners]`` and every loss of the labels becomes ``lam *
    loss(y) + (1 - lam) * loss(y[partners])``. Module, loss, metrics and data stay as they are. Validation, test and
    predict are not touched.

    On the first batch, and now and then, it checks itself: two oracles run the user's own ``training_step`` on a copy
    of the module, and tell whether the loss was right. Where labels in superposition cannot be exact, the step runs
    once for each labelling. A Trainer takes one such callback.

    Args:
        alpha: parameter of Beta(alpha, alpha); a pair (a, b) for Beta(a, b); or a schedule (``{start: 0.2, end: 2.0,
            epochs: 20}`` in YAML). 2 is the paper's choice for CIFAR and SVHN. 0 switches mixing off: training is that
            without the callback, bit for bit.
        layers: S, as names relative to the LightningModule (``"model.layer1"``), globs (``"model.layer*"``) and
            ``"input"``; a dict gives each a weight (``{input: 1, model.layer1: 2}``). A layer that a skip connection
            bypasses is refused at the first batch. ``"auto"`` takes the input and the first half of the network's
            stages, found by observing the first training batch, which is not mixed.
        probability: share of the batches that are mixed.
        input_key: where the input is in a batch: an index or a name, with dots for nested batches (``"labelled.0"``),
            or a list of those for several inputs. None finds it. Only needed if S has the input.
        target_key: where the targets are, likewise.
        mask_key: where attention masks are, likewise. A state that is mixed across lengths needs the union of both
            masks (MixText, SSMix); None finds ``attention_mask``.
        target_modules: names of modules whose output is a target, such as a teacher: mixed with the same draw if k is
            a hidden layer.
        partners: chooses the partner of each sample, see ``partners.py``; None is a uniform permutation.
        dominant: whether lam is folded to at least 1/2, so that a sample keeps the larger part of itself.
        clean_weight: adds the loss of the unmixed batch with this weight (RegMixup, Pinto et al. 2022: 1.0). Metrics
            and logs come from the unmixed batch then; the mixed one costs a second forward pass.
        batch_dim: the dimension of hidden states that counts the samples. None: the first of 0 and 1 with their number.
        self_check: whether the oracles are asked. They cost a few forward passes on the first batch.
        passes: ``"auto"`` runs the training step once for a batch where that is exact, else once for each labelling;
            1 raises in that case, 2 runs it twice at once.
        seed: of lam, partners and k; None follows ``seed_everything``. The global generators are never used.
        log_mixing: whether to log ``manifold_mixup/lam``, ``/alpha``, ``/layer`` (the index of k in S) and the loss for
            each layer, ``/loss/<layer>``, and the settings as hyperparameters.
        log_clean: whether to log the loss of the unmixed batch, ``manifold_mixup/clean/loss``, and what the step logs
            on it, ``/clean/train/accuracy``, say. Loss and accuracy of mixed batches look worse than without mixup,
            since no prediction is right for both labels. On the batches that are logged (``log_every_n_steps``) the
            step runs once more, on a copy and in training mode. Needs automatic optimization.

    Raises:
        ValueError: for a wrong argument, at construction; for layers or batch keys that are not there, in fit.
        MixingError: in fit, before the optimizer steps, when a batch could not be mixed as planned.

    Example:
        >>> import lightning as L
        >>> callback = ManifoldMixupCallback(alpha=2.0)
        >>> trainer = L.Trainer(accelerator="cpu", logger=False, callbacks=[callback])
        >>> print(callback)
        Manifold Mixup: alpha 2.0, S = auto, not yet chosen
    """

    def __init__(
        self,
        alpha: Alpha | AlphaSchedule = 2.0,
        layers: str | Sequence[str] | Mapping[str, float] = "auto",
        probability: float = 1.0,
        input_key: KeyOrKeys = None,
        target_key: KeyOrKeys = None,
        mask_key: KeyOrKeys = None,
        target_modules: Sequence[str] = (),
        partners: Partners | None = None,
        dominant: bool = False,
        clean_weight: float = 0.0,
        batch_dim: int | None = None,
        self_check: bool = True,
        passes: Passes = "auto",
        seed: int | None = None,
        log_mixing: bool = False,
        log_clean: bool = False,
    ) -> None:
        given = dict(locals())
        if not isinstance(alpha, AlphaSchedule):
            check_alpha(alpha)
        check_arguments(given)
        self.alpha = alpha
        self.layers = layers
        self.probability = probability
        self.input_key, self.target_key, self.mask_key = input_key, target_key, mask_key
        self.target_modules = target_modules
        self.partners = partners
        self.dominant = dominant
        self.clean_weight = clean_weight
        self.batch_dim = batch_dim
        self.self_check = self_check
        self.passes = passes
        self.seed = seed
        self.log_mixing = log_mixing
        self.log_clean = log_clean
        self._draw: Draw | None = None
        self._keys = Keys(input_key, target_key, mask_key)
        self._state = FitState()
        self._fit: Fit | None = None
        self._announced = self._counted = False
        self._said = ""  # what was found in the batches, in words

    @property
    def last_draw(self) -> Draw | None:
        """The draw of the batch in progress; None where it is not mixed."""
        return None if self._fit is None or self._fit.step is None else self._draw

    # --------------------------------------------------------------------------------------------- to be overridden

    def should_mix(self, trainer: pl.Trainer, batch_idx: int) -> bool:
        """Decide whether to mix a batch. Override it, for instance for unmixed last epochs; the same on all ranks."""
        return True

    def draw(self, context: DrawContext) -> Draw:
        """Draw k, lam and the partners of one batch. Override it to choose them; k must be the same on all ranks.

        Example:
            >>> class Nearest(ManifoldMixupCallback):
            ...     def draw(self, context):
            ...         order = context.targets.argsort().roll(1)
            ...         return Draw(context.draw_layer(), Mix(context.draw_mix().lam, order))
        """
        return context.draw()

    def draw_group(self, context: DrawContext, first: Draw) -> Mix:
        """Draw for a further group of samples: those of another data loader in the same batch.

        The layer k is that of ``first``, the draw for the first group. By default so is lam: labels of all groups are
        in one superposition. A group whose targets are mixed as values may have a lam of its own.
        """
        return Mix(first.mix.lam, context.draw_mix().partners)

    # -------------------------------------------------------------------------------------------- the life of a batch

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        fit = self._disarm()
        if fit is None or (alpha := self._alpha_of(trainer)) == 0 or not self.should_mix(trainer, batch_idx):
            return
        draws = fit.draws
        draws.start(trainer.fit_loop.epoch_loop.batch_progress.total.ready)
        if draws.uniform() >= self.probability:
            return
        places = self._keys.locate(batch, self.batch_dim)
        layers, epoch = self._state.layers, trainer.current_epoch
        first, *others = contexts_of(
            batch, places, layers or {}, alpha, epoch, draws, partners=self.partners, dominant=self.dominant
        )
        device = places.sample_of(batch).device
        if not self._announced and first.n == 1:
            rank_zero_warn("Manifold Mixup: the batch has one sample, so there is no partner to mix it with.")
        if layers is None:  # layers="auto": this batch is observed as it is
            fit.arm(None, tuple([context.draw_mix().to(device) for context in (first, *others)]), places)
            return
        if not self._announced:
            self._announce(places)
        self._draw = draw = self.draw(first)
        check_draw(draw, layers, first.n)
        mixes = draw.mix.to(device), *[self.draw_group(context, draw).to(device) for context in others]
        fit.arm(draw.layer, mixes, places)

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if self._fit is not None and self._fit.step is not None:
            self._fit.step.check_halves()

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._fit is not None and self._fit.step is not None and pl_module.automatic_optimization:
            self._fit.end_batch()
            self._fit.step.check_backward()

    @override
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        if self._fit is not None and self._fit.step is not None:
            self._fit.step.check_halves()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._announced and self._state.layers is not None and self._fit is not None and self._fit.step:
            self._announce(self._fit.step.site.places)
        if self.log_mixing:
            forget(trainer)
            if (draw := self.last_draw) is not None:
                values = values_of(draw, list(self._state.layers or ()), self._alpha_of(trainer), outputs)
                n = len(draw.mix.partners)
                self.log_dict(values, on_step=True, on_epoch=False, batch_size=n)  # type: ignore[attr-defined]
        mixed = self.last_draw is not None
        self._disarm()
        if self.log_clean and mixed:
            log_clean(self, trainer, pl_module, batch, batch_idx)

    # ------------------------------------------------------------------------------------------------ the life of a fit

    @property
    @override
    def state_key(self) -> str:
        # Lightning refuses two callbacks of one key before `setup` can say what to do about it.
        return super().state_key if self._counted else f"{super().state_key}{id(self)}"

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._counted = True
        callbacks = [c for c in trainer.callbacks if isinstance(c, ManifoldMixupCallback)]  # type: ignore[attr-defined]
        check_alone(callbacks)
        if stage == "fit":
            check_module(pl_module, log_clean=self.log_clean)
            self._said = ""
            check_compiled(pl_module)
            self._state = FitState()  # a resumed run loads its state after this; another network needs another one

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._complete_state(trainer, pl_module)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore()
        self._complete_state(trainer, pl_module)  # again: sharded strategies load checkpoints after on_fit_start
        self._announced = False
        if self.alpha == 0 or self.probability == 0:
            rank_zero_info(f"{self}: nothing is mixed.")
            return
        if not self.self_check:
            rank_zero_info("Manifold Mixup: self_check=False, so its training steps are not checked by the oracles.")
        options = Options(
            self._keys,
            self.batch_dim,
            tuple(self.target_modules),
            self_check=self.self_check,
            passes=self.passes,
            clean_weight=self.clean_weight,
        )
        self._fit = Fit(trainer, pl_module, options, self._state)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._fit is not None:
            self._fit.leave()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._restore()

    def _complete_state(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Complete the state: what the arguments say goes before what a checkpoint says."""
        named, state = named_layers(pl_module), self._state
        for name in self.target_modules:
            if name not in named:
                raise ValueError(f"`target_modules`: {unknown_layer(name, pl_module)}")
        if self.layers != "auto":
            layers = weighted_layers(pl_module, self.layers)
            if layers != state.layers:
                self._state = state = FitState(layers, state.seed, state.passes)
        elif state.layers is not None and any(name not in named for name in state.layers if name != "input"):
            state.layers = None  # a checkpoint of a network with other names
        if self.seed is not None:
            state.seed = self.seed
        elif state.seed is None:
            state.seed = trainer.strategy.broadcast(global_seed())

    def _disarm(self) -> Fit | None:
        self._draw = None
        if self._fit is not None and self._fit.step is not None:
            self._fit.disarm()
        return self._fit

    def _restore(self) -> None:
        if (fit := self._disarm()) is not None:
            fit.close()
            self._fit = None

    def _alpha_of(self, trainer: pl.Trainer) -> Any:
        return self.alpha(trainer.current_epoch) if isinstance(self.alpha, AlphaSchedule) else self.alpha

    # ------------------------------------------------------------------------------------- checkpoints, copies, words

    @override
    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self._state))

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        known = {name: state_dict.get(name) for name in vars(FitState())}
        if isinstance(known["layers"], list):
            known["layers"] = dict.fromkeys(known["layers"], 1.0)
        self._state = FitState(**known)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_fit": None}

    @property
    def layers_(self) -> list[str] | None:
        """S, by name; None until it is chosen."""
        return None if self._state.layers is None else list(self._state.layers)

    def __str__(self) -> str:
        how = " (auto)" if self.layers == "auto" else ""
        chosen = "auto, not yet chosen" if self.layers_ is None else f"{{{', '.join(self.layers_)}}}{how}"
        if self.layers_ is None and self.layers != "auto":
            chosen = f"{self.layers}"
        return f"Manifold Mixup: alpha {self.alpha}, S = {chosen}{self._said}"

    def _announce(self, places: Any) -> None:
        self._announced = True
        keys = {"input": places.inputs, "targets": places.targets, "masks": places.masks}
        self._said = "".join(f", {role} {', '.join(map(repr, found))}" for role, found in keys.items() if found)
        rank_zero_info(str(self))
        if self.log_mixing and self._fit is not None:
            hyperparameters(self._fit.trainer.loggers, self)
