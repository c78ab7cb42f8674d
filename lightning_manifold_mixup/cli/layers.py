"""``manifold-mixup layers``: which layers of a network are eligible for mixing, which are chosen, and why."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torchmetrics import Metric, MetricCollection

from lightning_manifold_mixup._step.batch import tree as batches
from lightning_manifold_mixup._step.batch.keys import Keys
from lightning_manifold_mixup.cli.request import asked_for, class_of, value
from lightning_manifold_mixup.cli.terminal import PROGRAM, UsageError
from lightning_manifold_mixup.cli.training import Parser, Prepared
from lightning_manifold_mixup.evaluation import console
from lightning_manifold_mixup.layers import LayerReport, eligible_layers, has_forward
from lightning_manifold_mixup.paper.quiet import quiet_lightning

_SAMPLES = 5
"""Size of the example batch. Other dimensions rarely have this size, so that of the samples is clear."""


@quiet_lightning(logging.WARNING)
def main(args: Sequence[str]) -> None:
    """Run the command.

    Args:
        args: what follows ``manifold-mixup layers``.
    """
    options, rest = _parser().parse_known_args(args)
    shape = None if options.input_shape is None else _shape(options.input_shape)
    config = ["--config", options.config] if options.config else []
    path = value(asked_for(rest), "model.class_path")
    target = class_of(path, nn.Module)
    if path is not None and target is None:
        raise UsageError(f"There is no class or function {path!r} (--model.class_path), or it cannot be imported.")
    if options.config or path is None or (isinstance(target, type) and issubclass(target, LightningModule)):
        model, inputs = _from_recipe([*config, *rest], shape)
    else:
        model, inputs = _bare(rest), torch.randn(_SAMPLES, *(shape or (3, 64, 64)))
    report = _observed(model, inputs)
    metrics = {name for name, module in model.named_modules(remove_duplicate=False) if _is_of_metrics(module)}
    report = replace(report, rows=tuple(row for row in report.rows if row.name not in metrics))
    console_ = console()
    console_.print(report.as_table())
    console_.print(f"layers='auto' mixes at: {', '.join(report.default) or 'nothing'}", highlight=False)


def _is_of_metrics(module: nn.Module) -> bool:
    """Whether it is a metric, or a container of metrics and no part of the network."""
    metrics = any(isinstance(part, Metric | MetricCollection) for part in module.modules())
    return metrics and next(module.parameters(), None) is None


def _observed(model: nn.Module, inputs: Any) -> LayerReport:
    try:
        return eligible_layers(model, inputs)
    except Exception as error:
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in batches.tensors(inputs))
        cause = str(error).partition("\n")[0]
        raise UsageError(
            f"{type(model).__name__} does not run on an input of shape {shapes}: {cause.rstrip('.!')}. "
            "Set --input_shape, such as 3,224,224."
        ) from error


def _from_recipe(args: list[str], shape: tuple[int, ...] | None) -> tuple[nn.Module, Any]:
    """Make the LightningModule of a configuration, and an input: of the given shape, or of its first training batch."""
    cli = Prepared(args, run=False)
    cli.config.trainer.logger = False
    cli.config.trainer.accelerator = "cpu"
    cli.save_config_callback = None
    cli.make()
    if shape is not None:
        return cli.model, torch.randn(_SAMPLES, *shape)
    if cli.datamodule is None:
        raise UsageError("There is no data to take an example from: give --input_shape, such as 3,32,32.")
    cli.datamodule.prepare_data()
    cli.datamodule.setup("fit")
    batch = next(iter(cli.datamodule.train_dataloader()))
    return cli.model, _input_of(batch) if has_forward(cli.model) else batch


def _input_of(batch: Any) -> Any:
    """Return what the network is called with: the input, as the callback finds it, or else the first tensor."""
    with suppress(ValueError, TypeError):
        places = Keys().locate(batch)
        if places.inputs:
            batch = places.of(batch, places.inputs[0])
    return next(batches.tensors(batch))[:_SAMPLES]


def _bare(args: list[str]) -> nn.Module:
    """Make any network, from the options ``--model.class_path`` (of a class or function) and ``--model.init_args``."""
    parser = Parser(prog=f"{PROGRAM} layers")
    parser.add_argument("--model", type=nn.Module, required=True)
    # Without defaults, because jsonargparse finds some that functions with keyword arguments (swin_t) do not accept.
    config = parser.parse_args(args, defaults=False)
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # its name before 4.49
    model: nn.Module = instantiate(config).model
    return model


def _shape(text: str) -> tuple[int, ...]:
    sizes = text.split(",")
    if not all(size.strip().isdigit() and int(size) for size in sizes):
        raise UsageError(f"Expected --input_shape to be sizes with commas between, such as 3,32,32, got {text!r}.")
    return tuple(map(int, sizes))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} layers",
        description="Prints a network's layers: name, type, output shape, whether it is in S (layers='auto'), and why.",
        epilog="Further options are those of `fit`: --model.class_path torchvision.models.resnet50 (any module or "
        "function), --model.init_args..., --data... Names are relative to the LightningModule of a recipe, or to the "
        "bare network.",
        allow_abbrev=False,
    )
    parser.add_argument("-c", "--config", metavar="RECIPE", help="name of a recipe, or a file (default: digits)")
    parser.add_argument(
        "--input_shape",
        metavar="C,H,W",
        help="of one sample, filled with random numbers (default: a training batch; 3,64,64 without data)",
    )
    return parser
