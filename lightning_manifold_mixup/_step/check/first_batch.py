"""What the first batch of a fit shows: which layers are eligible, and how float targets are used."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_manifold_mixup._step.batch import tree as batches
from lightning_manifold_mixup._step.call import Call
from lightning_manifold_mixup._step.check.ghost import batch_of_ghosts, ghost_of, isolated, out_of_reach
from lightning_manifold_mixup._step.check.usage import LabelUse
from lightning_manifold_mixup._step.check.writes import Writes
from lightning_manifold_mixup._step.labels.targets import Superposition, labellings
from lightning_manifold_mixup._step.step import Site
from lightning_manifold_mixup.layers import LayerReport, named_layers, observe
from lightning_manifold_mixup.mixing import Mix


@dataclass(frozen=True)
class FirstBatch:
    """What was seen.

    Attributes:
        output: what the training step returned.
        report: on the layers; None if the step skipped the batch.
        classes: keys of the float targets that the step reads as classes, with the line that shows it.
        written: parameters that the step itself writes into; not known of a step that ran for real.
    """

    output: Any
    report: LayerReport | None
    classes: dict[Any, str]
    written: set[nn.Parameter]


def watch(
    module: Any,
    call: Call,
    site: Site,
    mixes: tuple[Mix, ...],
    training_step: Callable[..., Any] | None = None,
) -> FirstBatch:
    """Watch one plain training step: on a ghost, or ``training_step`` itself where it is given.

    Args:
        module: the LightningModule.
        call: what its training step is called with.
        site: where everything is in the batch.
        mixes: a draw for each group of samples; used only if the step needs labels in superposition.
        training_step: to be run in place of a ghost's, on a module that cannot be copied.

    Raises:
        NoGhostError: if the module cannot be copied, and no step is given.
        MisconfigurationException: for a target that holds classes beside values.
    """
    places, batch, root, writes = site.places, call.batch, module, Writes(())
    with ExitStack() as stack:
        if training_step is None:
            root, batch = ghost_of(module), batch_of_ghosts(batch)
            writes = stack.enter_context(isolated(module))
            stack.enter_context(out_of_reach(module))
            training_step = root.training_step
        targets = {
            f"{key}/{number}": (key, leaf)
            for key in places.targets
            for number, leaf in enumerate(batches.tensors(places.of(batch, key)))
        }
        use = LabelUse({name: leaf for name, (_, leaf) in targets.items()})
        samples = places.sizes(batch)

        def observed(batch: Any, labels: list[Tensor]) -> tuple[Any, LayerReport | None]:
            aside = [*places.masks, *(key for key in places.targets if key not in places.shared)]
            inputs = list(batches.without(batch, aside))
            with ExitStack() as hooks:
                seen = hooks.enter_context(observe(root, inputs, labels, samples, site.batch_dim))
                for name in site.target_modules:
                    hook = named_layers(root)[name].register_forward_hook(
                        lambda _, args, output: seen.add_targets(output)
                    )
                    hooks.callback(hook.remove)
                hooks.enter_context(use)
                output = call.of(training_step, batch)
            if output is None and module.automatic_optimization:  # the step skips this batch
                return output, None
            report = seen.report()
            # Where no tensor shows that a criterion took the labels, the network ends at the loss.
            return output, report if report.sinks_found else seen.report(outputs=output)

        try:
            output, report = observed(batch, [leaf for _, leaf in targets.values()])
        except Exception:
            if root is module:
                raise
            # The step may be written for labels in superposition (``y.labels``). If not, the error is the user's own.
            superposition = Superposition(mixes[0].lam).to(mixes[0].partners.device)
            stack.callback(superposition.close)
            superposed = site.mixed(batch_of_ghosts(call.batch), mixes, mixes, "superposed", superposition)
            labels = [
                leaf
                for value in places.targets_of(superposed)
                for tree in (value, *labellings(value))
                for leaf in batches.tensors(tree)
            ]
            output, report = observed(superposed, labels)
    classes: dict[Any, str] = {}
    for name, (key, leaf) in targets.items():
        verdict = use.verdict(name) if leaf.is_floating_point() else "values"
        if verdict == "both":
            raise MisconfigurationException(
                f"Expected the target at {key!r} to hold values, or classes, got both in one tensor: "
                f"{use.evidence(name)}. One is mixed as a number, the other is not. Hand them to the step in two "
                "tensors, with both keys in `target_key`."
            )
        if verdict == "classes":
            classes[key] = use.evidence(name)
    return FirstBatch(output, report, classes, writes.found)
