"""The command ``manifold-mixup``: finds the command that is asked for and runs it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module

from lightning_manifold_mixup.cli.terminal import PROGRAM, UsageError, short_errors
from lightning_manifold_mixup.paper.quiet import quiet_lightning

COMMANDS = {
    "compare": "train with no mixup, input mixup and Manifold Mixup on the same seeds; table and chart",
    "figure": "draw one of the paper's figures on spirals or digits: spirals, bottleneck, spectrum",
    "layers": "table of a network's layers: which are eligible for mixing, which are chosen, and why",
    "recipes": "list the packaged recipes with the published numbers; `recipes show NAME` prints one",
}
"""Each command's name (also that of its file) and what it does, in a line."""

TRAINER_COMMANDS = {
    "fit": "train, then test and print the results (without --config: Manifold Mixup on the digits of scikit-learn)",
    "validate": "evaluate on the validation set",
    "test": "evaluate on the test set",
    "predict": "run the model on the data of predict_dataloader",
}
"""The same for the commands that are those of Lightning's CLI."""


OPTIONS = {
    "--config RECIPE": "a recipe's name or a YAML file; A+B lays B over A (default: digits)",
    "--data.init_args.data_dir DIR": "the folder of the data, for recipes that read one",
    "--data.init_args.batch_size N": "samples of a training batch",
    "--model.init_args.alpha A": "lam ~ Beta(A, A); 0 trains without mixup",
    "--model.init_args.layers L": "S: auto, or names such as '[input, model.layer1]'",
    "--model.init_args.model PATH": "the network: any class or function, torchvision.models.resnet18",
    "--trainer.max_epochs N": "epochs of training",
    "--trainer.accelerator NAME": "cpu, gpu or auto",
    "--seed_everything N": "seed of the weights, the order of the data and the mixing (default: 0)",
    "--ckpt_path PATH": "a checkpoint; `last` and `best` are those of this recipe's newest run",
}
"""The options of Lightning's commands that matter most, and what they do."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: what follows ``manifold-mixup``; None takes it from ``sys.argv``.

    Raises:
        SystemExit: with status 2 for errors of usage, with 130 if the user interrupts.

    Example:
        >>> main(["recipes", "show", "cifar10_small-5000"])  # doctest: +ELLIPSIS
        # ...
    """
    argv = list(sys.argv[1:] if args is None else args)
    with quiet_lightning(), short_errors():
        _run(argv)


def _run(argv: list[str]) -> None:
    command = argv[0] if argv else "--help"
    if command in ("-h", "--help"):
        _print_help()
    elif command == "--version":
        print(import_module("lightning_manifold_mixup").__version__)
    elif command in COMMANDS:
        import_module(f"lightning_manifold_mixup.cli.{command}").main(argv[1:])
    elif command in TRAINER_COMMANDS:
        if {"-h", "--help"} & set(argv):
            _print_options(command)
        # Imported here, so that a missing extra is an error in one line, too.
        import_module("lightning_manifold_mixup.cli.training").ManifoldMixupCLI(argv)
    else:
        known = [*TRAINER_COMMANDS, *COMMANDS]
        near = get_close_matches(command, known, n=1)
        raise UsageError(
            f"There is no command {command!r}"
            + (f"; did you mean {near[0]}?" if near else f", only {', '.join(known)}.")
            + f" `{PROGRAM} --help` says what they do."
        )


def _print_options(command: str) -> None:
    width = max(map(len, OPTIONS))
    print(f"{PROGRAM} {command}: {TRAINER_COMMANDS[command]}\n\nThe options that matter most:")
    for name, text in OPTIONS.items():
        print(f"  {name.ljust(width)}  {text}")
    print("\nAll options follow.\n", flush=True)


def _print_help() -> None:
    commands = {**TRAINER_COMMANDS, **COMMANDS}
    width = max(map(len, commands))
    print(f"usage: {PROGRAM} COMMAND [options]\n\nManifold Mixup for any LightningModule.\n\ncommands:")
    for name, text in commands.items():
        print(f"  {name.ljust(width)}  {text}")
    print(f"\n`{PROGRAM} COMMAND --help` lists a command's options. --config takes a file or the name of a recipe.")
