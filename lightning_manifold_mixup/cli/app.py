"""The command `manifold-mixup`: Lightning's CLI over any module and data module, and the commands beside it."""

from __future__ import annotations

import inspect
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pydoc import locate
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NoReturn

import yaml  # type: ignore[import-untyped]
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from typing_extensions import override

from lightning_manifold_mixup._step.targets import MixingError
from lightning_manifold_mixup.evaluation.extras import require
from lightning_manifold_mixup.paper import recipes

for _module in ("jsonargparse", "rich"):  # before Lightning says so in its own words
    require(_module, "cli")

from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI  # noqa: E402

if TYPE_CHECKING:
    from rich.console import Console

PROGRAM = "manifold-mixup"
RUNS = "manifold_mixup_runs"
DEFAULT_MODEL = "lightning_manifold_mixup.ManifoldMixupModule"
DEBUG = "MANIFOLD_MIXUP_DEBUG"

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

LINKED = ("num_classes", "in_channels", "in_features", "vocabulary_size")
"""What the data knows and the model asks for."""


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
        args: what follows ``manifold-mixup``; None takes it from ``sys.argv``.

    Example:
        >>> main(["recipes", "show", "cifar10_small-5000"])  # doctest: +ELLIPSIS
        # ...
    """
    argv = list(sys.argv[1:] if args is None else args)
    _quieten()
    command = argv[0] if argv else "--help"
    with short_errors():
        if command in ("-h", "--help"):
            _print_help()
        elif command == "--version":
            print(import_module("lightning_manifold_mixup").__version__)
        elif command in COMMANDS:
            import_module(f"lightning_manifold_mixup.cli.{command}").main(argv[1:])
        elif command in TRAINER_COMMANDS:
            ManifoldMixupCLI(args=argv)
        else:
            known = [*TRAINER_COMMANDS, *COMMANDS]
            near = get_close_matches(command, known, n=1)
            raise UsageError(
                f"There is no command {command!r}"
                + (f"; did you mean {near[0]}?" if near else f", only {', '.join(known)}.")
                + f" `{PROGRAM} --help` says what they do."
            )


def _quieten() -> None:
    """Drops two messages of Lightning that no setting turns off and no user of a recipe can act on."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    if _no_advertisement not in logger.filters:
        logger.addFilter(_no_advertisement)
    # torch 2.14 deprecates what Lightning 2.6 calls
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated")


def _no_advertisement(record: logging.LogRecord) -> bool:
    return "💡 Tip" not in record.getMessage()


class UsageError(ValueError):
    """What was asked for on the command line cannot be done; the message says why."""


@contextmanager
def short_errors() -> Iterator[None]:
    """Ends the process with one line in place of a traceback, for errors that are the user's to mend.

    Those are the errors of this package and of Lightning's checks, and files and packages that are missing. The
    environment variable ``MANIFOLD_MIXUP_DEBUG=1`` lets the traceback through.
    """
    try:
        yield
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if os.environ.get(DEBUG) or (cause := _users_error(error)) is None:
            raise
        print(f"{PROGRAM}: error: {cause}", file=sys.stderr)
        if not isinstance(cause, UsageError):
            print(f"({DEBUG}=1 shows where it comes from)", file=sys.stderr)
        sys.exit(2)


_USERS = (UsageError, MixingError, MisconfigurationException, FileNotFoundError, ModuleNotFoundError)


def _users_error(error: BaseException | None) -> BaseException | None:
    """The first error in the chain of causes that is the user's to mend, None if there is none."""
    while error is not None and not isinstance(error, _USERS):
        raised_here = error.__traceback__ is not None and _raised_in_package(error)
        if isinstance(error, ValueError) and raised_here:
            return error
        error = error.__cause__
    return error


def _raised_in_package(error: BaseException) -> bool:
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    package = str(Path(__file__).parents[1])
    return traceback is not None and traceback.tb_frame.f_code.co_filename.startswith(package)


def _print_help() -> None:
    commands = {**TRAINER_COMMANDS, **COMMANDS}
    width = max(map(len, commands))
    print(f"usage: {PROGRAM} COMMAND [options]\n\nManifold Mixup for any LightningModule.\n\ncommands:")
    for name, text in commands.items():
        print(f"  {name.ljust(width)}  {text}")
    print(f"\n`{PROGRAM} COMMAND --help` lists a command's options. --config takes a file or the name of a recipe.")


# ------------------------------------------------------------------------------------------------- what was asked for


def expand_configs(args: Sequence[str], folder: Path) -> list[str]:
    """Replaces the names of recipes after ``--config`` by files.

    Args:
        args: a command line.
        folder: where to write one file for the layers of a recipe that has several. (Given one after the other,
            jsonargparse would want the first to have every ``class_path``.)

    Example:
        >>> [Path(arg).name for arg in expand_configs(["fit", "--config=digits"], Path("nowhere"))]
        ['fit', '--config', 'digits.yaml']
    """
    expanded: list[str] = []
    rest = iter(args)
    for arg in rest:
        option, equals, value = arg.partition("=")
        if option not in ("--config", "-c"):
            expanded.append(arg)
            continue
        value = value if equals else next(rest, "")
        files = recipes.layers_of(value)
        if len(files) > 1:
            file = folder / f"{len(expanded)}.yaml"
            file.write_text(yaml.safe_dump(recipes.read(files), sort_keys=False), encoding="utf-8")
            files = [file]
        expanded += ["--config", str(files[0])]
    return expanded


def asked_for(args: Sequence[str]) -> dict[str, Any]:
    """What files and options say together: a look ahead for what has to be known before the parser is built.

    Example:
        >>> asked_for(["--model", "Mine", "--model.init_args.alpha=0", "--data.batch_size", "5"])
        {'model': {'class_path': 'Mine', 'init_args': {'alpha': 0}}, 'data': {'init_args': {'batch_size': 5}}}
    """
    config: dict[str, Any] = {}
    for index, arg in enumerate(args):
        option, equals, value = arg.partition("=")
        value = value if equals else args[index + 1] if index + 1 < len(args) else ""
        if option == "--config":
            config = recipes.merge(config, recipes.read([Path(value)]))
        elif option.startswith(("--model", "--data")):
            head, *keys = option[2:].split(".")
            if not keys and not value.lstrip().startswith("{"):
                keys = ["class_path"]
            elif keys and keys[0] not in ("class_path", "init_args", "dict_kwargs"):
                keys.insert(0, "init_args")
            layer: Any = yaml.safe_load(value) if value else None
            for key in reversed([head, *keys]):
                layer = {key: layer}
            config = recipes.merge(config, layer)
    return config


def class_of(path: Any, base: type) -> Any:
    """The class (or function) of a ``class_path``, or None if it cannot be found; short names are those of subclasses.

    Example:
        >>> class_of("ManifoldMixupModule", LightningModule).__name__
        'ManifoldMixupModule'
    """
    if not isinstance(path, str):
        return None
    if "." in path:
        return locate(path)
    todo = [base]
    while todo:
        known = todo.pop()
        if known.__name__ == path:
            return known
        todo += known.__subclasses__()
    return None


def _takes(target: Any, name: str) -> bool:
    """Whether a class has an argument of that name, itself or (through ``**kwargs``) in a base class."""
    if not isinstance(target, type):
        return False
    for base in target.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(vars(base)["__init__"]).parameters
        if name in parameters:
            return True
        if all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
            return False
    return False


def _gives(source: Any, name: str) -> bool:
    """Whether instances of a class have an attribute of that name: declared, or set in ``__init__``."""
    if not isinstance(source, type):
        return False
    makers = [vars(base).get("__init__") for base in source.__mro__]
    return hasattr(source, name) or any(
        inspect.isfunction(maker) and name in maker.__code__.co_names for maker in makers
    )


def links(config: dict[str, Any]) -> list[tuple[str, str]]:
    """What the data has to tell the model: (attribute of the data, argument of the model).

    Only what the model takes, the data knows, and nobody has set.

    Example:
        >>> links(recipes.read(recipes.layers_of("digits")))  # doctest: +NORMALIZE_WHITESPACE
        [('num_classes', 'model.init_args.num_classes'), ('num_classes', 'model.init_args.model.init_args.num_classes'),
         ('in_channels', 'model.init_args.model.init_args.in_channels')]
    """
    data = class_of(_get(config, "data.class_path"), LightningDataModule)
    found = []
    for name in LINKED:
        for prefix, base in (("model", LightningModule), ("model.init_args.model", nn.Module)):
            target = class_of(_get(config, f"{prefix}.class_path"), base)
            key = f"{prefix}.init_args.{name}"
            if _gives(data, name) and _takes(target, name) and _get(config, key) is None:
                found.append((name, key))
    return found


def _get(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config


def _read_attribute(name: str, data: Any) -> Any:
    try:
        return getattr(data, name)
    except AttributeError as error:
        raise UsageError(
            f"The model wants {name}, and {type(data).__name__} has none: set it under model.init_args."
        ) from error


# ------------------------------------------------------------------------------------------------------------- the CLI


def default_loggers() -> list[dict[str, Any]]:
    """CSV files, and TensorBoard's if it is installed."""
    csv = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": RUNS, "name": "csv"}}
    board = {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {"save_dir": RUNS, "name": "tensorboard"},
    }
    return [csv, board] if find_spec("tensorboard") else [csv]


class Parser(LightningArgumentParser):
    """Says what is wrong without the hundred lines of all options."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        command = getattr(getattr(ex, "subcommand_parser", None) or self, "prog", PROGRAM).replace(" [options]", "")
        self.exit(2, f"{PROGRAM}: error: {message.strip()}\n`{command} --help` lists the options.\n")


class ManifoldMixupCLI(LightningCLI):
    """Lightning's CLI with the names of recipes, the model's sizes taken from the data, and a table after training.

    ``model`` may be any LightningModule and is a :class:`~lightning_manifold_mixup.ManifoldMixupModule` if nothing else
    is said; ``data`` may be any LightningDataModule. Without ``--config``, ``--model`` and ``--data``, the recipe is
    ``digits``.

    Args:
        args: the command line, as a list.
        run: whether it begins with a subcommand, which is run; else the classes are only made.
    """

    def __init__(self, args: Sequence[str], run: bool = True) -> None:
        with ExitStack() as stack:
            argv = expand_configs(args, Path(stack.enter_context(TemporaryDirectory())))
            argv = self._complete(argv, run)
            self._layers = stack.pop_all()
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_kwargs={"overwrite": True},  # without a logger, all runs share a folder
            trainer_defaults={"default_root_dir": RUNS, "logger": default_loggers()},
            seed_everything_default=0,
            parser_kwargs={"prog": PROGRAM},
            parser_class=Parser,
            args=argv,
            run=run,
        )

    def _complete(self, argv: list[str], run: bool) -> list[str]:
        """Adds the default recipe and the default model where they are wanted, and finds the links."""
        config = asked_for(argv)
        if not _any_option(argv, "--config", "--model", "--model.class_path", "--data", "--data.class_path"):
            file = str(recipes.layers_of(recipes.DEFAULT)[0])
            argv[run:run] = ["--config", file]
            config = recipes.merge(recipes.read([Path(file)]), config)
        if _get(config, "model.class_path") is None:
            argv[run:run] = ["--model", DEFAULT_MODEL]
            config = recipes.merge(config, {"model": {"class_path": DEFAULT_MODEL}})
        for key, base in (("model", LightningModule), ("data", LightningDataModule)):
            path = _get(config, f"{key}.class_path")
            if path is not None and class_of(path, base) is None:
                raise UsageError(f"There is no class {path!r} ({key}.class_path), or it cannot be imported.")
        self.links = links(config)
        return argv

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for name, target in self.links:
            reader: Callable[[Any], Any] = partial(_read_attribute, name)
            parser.link_arguments("data", target, compute_fn=reader, apply_on="instantiate")

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        # The original warns of `args` beside `sys.argv`. `sys.argv` has to stay: DDP starts its processes with it.
        with self._layers:
            self.config = parser.parse_args(args)  # type: ignore[arg-type]

    @override
    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        if getattr(self.datamodule, "num_workers", None) == 0:
            # 0 was chosen: data modules that have their images in memory are not faster with more
            warnings.filterwarnings("ignore", message=".*does not have many workers")

    def after_fit(self) -> None:
        """Tests the trained weights, those of the last epoch, and prints one table."""
        if not is_overridden("test_step", self.model, LightningModule) or not is_overridden(
            "test_dataloader", self.datamodule, LightningDataModule
        ):
            return
        self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)
        from lightning_manifold_mixup.evaluation import EvaluationCallback  # takes as long to import as all the rest

        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        families = tuple(f"test_{c.family}/" for c in callbacks if isinstance(c, EvaluationCallback))
        metrics = self.trainer.callback_metrics.items()
        print_results({key: float(value) for key, value in metrics if not key.startswith(families)})


@rank_zero_only
def print_results(metrics: dict[str, float]) -> None:
    """Prints test metrics as a table: error, NLL and calibration error first, those of a teacher next."""
    known = {
        "test/error": ("test error", "{:.2%}"),
        "test/top5_error": ("test error, top 5", "{:.2%}"),
        "test/nll": ("negative log likelihood (nats)", "{:.4f}"),
        "test/ece": ("expected calibration error", "{:.2%}"),
    }
    known |= {key.replace("/", "/teacher_"): (f"{label}, of the teacher", form) for key, (label, form) in known.items()}
    table = require("rich.table", "cli").Table("after the last epoch", "test set")
    table.columns[1].justify = "right"
    for key, (label, form) in known.items():
        if key in metrics:
            table.add_row(label, form.format(metrics[key]).replace("%", " %"))
    for key, value in metrics.items():
        if key.startswith("test") and key not in known:
            table.add_row(key, f"{value:.4f}")
    if table.row_count:
        console().print(table)


def console() -> Console:
    """Where tables go; wide enough for them where it is no terminal."""
    made: Console = require("rich.console", "cli").Console(width=None if sys.stdout.isatty() else 120)
    return made


def _any_option(argv: Sequence[str], *options: str) -> bool:
    return any(arg.partition("=")[0] in options for arg in argv)
