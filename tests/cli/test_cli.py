"""The command line, run as its users run it where that matters, and in this process for the rest."""

import csv
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

from lightning_manifold_mixup.cli import main
from lightning_manifold_mixup.cli.terminal import DEBUG, short_errors
from lightning_manifold_mixup.cli.training import ManifoldMixupCLI, print_results
from lightning_manifold_mixup.paper import recipes

MANIFOLD_MIXUP = [sys.executable, "-m", "lightning_manifold_mixup"]
TINY = ["--trainer.max_epochs=1", "--model.init_args.model.init_args.initial_channels=2"]


def run(args: list[str], folder: Path, **kwargs) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(args, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, **kwargs)


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)


# ---------------------------------------------------------------------------------------------------------- processes


def test_fit_without_config_trains_tests_and_prints_one_table(tmp_path) -> None:
    done = run([*MANIFOLD_MIXUP, "fit", "--trainer.max_epochs=2", TINY[1]], tmp_path)
    assert done.returncode == 0, done.stderr
    output = done.stdout + done.stderr
    assert "Epoch 1/1" in output  # the progress bar
    assert output.count("┏") == 1
    for line in ("test error", "negative log likelihood", "expected calibration error"):
        assert line in done.stdout
    assert "warn" not in output.lower(), output
    assert "Consider" not in output
    assert "Tip" not in output
    assert "v_num" not in output  # in the bar, the folder's name cut to four letters
    metrics = list(
        csv.DictReader(
            (tmp_path / "manifold_mixup_runs/digits-manifold-seed0/version_0/metrics.csv").read_text().splitlines()
        )
    )
    error = next(float(row["test/error"]) for row in metrics if row.get("test/error"))
    assert f"{100 * error:.2f} %" in done.stdout
    assert list(tmp_path.glob("manifold_mixup_runs/digits-manifold-seed0/version_0/events*"))
    config = yaml.safe_load((tmp_path / "manifold_mixup_runs/digits-manifold-seed0/version_0/config.yaml").read_text())
    assert config["model"]["init_args"]["layers"] == ["input", "model.layer1", "model.layer2"]
    assert config["seed_everything"] == 0


def test_ctrl_c_ends_cleanly(tmp_path) -> None:
    process = subprocess.Popen(
        [*MANIFOLD_MIXUP, "fit", "--trainer.max_epochs=10000", "--model.init_args.lr_scheduler=null", TINY[1]],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a shell's `&` has it ignored
    )
    metrics = tmp_path / "manifold_mixup_runs/digits-manifold-seed0/version_0/metrics.csv"
    deadline = time.monotonic() + 200
    while not metrics.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    try:
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, output
    assert re.search(r"--ckpt_path=last|nothing was saved", output)
    assert "Traceback" not in output
    assert "test error" not in output


# ------------------------------------------------------------------------------------------------------ in this process


def test_the_callback_in_somebody_elses_cli(capsys, monkeypatch, tmp_path) -> None:
    (tmp_path / "theirs.py").write_text(
        """
import torch, torch.nn.functional as F
from lightning import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader, TensorDataset

class Net(LightningModule):
    def __init__(self, width: int = 8):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.ReLU())
        self.head = torch.nn.Linear(width, 3)
    def training_step(self, batch, batch_idx):
        x, y = batch
        self.calls = getattr(self, "calls", 0) + 1
        return F.cross_entropy(self.head(self.body(x)), y)
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)
    def on_train_end(self):
        (callback,) = [c for c in self.trainer.callbacks if type(c).__name__ == "ManifoldMixupCallback"]
        print("ALPHA", type(callback.alpha).__name__, callback.alpha(0), callback.alpha(10), callback.alpha(99))
        print("PASSES", callback.passes, callback.state_dict()["passes"], self.calls)
        print("LOGGED", sorted(k for k in self.trainer.logged_metrics if k.startswith("manifold")))

class Data(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(20, 4), torch.arange(20) % 3), batch_size=10)

LightningCLI(Net, Data)
"""
    )
    (tmp_path / "theirs.yaml").write_text(
        """
seed_everything: 1
trainer:
  max_epochs: 2
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  callbacks:
    - class_path: lightning_manifold_mixup.ManifoldMixupCallback
      init_args:
        alpha: {start: 0.2, end: 2.0, epochs: 20}
        layers: [input, body]
        log_mixing: true
        passes: 2
model: {width: 5}
"""
    )
    monkeypatch.setattr(sys, "argv", ["theirs.py", "fit", "--config", "theirs.yaml"])
    runpy.run_path("theirs.py", run_name="__main__")
    printed = capsys.readouterr().out
    assert "ALPHA AlphaSchedule 0.2 1.1 2.0" in printed
    assert "PASSES 2 2 4" in printed  # the module itself ran each of four batches once, a ghost once more
    assert "manifold_mixup/lam" in printed


def test_help_lists_every_command(capsys) -> None:
    main([])
    out = capsys.readouterr().out
    main(["--help"])
    assert capsys.readouterr().out == out
    for command in ("fit", "validate", "test", "predict", "compare", "layers", "recipes"):
        assert len(re.findall(rf"^  {command} +\w", out, re.MULTILINE)) == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["fti"], "did you mean fit?"),
        (["fit", "--config=digit"], "did you mean digits"),
        (["fit", "--model=Nope"], "There is no class 'Nope' (model.class_path)"),
        (
            ["fit", "--data.class_path=no.where.Data", "--model=ManifoldMixupModule"],
            "There is no class 'no.where.Data'",
        ),
        (["fit", "--trainer.nope=3"], "There is no option --trainer.nope"),
        (["fit", "--conf=digits"], "no option --conf; did you mean config?"),  # abbreviations are not taken
        (["fit", "--trainer.max_epoch=3"], "--trainer.max_epoch; did you mean trainer.max_epochs?"),
        (["fit", "--trainer.max_epok=3"], "--trainer.max_epok; did you mean trainer.max_epochs?"),
        (["fit", "--trainer.max_epochs=three"], "trainer.max_epochs"),
        (["fit", "--model.init_args.alhpa=3"], "no option alhpa of ManifoldMixupModule; did you mean alpha?"),
        (
            ["fit", "--model.model=timm.create_model", "--model.model.numclasses=3"],
            "create_model; did you mean num_classes?",
        ),
        (["fit", "--data.init_args.batchsize=3"], "no option batchsize of DigitsDataModule; did you mean batch_size?"),
        (
            ["fit", "--config=digits", "--config=wrong.yaml"],
            "option trainer.max_epok; did you mean trainer.max_epochs?",
        ),
        (["fit", "--config=digits+wrong.yaml"], "option trainer.max_epok; did you mean trainer.max_epochs?"),
        (
            ["test", "--config=digits", "--ckpt_path=best"],
            "There is no checkpoint 'best' in manifold_mixup_runs/digits",
        ),
        (["fit", "--model.init_args.alpha=-1", *TINY], "got -1.0"),
        (["fit", "--model.init_args.layers=[model.layer9]", *TINY], "Did you mean 'model.layer4'"),
        (["fit", "--config=cifar10_small", "--data.init_args.data_dir=nowhere"], "nowhere/train. Set data_dir"),
        (["layers", "--model.class_path=torchvision.models.resnet5"], "torchvision.models.resnet5"),
        (["layers", "--input_shape=3x3"], "such as 3,32,32"),
    ],
)
def test_bad_usage_is_said_shortly(args, message, capsys, tmp_path) -> None:
    (tmp_path / "wrong.yaml").write_text("trainer: {max_epok: 3}")
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed
    # The error, and where more is to be had.
    assert len([line for line in printed.splitlines() if "Seed" not in line and "available" not in line]) <= 2


def test_the_traceback_can_be_had(monkeypatch) -> None:
    monkeypatch.setenv(DEBUG, "1")
    with pytest.raises(FileNotFoundError):
        main(["fit", "--config=digit"])


def test_errors_of_the_users_code_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError), short_errors():
        1 / 0  # noqa: B018
    with pytest.raises(ValueError, match="literal"), short_errors():
        int("x")


def test_print_config_can_be_run(capsys, tmp_path) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config=cifar10-wrn28_10-manifold", "--print_config"])
    assert not stop.value.code
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["model"]["init_args"]["layers"] == ["input", "model.layer1"]
    assert config["trainer"]["max_epochs"] == 400
    with pytest.raises(SystemExit):
        main(["fit", "--config=digits", *TINY, "--trainer.logger=false", "--print_config"])
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    main(["fit", "--config=printed.yaml"])
    assert "test error" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", ["digits", "semi_digits"])
def test_a_checkpoint_has_all_that_the_configuration_says(recipe, tmp_path) -> None:
    options = ["--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    main(["fit", f"--config={recipe}", *options, f"--trainer.default_root_dir={tmp_path}", "--trainer.max_steps=2"])
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    cli = made(f"--config={recipe}")
    loaded = type(cli.model).load_from_checkpoint(checkpoint)
    assert type(loaded.model) is type(cli.model.model)
    assert loaded.optimizer.keywords == cli.model.optimizer.keywords
    assert (loaded.mixup.alpha, loaded.mixup.layers) == (cli.model.mixup.alpha, cli.model.mixup.layers)
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all(torch.equal(value, saved[name]) for name, value in loaded.state_dict().items())


def test_checkpoints_of_a_run_are_found_again(capsys, tmp_path) -> None:
    common = [*TINY, "--trainer.limit_train_batches=2", "--data.init_args.val_size=100", "--trainer.logger=false"]
    common.append("--trainer.enable_progress_bar=false")
    main(["test", *common])
    assert "These are random weights: there is no checkpoint in manifold_mixup_runs/digits-manifold-seed0." in (
        capsys.readouterr().out
    )
    main(["fit", *common])
    printed = capsys.readouterr().out
    folder = Path("manifold_mixup_runs/digits-manifold-seed0/version_0/checkpoints")
    assert f"the last weights {folder}/last.ckpt, the best {folder}/best.ckpt (val/error 0." in printed
    first, best = (torch.load(folder / f"{name}.ckpt", weights_only=True) for name in ("last", "best"))
    assert all(torch.equal(value, best["state_dict"][name]) for name, value in first["state_dict"].items())

    main(["fit", *common, "--trainer.max_epochs=2", "--ckpt_path", "last"])
    resumed = folder.parents[1] / "version_1/checkpoints/last.ckpt"
    assert f"Weights: {folder}/last.ckpt" in capsys.readouterr().out
    second = torch.load(resumed, weights_only=True)
    assert (first["epoch"], second["epoch"], second["global_step"]) == (0, 1, 4)
    state = second["callbacks"]["Checkpoints"]
    assert state["value"] <= first["callbacks"]["Checkpoints"]["value"]  # of the whole training, not of its last part

    main(["test", *common])
    assert f"Weights: {resumed}" in capsys.readouterr().out
    main(["fit", *common, "--model.init_args.alpha=0", "--seed_everything=3"])
    assert Path("manifold_mixup_runs/digits-none-seed3/version_0/checkpoints/last.ckpt").is_file()
    with pytest.raises(SystemExit):
        main(["test", *common, "--model.init_args.model.init_args.initial_channels=4"])
    assert "error: The checkpoint is that of another network" in capsys.readouterr().err


def test_other_checkpoints_are_left_to_the_user(tmp_path) -> None:
    common = [*TINY, "--trainer.max_steps=1", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    main(["fit", *common, "--trainer.enable_checkpointing=false"])
    own = ["--trainer.callbacks=ModelCheckpoint", f"--trainer.callbacks.dirpath={tmp_path / 'own'}"]
    main(["fit", *common, *own])
    assert [path.parent.name for path in tmp_path.rglob("*.ckpt")] == ["own"]


def test_validate_test_and_predict(capsys, tmp_path) -> None:
    common = [*TINY, "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    main(["fit", *common, "--trainer.max_steps=3"])
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    fitted = capsys.readouterr().out
    main(["test", *common, f"--ckpt_path={checkpoint}"])
    error = re.search(r"test error +│ +([\d.]+) %", fitted)
    logged = re.search(r"test/error\s+│\s+([\d.]+)", capsys.readouterr().out)
    assert float(logged[1]) == pytest.approx(float(error[1]) / 100, abs=1e-4)
    main(["validate", *common, "--data.init_args.val_size=100", f"--ckpt_path={checkpoint}"])
    assert "val/nll" in capsys.readouterr().out
    main(["predict", *common, f"--ckpt_path={checkpoint}"])


class Data(LightningDataModule):
    """Sets its attributes in `__init__`, as most do."""

    def __init__(self) -> None:
        super().__init__()
        self.num_classes = 7


class Wanting(LightningModule):
    def __init__(self, num_classes: int, hidden: int = 3) -> None:
        super().__init__()
        self.num_classes = num_classes


class Content(Wanting):
    """Hands its arguments on, and has a default of its own for them."""

    def __init__(self, num_classes: int = 4, **kwargs) -> None:
        super().__init__(num_classes, **kwargs)


class Handing(Wanting):
    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)


def made(*args: str):
    return ManifoldMixupCLI([*args, "--trainer.logger=false"], run=False)


@pytest.mark.parametrize(
    ("model", "data", "expected"),
    [
        ([f"{__name__}.Wanting"], Data, 7),
        ([f"{__name__}.Wanting", "--model.num_classes=5"], Data, 5),  # what the user says counts
        ([f"{__name__}.Content"], Data, 7),
        ([f"{__name__}.Content"], BoringDataModule, 4),  # the data does not know
        ([f"{__name__}.Handing"], Data, 7),
        (["BoringModel"], Data, None),  # the model does not ask
    ],
)
def test_the_data_tells_what_is_wanted_and_not_set(model, data, expected) -> None:
    cli = made(f"--model={model[0]}", *model[1:], f"--data={__name__}.{data.__name__}")
    assert getattr(cli.model, "num_classes", None) == expected


def test_a_function_makes_the_network_and_the_data_tells_the_module() -> None:
    cli = made(
        "--model.model.class_path=torchvision.models.resnet18",
        "--model.model.init_args.num_classes=7",
        f"--data={__name__}.Data",
    )
    assert cli.model.model.fc.out_features == 7
    assert cli.model.evaluations["test"].metrics["ece"].num_classes == 7


@pytest.mark.parametrize("path", ["torchvision.models.resnet18", "torchvision.models.ResNet"])
def test_a_network_by_its_path_alone_is_told_the_number_of_classes(path, tmp_path) -> None:
    (tmp_path / "network.yaml").write_text(f"model: {{init_args: {{model: {path}}}}}")
    if path.endswith("ResNet"):
        rest = {"block": "torchvision.models.resnet.BasicBlock", "layers": [1, 1, 1, 1]}
        (tmp_path / "network.yaml").write_text(
            f"model: {{init_args: {{model: {{class_path: {path}, init_args: {{block: {rest['block']}, "
            f"layers: {rest['layers']}}}}}}}}}"
        )
    else:
        assert made("--config=digits", f"--model.init_args.model={path}").model.model.fc.out_features == 10
        assert made("--config=digits", "--model.init_args.model", path).model.model.fc.out_features == 10
        assert made(f"--data={__name__}.Data", "--model.model", path).model.model.fc.out_features == 7
    assert made("--config=digits", "--config=network.yaml").model.model.fc.out_features == 10


def test_timm_is_told_the_number_of_classes(tmp_path) -> None:
    """``create_model`` hands ``num_classes`` on where no parser sees it."""
    assert made(f"--data={__name__}.Data", *TIMM).model.model.num_classes == 7
    cli = made(f"--data={__name__}.Data", *TIMM, "--model.model.num_classes=5")  # what the user says counts
    assert cli.model.model.fc.out_features == 5
    (tmp_path / "again.yaml").write_text(cli.parser.dump(cli.config))
    assert made("--config=again.yaml").model.model.fc.out_features == 5
    by_hand = "{class_path: timm.create_model, init_args: {model_name: resnet18}, dict_kwargs: {X}}"
    for kwargs, expected in (("num_classes: 6", (6, 3)), ("in_chans: 1", (7, 1))):
        (tmp_path / "network.yaml").write_text(f"model: {{init_args: {{model: {by_hand.replace('X', kwargs)}}}}}")
        network = made(f"--data={__name__}.Data", "--config=network.yaml").model.model
        assert (network.fc.out_features, network.conv1.in_channels) == expected


RESNET = "torchvision.models.resnet18"
TIMM = ["--model.model=timm.create_model", "--model.model.model_name=resnet18"]


@pytest.mark.parametrize("name", ["model.model", "model.init_args.model.init_args", "model.model.init_args"])
def test_what_the_user_says_about_the_network_counts(name) -> None:
    network = [f"--model.model={RESNET}", f"--data={__name__}.Data"]
    assert made(*network, f"--{name}.num_classes=5").model.model.fc.out_features == 5
    assert made(*network, f"--{name}.zero_init_residual=true").model.model.fc.out_features == 7


@pytest.mark.parametrize("network", [[f"--model.model={RESNET}"], TIMM], ids=["torchvision", "timm"])
def test_a_network_keeps_its_own_number_of_classes_where_the_data_have_none(network) -> None:
    regression = "--model=lightning_manifold_mixup.paper.tasks.RegressionModule"
    cli = made(regression, *network, f"--data={__name__}.BoringDataModule")
    assert cli.model.model.fc.out_features == 1000


def test_what_neither_data_nor_user_say_is_asked_for(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", f"--model={__name__}.Wanting", f"--data={__name__}.BoringDataModule", "--trainer.logger=false"])
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith("BoringDataModule has no such attribute: set model.init_args.num_classes.")


def test_the_data_tells_the_model_its_sizes() -> None:
    cli = made("--config=digits")
    assert cli.model.model.conv1.in_channels == 1
    assert cli.model.model.linear.out_features == 10
    flat = ["--data.init_args.flatten=true", "--model.init_args.model=lightning_manifold_mixup.paper.models.MLP"]
    cli = made("--config=digits", *flat, "--model.init_args.layers=auto")
    assert cli.model(torch.zeros(2, 64)).shape == (2, 10)


def test_any_module_and_any_data(capsys) -> None:
    boring = "lightning.pytorch.demos.boring_classes."
    args = ["--trainer.fast_dev_run=true", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    main(["fit", f"--model={boring}BoringModel", f"--data={boring}BoringDataModule", *args])
    assert "after the last epoch" not in capsys.readouterr().out  # it logs nothing in testing
    assert issubclass(BoringModel, LightningModule)


def test_the_table_has_student_teacher_and_the_rest(capsys) -> None:
    early = {"test/nll": 10359.1234, "test/kappa": 0.5, "test/teacher_error": 0.0123, "test/error": 0.25}
    print_results({**early, "train/loss": 1.0})
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    cells = [tuple(cell.strip() for cell in line.strip("│").split("│")) for line in lines]
    assert cells == [
        ("test error", "25.00 %"),
        ("negative log likelihood (nats)", "1.04e+04"),
        ("test error, of the teacher", "1.23 %"),
        ("test/kappa", "0.5000"),
    ]


def test_layers_of_a_recipe_and_of_any_network(capsys) -> None:
    main(["layers", "--config=digits"])
    out = capsys.readouterr().out
    assert re.search(r"model\.layer2 +│ Sequential +│ \(5, 32, 4, 4\) +│ yes +│ yes", out)
    assert re.search(r"model\.layer1\.0\.conv1 .*│ no: bypassed", out)
    assert "layers='auto' mixes at: input, model.layer1, model.layer2" in out
    assert "evaluations" not in out
    main(
        [
            "layers",
            "--model.class_path=torchvision.models.resnet18",
            "--model.init_args.num_classes=7",
            "--input_shape=3,48,48",
        ]
    )
    out = capsys.readouterr().out
    assert re.search(r"fc +│ Linear +│ \(5, 7\)", out)
    assert "mixes at: input, layer1, layer2" in out


def test_recipes_are_found_from_any_folder(tmp_path) -> None:
    assert not (tmp_path / "digits.yaml").exists()
    (tmp_path / "digits").write_text("trainer: {max_epochs: 3}")  # a file comes before a recipe of its name
    assert recipes.layers_of("digits") == [Path("digits")]
    assert recipes.layers_of("digits.yaml")[0].parent == Path(recipes.__file__).parent
