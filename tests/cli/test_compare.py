"""`manifold-mixup compare`: the methods differ in mixing alone, finished runs stay, numbers are those of the runs."""

import csv
import json
import math
import statistics
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule

from lightning_manifold_mixup import ManifoldMixupModule
from lightning_manifold_mixup.cli import compare, main, methods, runs
from lightning_manifold_mixup.cli.terminal import UsageError
from lightning_manifold_mixup.cli.training import Prepared
from lightning_manifold_mixup.paper import recipes
from lightning_manifold_mixup.paper.data import DigitsDataModule

TINY = [
    "--trainer.max_epochs=1",
    "--model.init_args.model.init_args.initial_channels=2",
    "--trainer.limit_train_batches=2",
]


class Spy(Callback):
    """Records the initial weights, the first batch, and what reaches the first layer."""

    def on_train_start(self, trainer, pl_module) -> None:
        self.weights = {k: v.clone() for k, v in pl_module.state_dict().items()}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if batch_idx == 0:
            self.batch = [part.clone() for part in batch]

    def on_train_end(self, trainer, pl_module) -> None:
        self.trained = {k: v.clone() for k, v in pl_module.state_dict().items()}


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)


def test_same_weights_and_same_first_batch(monkeypatch, tmp_path) -> None:
    spies = {}
    make = Prepared.make
    for method in recipes.METHODS:
        spy = spies[method] = Spy()

        def make_and_watch(cli, spy=spy) -> None:
            make(cli)
            cli.trainer.callbacks.append(spy)

        monkeypatch.setattr(Prepared, "make", make_and_watch)
        main(["compare", "--seeds=3", f"--methods={method}", f"--out={tmp_path}", *TINY])
    none = spies["none"]
    for method in ("input", "manifold"):
        other = spies[method]
        assert all(torch.equal(none.weights[k], other.weights[k]) for k in none.weights)
        assert all(torch.equal(a, b) for a, b in zip(none.batch, other.batch, strict=True))
        assert any(not torch.equal(none.trained[k], other.trained[k]) for k in none.trained)


def file_of(folder: Path, suffix: str) -> Path:
    """The one file of a comparison."""
    [file] = folder.glob(f"compare-*.{suffix}")
    return file


def test_a_comparison_leaves_the_tables_of_another(tmp_path) -> None:
    common = ["compare", "--seeds=0", f"--out={tmp_path}", *TINY]
    main([*common, "--methods=none"])
    first = file_of(tmp_path, "csv")
    before = first.read_bytes()
    main([*common, "--methods=none,input"])
    assert first.read_bytes() == before
    main([*common, "--methods=none"])
    assert len(list(tmp_path.glob("compare-*.csv"))) == 2


def test_a_finished_run_is_not_repeated(monkeypatch, tmp_path, capsys) -> None:
    command = ["compare", "--seeds=0,1", "--methods=none,manifold", f"--out={tmp_path}", *TINY]
    trained = []
    train = compare.train

    def failing_train(cli, folder):
        trained.append(folder.name)
        if len(trained) == 3:
            raise KeyboardInterrupt
        return train(cli, folder)

    monkeypatch.setattr(compare, "train", failing_train)
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 130
    assert "2 of 4 runs are done" in capsys.readouterr().err
    assert len(list(tmp_path.glob("runs/*/result.json"))) == 2
    assert file_of(tmp_path, "csv").is_file()  # of what there is
    main(command)
    assert len(trained) == 5  # the third again, and the fourth
    before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("runs/*/result.json")}
    assert len(before) == 4
    main(command)
    assert len(trained) == 5
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert capsys.readouterr().out.count("done before") == 2 + 4
    assert not list(tmp_path.rglob("*.partial"))

    results = [json.loads(file.read_text()) for file in before]
    with file_of(tmp_path, "csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["no mixup", "Manifold Mixup"]
    for row, method in zip(rows, ["none", "manifold"], strict=True):
        errors = [100 * r["metrics"]["last epoch"]["test/error"] for r in results if r["method"] == method]
        assert float(row["error %"]) == pytest.approx(statistics.mean(errors))
        assert float(row["error % std"]) == pytest.approx(statistics.stdev(errors))
        assert row["tested after"] == "last epoch"
    assert file_of(tmp_path, "png").stat().st_size > 10_000
    assert len(json.loads(file_of(tmp_path, "json").read_text())["runs"]) == 4


def test_what_changes_the_numbers_changes_the_key(tmp_path) -> None:
    def key(*overrides: str, seed: int = 0, method: str = "manifold") -> str:
        run = runs.Run("digits", method, seed, overrides, tmp_path)
        return run.key(run.prepare())

    assert key() == key("--trainer.enable_progress_bar=false", "--trainer.default_root_dir=elsewhere")
    others = [
        key("--trainer.max_epochs=2"),
        key("--data.init_args.batch_size=50"),
        key("--model.init_args.layers=[model.layer1]"),
        key(seed=1),
        key(method="none"),
        key(method="input"),
    ]
    assert len({key(), *others}) == 7


def test_best_validation_epoch_and_two_recipes(tmp_path, capsys) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("trainer: {max_epochs: 2}\ndata: {init_args: {val_size: 100}}\n")
    configs = ["--config=digits", f"--config=digits+{other}"]
    main(["compare", *configs, "--seeds=0", "--methods=input", "--out=out", *TINY[1:], "--trainer.max_epochs=2"])
    printed = capsys.readouterr().out
    assert "best val epoch" in printed
    results = json.loads(file_of(Path("out"), "json").read_text())["runs"]
    assert [run["recipe"] for run in results] == ["digits", "digits+other"]
    assert [run["best_epoch"] is None for run in results] == [True, False]
    validation = [epoch["val/error"] for epoch in results[1]["validation"]]
    assert len(validation) == 2
    assert results[1]["best_epoch"] == validation.index(min(validation))
    if results[1]["best_epoch"] == 1:
        assert results[1]["metrics"]["best val epoch"] == pytest.approx(results[1]["metrics"]["last epoch"])


def test_teachers_beside_networks_without_one(tmp_path, capsys) -> None:
    options = ["--methods=manifold", "--seeds=0,1", f"--out={tmp_path}", "--trainer.max_steps=1"]
    main(["compare", "--config=semi_digits-supervised", "--config=semi_digits", *options])
    results = json.loads(file_of(tmp_path, "json").read_text())["runs"]
    errors = [100 * run["metrics"]["last epoch"]["test/teacher_error"] for run in results[2:]]
    with file_of(tmp_path, "csv").open() as file:
        alone, taught = csv.DictReader(file)
    assert (alone["teacher's error %"], alone["teacher's error % std"]) == ("", "")
    assert float(taught["teacher's error %"]) == pytest.approx(statistics.mean(errors))
    assert float(taught["teacher's error % std"]) == pytest.approx(statistics.stdev(errors))
    assert "nan" not in capsys.readouterr().out


def test_a_run_that_diverged_is_in_the_table() -> None:
    def result(seed, nll):
        metrics = {runs.LAST: {"test/error": 0.5, "test/nll": nll}}
        return {"recipe": "digits", "method": "manifold", "seed": seed, "metrics": metrics, "seconds": 1.0}

    [row] = compare.summary([result(0, 1.0), result(1, float("nan")), result(2, 2.0)])
    assert (row["error %"], row["error % std"]) == (50, 0)
    assert math.isnan(row["NLL"])
    assert math.isnan(row["NLL std"])
    compare.print_summary([row])


def test_the_last_weights_give_the_last_number(tmp_path) -> None:
    main(["compare", "--seeds=0", "--methods=manifold", f"--out={tmp_path}", *TINY])
    (folder,) = (tmp_path / "runs").iterdir()
    result = json.loads((folder / "result.json").read_text())
    cli = Prepared(["--config", str(folder / "config.yaml")], run=False)
    cli.config.trainer.logger = False
    cli.make()
    cli.model.load_state_dict(torch.load(folder / "last.ckpt", weights_only=True)["state_dict"])
    cli.model.eval()
    (x, y), (x2, y2) = list(cli.datamodule.test_dataloader())
    x, y = torch.cat([x, x2]), torch.cat([y, y2])
    with torch.no_grad():
        wrong = (cli.model(x).argmax(1) != y).float().mean().item()
    assert result["metrics"]["last epoch"]["test/error"] == pytest.approx(wrong, abs=1e-6)


def test_methods_of_a_callback_in_the_yaml(tmp_path) -> None:
    file = tmp_path / "callback.yaml"
    file.write_text(
        "model: {init_args: {alpha: 0.0}}\n"
        "trainer:\n  callbacks:\n    - class_path: lightning_manifold_mixup.ManifoldMixupCallback\n"
        "      init_args: {alpha: 3.0, layers: [model.layer1]}\n"
    )
    found = {}
    for method in recipes.METHODS:
        config = runs.Run(f"digits+{file}", method, 0, (), tmp_path).prepare().config
        arguments = config.trainer.callbacks[0].init_args
        found[method] = (arguments.alpha, arguments.layers)
    assert found == {"none": (0, ["model.layer1"]), "input": (1, ["input"]), "manifold": (3, ["model.layer1"])}


def test_rows_bring_their_own_methods(tmp_path) -> None:
    alphas = {
        method: runs.Run("tinyimagenet-preactresnet18-manifold", method, 0, (), tmp_path)
        .prepare()
        .config.model.init_args
        for method in recipes.METHODS
    }
    assert {method: arguments.alpha for method, arguments in alphas.items()} == {
        "none": 0,
        "input": 0.2,
        "manifold": 0.2,
    }


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--methods=none,cutmix"], "Expected --methods among"),
        (["--seeds=a"], "Expected --seeds to be numbers"),
        (["--model.init_args.alpha=0"], "has no Manifold Mixup"),
        (["--config=digit"], "did you mean digits"),
    ],
)
def test_bad_usage(args, message, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["compare", *args])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


class Arguments(dict):
    """What a parsed configuration is to `set_method`: names and items are the same."""

    __getattr__, __setattr__ = dict.__getitem__, dict.__setitem__


class NoTestStep(ManifoldMixupModule):
    test_step = LightningModule.test_step


class NoTestSet(DigitsDataModule):
    def make_dataset(self, split):
        return None if split == "test" else super().make_dataset(split)


@pytest.mark.parametrize("wrong", [NoTestStep, NoTestSet])
def test_what_cannot_be_tested_is_not_trained(wrong, monkeypatch, capsys) -> None:
    key, what = ("model", "`test_step`") if wrong is NoTestStep else ("data", "test set")
    trained = []
    monkeypatch.setattr(wrong if key == "model" else ManifoldMixupModule, "training_step", lambda *_: trained.append(1))
    Path("own.yaml").write_text(yaml.safe_dump({key: {"class_path": f"{__name__}.{wrong.__name__}"}}))
    network = ["--model.init_args.model=lightning_manifold_mixup.paper.models.PreActResNet"] * (key == "model")
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--config=digits+own.yaml", "--seeds=0", *network, "--trainer.max_epochs=1"])
    assert stop.value.code == 2
    assert f"{wrong.__name__} has no {what}." in capsys.readouterr().err
    assert not trained


def test_the_clean_loss_is_added_to_a_callback_of_the_recipe() -> None:
    own = Arguments(
        class_path="lightning_manifold_mixup.ManifoldMixupCallback", init_args=Arguments(alpha=3.0, layers=["input"])
    )
    other = Arguments(class_path="lightning.pytorch.callbacks.Timer", init_args=Arguments())
    config = Arguments(trainer=Arguments(callbacks=[other, own]), model=Arguments())
    methods.set_method(config, "manifold+clean")
    assert config.trainer.callbacks == [other, own]
    assert own.init_args == {"alpha": 3.0, "layers": ["input"], "clean_weight": 1.0}


def test_the_clean_loss_is_added_to_a_module_that_brings_the_callback() -> None:
    for alphas in ({"alpha": 2.0}, {"alpha_labelled": 1.0, "alpha_unlabelled": 2.0}):
        for given, expected in (
            (None, {"clean_weight": 1.0}),
            ({"log_mixing": True}, {"log_mixing": True, "clean_weight": 1.0}),
        ):
            module = Arguments(init_args=Arguments(**alphas, layers=["model.layer1"], mixup=given))
            config = Arguments(trainer=Arguments(callbacks=None), model=module)
            methods.set_method(config, "manifold+clean")
            assert config.trainer.callbacks is None
            assert module.init_args == {**alphas, "layers": ["model.layer1"], "mixup": expected}
    other = Arguments(init_args=Arguments(alpha=2.0, layers=["input"]))
    with pytest.raises(UsageError, match="needs a ManifoldMixupModule, or a ManifoldMixupCallback in the recipe"):
        methods.set_method(Arguments(trainer=Arguments(callbacks=None), model=other), "manifold+clean")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_calibration_and_regression_in_the_table(tmp_path, capsys) -> None:
    shorter = ["--methods=none,manifold", "--trainer.check_val_every_n_epoch=1", "--trainer.num_sanity_val_steps=0"]
    main(["compare", "--config=digits-calibration", "--seeds=0", f"--out={tmp_path / 'a'}", *TINY, *shorter])
    rows = rows_of(file_of(tmp_path / "a", "csv"))
    results = [json.loads(file.read_text()) for file in tmp_path.glob("a/runs/*/result.json")]
    assert len(rows) == 4  # after the last epoch, and after the best one
    for result in results:
        [row] = [
            row
            for row in rows
            if row["method"] == methods.LABELS[result["method"]] and row["tested after"] == "last epoch"
        ]
        metrics = result["metrics"]["last epoch"]
        assert float(row["NLL, scaled"]) == pytest.approx(metrics["test_calibration/data_scaled_nll"])
        assert float(row["ECE %, scaled"]) == pytest.approx(100 * metrics["test_calibration/data_scaled_ece"])
        for name, key in (("noise", "noise"), ("other data", "other_data")):
            assert float(row[f"AUROC %, {name}"]) == pytest.approx(100 * metrics[f"test_calibration/{key}_auroc"])
    assert "interpolation" not in capsys.readouterr().out
    main(["compare", "--config=diabetes", "--seeds=0,1", f"--out={tmp_path / 'b'}", "--trainer.max_epochs=1"])
    rows = rows_of(file_of(tmp_path / "b", "csv"))
    assert [row["method"] for row in rows] == [methods.LABELS[method] for method in recipes.METHODS]
    results = [json.loads(file.read_text()) for file in tmp_path.glob("b/runs/*none*/result.json")]
    mean = statistics.mean(result["metrics"]["last epoch"]["test/rmse"] for result in results)
    assert float(rows[0]["RMSE"]) == pytest.approx(mean)
