"""The paper's rows against the numbers of its text and its public code, typed in again."""

from itertools import product

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torchmetrics.functional.classification import binary_auroc

from lightning_manifold_mixup import ManifoldMixupCallback
from lightning_manifold_mixup.cli import recipes as command
from lightning_manifold_mixup.cli.training import Prepared
from lightning_manifold_mixup.evaluation import CalibrationCallback
from lightning_manifold_mixup.paper import recipes

PARN_S = ["input", "model.layer1", "model.layer2"]
WRN_S = ["input", "model.layer1"]
PARAMETERS = {"preactresnet18": 11.17e6, "preactresnet34": 21.28e6, "wrn28_10": 36.5e6}
CLASSES = {"cifar10": 10, "cifar100": 100, "svhn": 10, "tinyimagenet": 200}
HALF = (0.5, 0.5, 0.5)
AUGMENTATION = {  # of the public code: padding of the crop, flip, mean, standard deviation
    "cifar10": (2, True, [x / 255 for x in (125.3, 123.0, 113.9)], [x / 255 for x in (63.0, 62.1, 66.7)]),
    "cifar100": (2, True, [x / 255 for x in (129.3, 124.1, 112.4)], [x / 255 for x in (68.2, 65.4, 70.4)]),
    "svhn": (2, False, HALF, HALF),
    "tinyimagenet": (4, True, HALF, HALF),
}


def schedule(data: str, network: str, code: bool) -> tuple[int, list[int]]:
    if data == "tinyimagenet":
        return 2000, [1000, 1500]
    if network == "wrn28_10":
        return 400, [200, 300]
    return (2000, [500, 1000, 1500]) if code else (1200, [400, 800])


def test_rows() -> None:
    rows = recipes.row_names()
    assert len(rows) == len(set(rows)) == 3 * 3 * 3 + 3
    assert set(command.PUBLISHED) | set(command.PUBLISHED_TOP) == {tuple(row.split("-")[:2]) for row in rows}


@pytest.mark.parametrize("row", [row + code for row in recipes.row_names() for code in ("", "-code")])
def test_values_of_a_row(row: str) -> None:
    data, network, method, *rest = row.split("-")
    code = bool(rest)
    config = recipes.read(recipes.layers_of(row))
    model = config["model"]["init_args"]
    epochs, milestones = schedule(data, network, code)
    assert config["trainer"]["max_epochs"] == epochs
    assert model["lr_scheduler"]["init_args"] == {"milestones": milestones, "gamma": 0.1}
    sgd = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}
    assert model["optimizer"] == {"class_path": "torch.optim.SGD", "init_args": sgd}
    assert model["loss"] == ("bce" if code else "cross_entropy")
    assert config["data"]["init_args"]["batch_size"] == 100
    tiny = data == "tinyimagenet"
    alpha = {"none": 0, "input": 0.2 if tiny else 1, "manifold": 0.2 if tiny else 2}[method]
    assert model["alpha"] == alpha
    if method == "input":
        assert model["layers"] == ["input"]
    if method == "manifold":
        assert model["layers"] == (WRN_S if network == "wrn28_10" and not code else PARN_S)


# One network and one data set at a time change: together these rows go through every file.
@pytest.mark.parametrize(
    "row",
    [
        "cifar10-preactresnet18-manifold",
        "cifar100-preactresnet34-input",
        "svhn-wrn28_10-manifold-code",
        "tinyimagenet-preactresnet18-none",
        pytest.param("all", marks=pytest.mark.slow),
    ],
)
def test_a_row_becomes_a_model(row: str) -> None:
    for name in recipes.row_names() if row == "all" else [row]:
        _check_model(name)


def _check_model(row: str) -> None:
    data, network, method, *_ = row.split("-")
    cli = Prepared(["--config", row], run=False)
    cli.config.trainer.accelerator = "cpu"
    cli.config.trainer.logger = False
    cli.make()
    values = recipes.read(recipes.layers_of(row))["model"]["init_args"]
    parameters = sum(p.numel() for p in cli.model.model.parameters())
    head = cli.model.model.linear
    assert head.out_features == CLASSES[data]
    extra = (CLASSES[data] - 10) * (head.in_features + 1)
    assert parameters - extra == pytest.approx(PARAMETERS[network], rel=2e-3)
    assert cli.model.soft_label_loss_name == values["loss"]
    assert cli.model.model.conv1.stride == ((2, 2) if data == "tinyimagenet" else (1, 1))
    cli.model.trainer = cli.trainer
    callbacks = cli.model.configure_callbacks()
    if method == "none":
        assert callbacks == []
    else:
        (callback,) = callbacks
        assert isinstance(callback, ManifoldMixupCallback)
        assert (callback.alpha, callback.layers) == (values["alpha"], values["layers"])
    configured = cli.model.configure_optimizers()
    assert isinstance(configured["optimizer"], torch.optim.SGD)
    assert configured["optimizer"].defaults["nesterov"]
    assert dict(configured["lr_scheduler"]["scheduler"].milestones) == dict.fromkeys(
        values["lr_scheduler"]["init_args"]["milestones"], 1
    )
    assert configured["lr_scheduler"]["interval"] == "epoch"
    assert cli.datamodule.batch_size == 100
    assert cli.datamodule.val_size == "test"
    assert (cli.datamodule.padding, cli.datamodule.flip) == (None, None)  # the data's own
    vars(cli.datamodule)["folder_names"] = ()  # which Tiny-ImageNet's would read from the disk
    spec = cli.datamodule.spec
    padding, flip, mean, std = AUGMENTATION[data]
    assert (spec.padding, spec.flip) == (padding, flip)
    assert spec.mean == pytest.approx(mean, abs=3e-4)
    assert spec.std == pytest.approx(std, abs=3e-4)


def test_the_files_of_a_row_are_all_used() -> None:
    used = {path for row in recipes.row_names() for code in ("", "-code") for path in recipes.layers_of(row + code)}
    assert used == set(recipes.layers_of("digits")[0].parent.glob("paper/*.yaml"))


def test_a_name_may_have_any_parts_that_some_file_has():
    stems = [path.stem for path in recipes.layers_of("semi_digits-self-wrn")]
    assert stems == ["semi_digits", "semi_digits-self", "semi_digits-wrn", "semi_digits-self-wrn"]
    stems = [path.stem for path in recipes.layers_of("semi_digits-supervised-wrn")]  # no file of this name
    assert stems == ["semi_digits", "semi_digits-supervised", "semi_digits-wrn"]


@pytest.mark.parametrize("name", ["wrn", "digits-5000", "semi_digits-wrn-nope", "semi_digits-"])
def test_a_part_that_no_file_has_is_an_error(name):
    with pytest.raises(FileNotFoundError, match="There is no recipe and no file"):
        recipes.layers_of(name)


@pytest.mark.parametrize("name", ["digits", "cifar10_small", "cifar10_small-5000"])
def test_the_one_cycle_ends_with_the_last_epoch(name: str) -> None:
    config = recipes.read(recipes.layers_of(name))
    data = config["data"]["init_args"]
    images = 1000 if name == "digits" else 10 * data["labels_per_class"]
    steps = config["trainer"]["max_epochs"] * images // data["batch_size"]
    assert config["model"]["init_args"]["lr_scheduler"]["init_args"]["total_steps"] == steps


@pytest.mark.parametrize(
    ("name", "samples"), [("digits-calibration", 800), ("shapes", 30)], ids=["digits-calibration", "shapes"]
)
def test_other_schedules_end_with_the_last_epoch(name: str, samples: int) -> None:
    config = recipes.read(recipes.layers_of(name))
    steps = config["trainer"]["max_epochs"] * samples // config["data"]["init_args"]["batch_size"]
    schedule = config["model"]["init_args"]["lr_scheduler"]["init_args"]
    assert steps in (schedule.get("total_steps"), schedule.get("T_max"))


@pytest.mark.parametrize(
    "name", ["diabetes", "diabetes-overfit-cmixup", "friedman", "friedman-cmixup", "shapes", "digits-calibration"]
)
def test_a_recipe_trains_and_tests(name: str, tmp_path) -> None:
    options = ["--trainer.max_steps=2", "--trainer.num_sanity_val_steps=0", "--trainer.logger=false"]
    cli = Prepared(["--config", name, *options, f"--trainer.default_root_dir={tmp_path}"], run=False)
    cli.make()
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    assert cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)


@pytest.fixture
def objects(tmp_path):
    """A folder as ``cifar10_small`` wants it, with ten classes and fewer images."""
    generator = np.random.default_rng(0)
    for split, label, i in product(("train", "test"), range(10), range(5)):
        folder = tmp_path / "objects" / split / f"class{label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "objects"


@pytest.mark.parametrize("name", ["digits-calibration", "cifar10_small-calibration"])
def test_other_data_are_told_from_the_test_data(name: str, objects, tmp_path) -> None:
    """The AUROC is that of torchmetrics for the confidence of the predictions, with each image by itself."""
    options = ["--trainer.max_steps=3", "--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}"]
    if name.startswith("cifar10"):
        options += [f"--data.init_args.{x}" for x in (f"data_dir={objects}", "labels_per_class=3", "val_size=20")]
        options += ["--data.init_args.cache_dir=null", "--trainer.accelerator=cpu"]
    cli = Prepared(["--config", name, *options], run=False)
    cli.make()
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    [metrics] = cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    [callback] = [c for c in cli.trainer.callbacks if isinstance(c, CalibrationCallback)]
    sure = []
    with torch.inference_mode():
        for loader in (callback.other_data.test_dataloader(), cli.datamodule.test_dataloader()):
            samples = [(image, label) for image, label in loader.dataset]
            sure.append(torch.cat([cli.model.eval()(image[None]).softmax(1).max(1).values for image, _ in samples]))
    is_test = torch.cat([torch.full((len(x),), kind) for kind, x in enumerate(sure)])
    expected = binary_auroc(torch.cat(sure), is_test).item()
    assert metrics["test_calibration/other_data_auroc"] == pytest.approx(expected, abs=1e-3)
    assert 0.02 < expected < 0.98  # neither all nor nothing after three steps
    assert len(sure[0]) >= 797


@pytest.mark.parametrize("name", ["text", "text-embedding", "text-features", "text-lstm-tenth"])
def test_text_recipes_on_a_file(name: str, tmp_path) -> None:
    file = tmp_path / "reviews.tsv"
    rows = [f"good\tfine and word{i % 60}\nbad\tawful stuff\n" for i in range(600)]
    file.write_text("label\ttext\n" + "".join(rows))
    options = ["--trainer.max_steps=2", "--trainer.logger=false", f"--data.init_args.train_file={file}"]
    cli = Prepared(["--config", name, *options, f"--trainer.default_root_dir={tmp_path}"], run=False)
    cli.make()
    assert cli.model.model.embedding.num_embeddings == 60 + 4 + 2
    torch.testing.assert_close(cli.model.model.embedding.weight, cli.datamodule.word_vectors)
    assert cli.model.model.linear.out_features == 2
    assert type(cli.model.model).__name__ == ("TextLSTM" if "lstm" in name else "TextConvNet")
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    assert cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)


def test_layers_by_plus_and_by_file(tmp_path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump({"trainer": {"max_epochs": 7}, "data": {"init_args": {"batch_size": 9}}}))
    config = recipes.read(recipes.layers_of(f"digits+{own}"))
    assert config["trainer"]["max_epochs"] == 7
    assert config["data"]["init_args"] == {"batch_size": 9, "seed": 0}
    cli = Prepared(["--config", f"digits+{own}"], run=False)
    assert cli.config.data.init_args.batch_size == 9


def test_an_unknown_recipe_has_near_misses() -> None:
    with pytest.raises(FileNotFoundError, match="did you mean cifar10-preactresnet18-manifold"):
        recipes.layers_of("cifar10-preactresnet18-manifol")


def test_list_and_show(capsys) -> None:
    command.main([])
    printed = capsys.readouterr().out
    for text in (
        "cifar100-wrn28_10-manifold",
        "18.04",
        "0.809",
        "44.48 (top 5: 28.96)",
        "digits",
        "--trainer.devices 8",
    ):
        assert text in printed
    command.main(["show", "cifar10-preactresnet18-manifold"])
    shown = capsys.readouterr().out
    assert shown.index("common.yaml") < shown.index("cifar10.yaml") < shown.index("manifold.yaml")
    with pytest.raises(SystemExit):
        command.main(["show"])
