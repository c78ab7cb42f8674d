"""Lightning's CLI for this package: ``fit``, ``validate``, ``test``, ``predict``, and what other commands parse."""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import yaml  # type: ignore[import-untyped]
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.model_helpers import is_overridden
from typing_extensions import override

from lightning_manifold_mixup import ManifoldMixupModule, SemiSupervisedManifoldMixupModule
from lightning_manifold_mixup._step.extras import require
from lightning_manifold_mixup._tables import number, print_table
from lightning_manifold_mixup.cli.checkpoints import NAMES, Checkpoints, new_folder, newest
from lightning_manifold_mixup.cli.methods import label_of, method_of
from lightning_manifold_mixup.cli.misspelt import shortened
from lightning_manifold_mixup.cli.request import asked_for, class_of, handed_on, links, options_of, value
from lightning_manifold_mixup.cli.terminal import PROGRAM, RUNS, UsageError
from lightning_manifold_mixup.evaluation import EvaluationCallback
from lightning_manifold_mixup.paper import data, recipes, tasks
from lightning_manifold_mixup.paper.quiet import IN_MEMORY

for _module in ("jsonargparse", "rich"):  # Lightning's own error does not name the extra that installs them
    require(_module, "cli")

from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]  # noqa: E402
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI  # noqa: E402

__all__ = ["ManifoldMixupCLI", "Parser", "Prepared", "missing_for_test", "print_results"]

DEFAULT_MODEL = "lightning_manifold_mixup.ManifoldMixupModule"
# A class that has been imported may be asked for by its name alone.
_BY_NAME = (ManifoldMixupModule, SemiSupervisedManifoldMixupModule, data, tasks)


def loggers(folder: Path) -> list[Logger]:
    """Make a logger to CSV files, and one to TensorBoard if it is installed, both in the folder of one run."""
    # As a version, the name of the folder would stand in the progress bar, cut to four letters: "on_0".
    where: dict[str, Any] = {
        "save_dir": folder.parents[1],
        "name": f"{folder.parent.name}/{folder.name}",
        "version": "",
    }
    made: list[Logger] = [CSVLogger(**where)]
    return [*made, TensorBoardLogger(**where)] if find_spec("tensorboard") else made


def missing_for_test(model: LightningModule, data: LightningDataModule | None) -> str:
    """Say what a test needs and does not have; nothing if all is there. Ask after the data are set up.

    Args:
        model: with a ``test_step``.
        data: with a test loader; without a data module the model has it.

    Example:
        >>> missing_for_test(LightningModule(), None)
        'LightningModule has no `test_step`'
    """
    source = model if data is None else data
    for name, owner, what in (("test_step", model, "`test_step`"), ("test_dataloader", source, "test set")):
        if not is_overridden(name, owner):
            return f"{type(owner).__name__} has no {what}"
    return ""


class RecipeAction(ActionConfigFile):
    """The option ``--config``: a file, or the name of a recipe."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Put the configuration into the namespace."""
        files = recipes.layers_of(values)
        # The layers of a recipe are merged here: jsonargparse wants every ``class_path`` in the first of several files.
        config = str(files[0]) if len(files) == 1 else yaml.safe_dump(recipes.read(files), sort_keys=False)
        super().__call__(parser, cfg, config, option_string)  # type: ignore[no-untyped-call]


class Parser(LightningArgumentParser):
    """Prints an error without the list of all options, which has more than a hundred lines."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        command = getattr(parser, "prog", PROGRAM).replace(" [options]", "")
        self.exit(2, f"{PROGRAM}: error: {shortened(message, parser)}\n`{command} --help` lists the options.\n")

    def add_function_arguments(self, function: Any, *args: Any, linked_targets: Any = None, **kwargs: Any) -> list[str]:
        """Take what jsonargparse hands to this method where a function makes an object, and refuses to take itself."""
        added: list[str] = super().add_function_arguments(function, *args, **kwargs)
        for name in handed_on(function):
            self.add_argument(f"--{name}", type=int | None, default=None)
            added.append(name)
        return added


class ManifoldMixupCLI(LightningCLI):
    """Lightning's CLI with the names of recipes, the model's sizes taken from the data, and a table after training.

    ``model`` may be any LightningModule, by default a ``ManifoldMixupModule``; ``data`` may be any LightningDataModule.
    Without ``--config``, ``--model`` and ``--data``, the recipe is ``digits``.

    Args:
        args: the command line, as a list.
        run: whether it begins with a subcommand, which is run; otherwise the objects are only made.

    Raises:
        UsageError: for a class that cannot be imported.
        FileNotFoundError: for an unknown recipe.
    """

    def __init__(self, args: Sequence[str], run: bool = True) -> None:
        argv = list(args)
        options = {arg.partition("=")[0] for arg in argv}
        if not options & {"-c", "--config", "--model", "--model.class_path", "--data", "--data.class_path"}:
            argv[run:run] = ["--config", recipes.DEFAULT]
        config = asked_for(argv)
        self.asked = argv
        if value(config, "model.class_path") is None:
            argv[run:run] = ["--model", DEFAULT_MODEL]
            config = recipes.merge(config, {"model": {"class_path": DEFAULT_MODEL}})
        for key, base in (("model", LightningModule), ("data", LightningDataModule)):
            path = value(config, f"{key}.class_path")
            if path is not None and class_of(path, base) is None:
                raise UsageError(f"There is no class {path!r} ({key}.class_path), or it cannot be imported.")
        self.links = links(config)
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_kwargs={"overwrite": True},  # without a logger, all runs share a folder
            trainer_defaults={"default_root_dir": RUNS},
            seed_everything_default=0,
            parser_kwargs={"prog": PROGRAM},
            parser_class=Parser,
            args=argv,
            run=run,
        )

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        # With abbreviations, `--conf` would lay a recipe over the default one, which is only left out for `--config`.
        parser = self.parser_class(allow_abbrev=False, **kwargs)
        parser.add_argument("-c", "--config", action=RecipeAction, help="A YAML file, or the name of a recipe.")
        return parser

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for key, read in self.links:
            parser.link_arguments("data", key, compute_fn=read, apply_on="instantiate")

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        # Lightning's own method warns if there are both ``args`` and ``sys.argv``. The latter must stay as it is: DDP
        # starts the other processes with it.
        self.config = parser.parse_args(args)  # type: ignore[arg-type]

    @override
    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        if getattr(self.datamodule, "num_workers", None) == 0:
            # Chosen by the data module: for data in memory, 0 workers are the fastest.
            warnings.filterwarnings("ignore", IN_MEMORY[0])

    @property
    def runs(self) -> Path:
        """The folder of all runs of this recipe, method and seed."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        names = [text for option, text in options_of(self.asked) if option in ("-c", "--config")]
        label = "+".join(map(label_of, names)) or str(config.model.class_path).rpartition(".")[2]
        name = f"{label}-{method_of(config)}-seed{config.seed_everything}"
        return Path(config.trainer.default_root_dir or RUNS) / name

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        if self.subcommand is None:  # another command makes the objects, and chooses where they write
            return super().instantiate_trainer(**kwargs)
        config = self.config_init[self.subcommand].trainer
        self._find_checkpoint()
        if config.fast_dev_run:
            return super().instantiate_trainer(**kwargs)
        callbacks = config.callbacks or []
        callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks]
        saves = config.enable_checkpointing is not False and not any(
            isinstance(callback, Checkpoint) for callback in callbacks
        )
        logs = config.logger is None or config.logger is True
        folder = new_folder(self.runs) if logs or (saves and self.subcommand == "fit") else self.runs
        if saves:
            again = [arg for arg in self.asked if not arg.startswith("--ckpt_path")]
            command = shlex.join([PROGRAM, *again, "--ckpt_path=last"])
            kwargs["callbacks"] = [*callbacks, Checkpoints(folder, command)]
        if logs:
            kwargs["logger"] = loggers(folder)
        return super().instantiate_trainer(**kwargs)

    def _find_checkpoint(self) -> None:
        """Replace ``--ckpt_path last`` or ``best`` by the file; to evaluate, the last one is taken without it too."""
        config = self.config_init[self.subcommand]
        asked = config.get("ckpt_path")
        if asked not in (*NAMES, None) or (asked is None and self.subcommand == "fit"):
            return
        config.ckpt_path = found = newest(self.runs, asked or "last")
        if found is not None:
            config.ckpt_path = str(found)
            _say(f"Weights: {found}")
        elif self.subcommand == "fit":
            _say(f"There is no checkpoint in {self.runs}: training begins anew.")
        elif asked is None:
            _say(f"These are random weights: there is no checkpoint in {self.runs}. Train first, or give --ckpt_path.")
        else:
            raise UsageError(
                f"There is no checkpoint {asked!r} in {self.runs}. Train first, or give --ckpt_path a file."
            )

    def after_fit(self) -> None:
        """Test the weights of the last epoch, print one table, and say where the checkpoints are."""
        self._test()
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Checkpoints):
                _say(str(callback))

    def _test(self) -> None:
        if missing := missing_for_test(self.model, self.datamodule):
            _say(f"{missing}, so the network was not tested.")
            return
        self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        families = tuple(f"test_{c.family}/" for c in callbacks if isinstance(c, EvaluationCallback))
        metrics = self.trainer.callback_metrics.items()
        print_results({key: float(value) for key, value in metrics if not key.startswith(families)})


class Prepared(ManifoldMixupCLI):
    """A parsed configuration of which nothing has been made yet: ``config`` may be changed until ``make`` is called."""

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        for name in ("--ckpt_path", "--weights_only"):  # files written by ``fit --print_config`` have these
            parser.add_argument(name, default=None)

    @override
    def instantiate_classes(self) -> None:
        pass

    def make(self) -> None:
        """Make trainer, model and data, with the random numbers of the configuration's seed; no default checkpoints."""
        if not any("Checkpoint" in callback.class_path for callback in self.config.trainer.callbacks or []):
            self.config.trainer.enable_checkpointing = False
        seed_everything(self.config.seed_everything, workers=True, verbose=False)
        super().instantiate_classes()


@rank_zero_only
def _say(text: str) -> None:
    print(text, flush=True)


@rank_zero_only
def print_results(metrics: dict[str, float]) -> None:
    """Print test metrics as a table: error, NLL and calibration error first, then those of a teacher, then the rest."""
    known: dict[str, tuple[str, Callable[[float], str]]] = {
        "test/error": ("test error", _percent),
        "test/top5_error": ("test error, top 5", _percent),
        "test/nll": ("negative log likelihood (nats)", number),
        "test/ece": ("expected calibration error", _percent),
    }
    known |= {key.replace("/", "/teacher_"): (f"{label}, of the teacher", text) for key, (label, text) in known.items()}
    texts = {label: text(metrics[key]) for key, (label, text) in known.items() if key in metrics}
    texts |= {key: number(x) for key, x in metrics.items() if key.startswith("test") and key not in known}
    if texts:
        print_table([{"after the last epoch": label, "test set": text} for label, text in texts.items()])


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
