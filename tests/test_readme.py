"""What README says: its code runs, its commands are understood, its numbers are those of the stored results."""

import csv
import re
import shlex
from pathlib import Path
from statistics import mean, stdev

import lightning as L
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

import lightning_manifold_mixup
from lightning_manifold_mixup import ManifoldMixupCallback
from lightning_manifold_mixup.cli import main
from lightning_manifold_mixup.partners import LabelDistancePartners

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCED = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
PYTHON = [source for language, source in FENCED if language == "python"]
COMMANDS = [
    part.strip()
    for language, source in FENCED
    if language == "bash"
    for line in source.replace("\\\n", "").splitlines()
    for part in line.split("&&")
]
QUICK = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


@pytest.fixture
def pets(tmp_path, monkeypatch):
    """A folder of images, wider than high, of which some are grey."""
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            folder = tmp_path / "pets" / split / label
            folder.mkdir(parents=True)
            for i in range(4):
                pixels = torch.randint(256, (70, 96, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).convert("L" if i % 2 else "RGB").save(folder / f"{i}.png")
    monkeypatch.chdir(tmp_path)


class QuickTrainer(L.Trainer):
    """Two batches on the CPU, whatever README asks for."""

    def __init__(self, **kwargs):
        limits = {"max_epochs": 1, "limit_train_batches": 2, "limit_test_batches": 1, "enable_checkpointing": False}
        super().__init__(**{**kwargs, **limits, **QUICK})
        QuickTrainer.last = self


def tiny_bert(name, num_labels):
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(vocab_size=20, num_labels=num_labels, **sizes)
    )


def sentences():
    rows = []
    for length in (5, 3, 2, 4):
        ids = torch.zeros(5, dtype=torch.long)
        ids[:length] = torch.randint(3, 20, (length,))
        rows.append({"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.tensor(length % 2)})
    return DataLoader(rows, 4)


def run(source, monkeypatch, **names):
    """Execute a block as a user would who has imported what it is about; gives the callback that mixed."""
    monkeypatch.setattr(L, "Trainer", QuickTrainer)
    known = {"L": L, "torch": torch, "nn": nn, "F": F}
    known |= {"ManifoldMixupCallback": ManifoldMixupCallback, "LabelDistancePartners": LabelDistancePartners}
    exec(source, known | names)
    [callback] = [c for c in QuickTrainer.last.callbacks if isinstance(c, ManifoldMixupCallback)]
    return callback


def test_readme_is_short_and_has_three_tasks():
    assert len(README.splitlines()) <= 150
    assert len(PYTHON) == 3
    assert all(len([line for line in source.splitlines() if line.strip()]) <= 12 for source in PYTHON)


@pytest.mark.filterwarnings("ignore:.*log_every_n_steps")
def test_the_image_classifier(pets, monkeypatch):
    callback = run(PYTHON[0], monkeypatch)
    assert callback.layers_ == ["input", "model.layer1", "model.layer2"]
    logged = {name.split("/")[1] for name in QuickTrainer.last.callback_metrics if name.startswith("test/")}
    assert logged >= {"error", "nll", "ece"}


@pytest.mark.filterwarnings("ignore:.*log_every_n_steps")
def test_the_text_classifier(monkeypatch):
    class Auto:
        from_pretrained = staticmethod(tiny_bert)

    callback = run(PYTHON[1], monkeypatch, AutoModelForSequenceClassification=Auto, loader=sentences())
    assert callback.layers_ == ["model.bert.embeddings", *(f"model.bert.encoder.layer.{i}" for i in range(2))]
    assert str(callback).endswith("targets 'labels', masks 'attention_mask'")


@pytest.mark.filterwarnings("ignore:.*log_every_n_steps")
def test_the_regression(monkeypatch):
    callback = run(PYTHON[2], monkeypatch)
    assert callback.layers_ == ["input", "model.layer1", "model.layer2"]


@pytest.mark.filterwarnings("ignore:.*log_every_n_steps")
@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("manifold-mixup")])
def test_commands(command, pets, capsys):
    """As written, with less training."""
    _, name, *options = shlex.split(command)
    less = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.limit_test_batches=1"]
    less += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    if "torchvision" not in command:
        less.append("--model.init_args.model.init_args.initial_channels=2")
    main([name, *options, *([] if name == "layers" else less)])
    printed = capsys.readouterr().out
    assert {"fit": "test", "compare": "Manifold Mixup", "layers": "eligible"}[name] in printed


def test_nothing_but_the_checkout_is_installed():
    """No release is on an index, so no line may ask one for it."""
    for path in (ROOT / "README.md", *(ROOT / "notebooks").glob("*.ipynb")):
        for target in re.findall(r"pip install (.*)", path.read_text(encoding="utf-8")):
            assert target.startswith(('-e ".', '-e \\".')), path
    extras = set(re.findall(r'-e "\.\[(\w+)\]"', README))
    assert extras <= {"all", "cli", "test"}


def test_files_that_are_named_are_there():
    for name in re.findall(r"\]\((?!http)([^)]+)\)|`(notebooks/[\w./]+)`", README):
        [path] = filter(None, name)
        assert list(ROOT.glob(f"{path}*")), path


def test_every_option_of_the_callback_is_named():
    table = README[README.index("## Options") : README.index("## When not")]
    names = [name for row in re.findall(r"^\| (.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)", row)]
    init = set(ManifoldMixupCallback.__init__.__annotations__) - {"return"}
    assert init <= set(names)


def rows_of(name):
    lines = (ROOT / "notebooks" / "results" / f"{name}.csv").read_text(encoding="utf-8").splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


TABLE = {
    "CIFAR-10, 2,000": (
        "map",
        "cifar10_small",
        None,
        [("error", 100), ("nll", 1)],
        {"images": "2000", "epochs": "100"},
    ),
    "CIFAR-10, 5,000": ("map", "cifar10_small-5000", None, [("error", 100), ("nll", 1)]),
    "digits": ("calibration", "digits-calibration", None, [("error", 100), ("ece", 100)]),
    "text (MR": ("text", "text", "mr", [("error", 100), ("nll", 1)]),
    "text (Subj": ("text", "text-lstm-tenth", "subj", [("error", 100), ("nll", 1)]),
    "shapes": ("segmentation", "shapes", None, [("iou", 100), ("nll", 1)]),
    "diabetes": ("regression", "diabetes-overfit", None, [("rmse", 1)]),
}


@pytest.mark.parametrize("start", TABLE)
def test_results_are_those_of_the_files(start):
    file, recipe, which, metrics, *others = TABLE[start]
    [line] = [line for line in README.splitlines() if line.startswith(f"| {start}")]
    for method, cell in zip(("none", "input", "manifold", "manifold+clean"), line.split("|")[2:6], strict=True):
        chosen = {"recipe": recipe, "method": method, "set": which}.items() | dict(*others).items()
        runs = [row for row in rows_of(file) if all(row.get(name) == value for name, value in chosen)]
        if not runs:
            assert not cell.strip()
            continue
        expected = []
        for number, (metric, scale) in enumerate(metrics):
            values = [scale * float(row[metric]) for row in runs]
            digits = 2 if scale == 100 else 3
            spread = f" ± {stdev(values):.{digits}f}" if number == 0 else ""
            expected.append(f"{mean(values):.{digits}f}{spread}")
        assert cell.strip() == ", ".join(expected)
        assert f"({len(runs)})" in line


def test_the_citation_names_the_version():
    assert f"version = {{{lightning_manifold_mixup.__version__}}}" in README
