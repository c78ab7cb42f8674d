"""Lightning's CLI for this package: ``fit``, ``validate``, ``test``, ``predict``, and what other commands parse."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, NoReturn

import yaml  # type: ignore[import-untyped]
from lightning.pytorch import LightningDataModule, LightningModule, seed_everything
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.model_helpers import is_overridden
from typing_extensions import override

from lightning_manifold_mixup._step.extras import require
from lightning_manifold_mixup.cli.request import asked_for, class_of, links, value
from lightning_manifold_mixup.cli.terminal import PROGRAM, RUNS, UsageError
from lightning_manifold_mixup.evaluation import EvaluationCallback, print_table
from lightning_manifold_mixup.paper import recipes
from lightning_manifold_mixup.paper.quiet import IN_MEMORY

for _module in ("jsonargparse", "rich"):  # Lightning's own error does not name the extra that installs them
    require(_module, "cli")

from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]  # noqa: E402
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI  # noqa: E402

__all__ = ["ManifoldMixupCLI", "Parser", "Prepared", "print_results"]

DEFAULT_MODEL = "lightning_manifold_mixup.ManifoldMixupModule"


def default_loggers() -> list[dict[str, Any]]:
    """Configure a logger to CSV files, and one to TensorBoard if it is installed."""
    csv = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": RUNS, "name": "csv"}}
    board = {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {"save_dir": RUNS, "name": "tensorboard"},
    }
    return [csv, board] if find_spec("tensorboard") else [csv]


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
        command = getattr(getattr(ex, "subcommand_parser", None) or self, "prog", PROGRAM).replace(" [options]", "")
        self.exit(2, f"{PROGRAM}: error: {message.strip()}\n`{command} --help` lists the options.\n")


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
            trainer_defaults={"default_root_dir": RUNS, "logger": default_loggers()},
            seed_everything_default=0,
            parser_kwargs={"prog": PROGRAM},
            parser_class=Parser,
            args=argv,
            run=run,
        )

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = self.parser_class(**kwargs)
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

    def after_fit(self) -> None:
        """Test the weights of the last epoch, and print one table."""
        if not is_overridden("test_step", self.model, LightningModule) or not is_overridden(
            "test_dataloader", self.datamodule, LightningDataModule
        ):
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
        """Make trainer, model and data, with the random numbers of the configuration's seed."""
        seed_everything(self.config.seed_everything, workers=True, verbose=False)
        super().instantiate_classes()


@rank_zero_only
def print_results(metrics: dict[str, float]) -> None:
    """Print test metrics as a table: error, NLL and calibration error first, then those of a teacher, then the rest."""
    known = {
        "test/error": ("test error", "{:.2%}"),
        "test/top5_error": ("test error, top 5", "{:.2%}"),
        "test/nll": ("negative log likelihood (nats)", "{:.4f}"),
        "test/ece": ("expected calibration error", "{:.2%}"),
    }
    known |= {key.replace("/", "/teacher_"): (f"{label}, of the teacher", form) for key, (label, form) in known.items()}
    texts = {
        label: form.format(metrics[key]).replace("%", " %") for key, (label, form) in known.items() if key in metrics
    }
    texts |= {key: f"{x:.4f}" for key, x in metrics.items() if key.startswith("test") and key not in known}
    if texts:
        print_table([{"after the last epoch": label, "test set": text} for label, text in texts.items()])
