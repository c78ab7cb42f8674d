"""A misspelt argument is an error at once: for an editor and for mypy, which read signatures, and for Python."""

import inspect
import re
from pathlib import Path
from typing import get_type_hints

import pytest
from mypy import api
from torch.nn import Identity

import lightning_manifold_mixup
from lightning_manifold_mixup import evaluation
from lightning_manifold_mixup.evaluation import EvaluationCallback
from lightning_manifold_mixup.evaluation.report import EvaluationOptions
from lightning_manifold_mixup.paper import data, tasks

PACKAGE = Path(lightning_manifold_mixup.__file__).parent
CALLBACKS = [name for name in evaluation.__all__ if name.endswith("Callback")]
CALLS = {  # what is right, and then a misspelt argument
    **{name: f"data.{name}(batch_size=3, batchsize=3)" for name in data.__all__},
    "ImageFolderDataModule": 'data.ImageFolderDataModule("x", batch_size=3, flip=False, batchsize=3)',
    "ResizedDataModule": "data.ResizedDataModule(data.DigitsDataModule(), 32, 3, batch_size=3, batchsize=3)",
    "SemiSupervisedDataModule": "data.SemiSupervisedDataModule(data.DigitsDataModule(), 5, labels_perclass=3)",
    "ShapesDataModule": "data.ShapesDataModule(num_images=3, seed=1, num_image=3)",
    "TextDataModule": 'data.TextDataModule("file.csv", val_size=0.1, num_workers=1, valsize=0.1)',
    "RegressionModule": 'tasks.RegressionModule(Identity(), lr_interval="step", lr_intervall="step")',
    "SegmentationModule": 'tasks.SegmentationModule(Identity(), num_classes=3, lr_interval="step", optimiser=None)',
    **{name: f"evaluation.{name}(seed=1, verbose=False, dir_name='x')" for name in CALLBACKS},
    "RepresentationCallback": "evaluation.RepresentationCallback(['model'], seed=1, dir_name='x')",
}
ABSTRACT = [name for name in CALLS if inspect.isabstract(getattr(data, name, getattr(evaluation, name, None)))]
NAMES = [name for name in CALLS if name not in ABSTRACT]
HEAD = [
    "from torch.nn import Identity",
    "from lightning_manifold_mixup import evaluation",
    "from lightning_manifold_mixup.paper import data, tasks",
]


def test_all_public_classes_are_here():
    assert {*data.__all__, *tasks.__all__, *CALLBACKS} == CALLS.keys()
    assert ABSTRACT == ["ClassificationDataModule", "ImageDataModule", "RegressionDataModule", "EvaluationCallback"]


@pytest.mark.parametrize("name", NAMES)
def test_for_python(name):
    wrong = CALLS[name].removesuffix(")").rpartition(", ")[2].partition("=")[0]
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{wrong}'"):
        eval(CALLS[name], {"data": data, "tasks": tasks, "evaluation": evaluation, "Identity": Identity})


def test_for_mypy(tmp_path, monkeypatch):
    """One error for each misspelt argument, and none without it."""
    right = [CALLS[name].rpartition(", ")[0] + ")" for name in NAMES]
    file = tmp_path / "wrong.py"
    file.write_text("\n".join([*HEAD, *(CALLS[name] for name in NAMES), *right]))
    # Torch and Lightning are not read, which takes a few seconds in place of a minute.
    sources = [PACKAGE / "__init__.py", *PACKAGE.glob("paper/**/*.py"), *PACKAGE.glob("evaluation/*.py")]
    monkeypatch.setenv("MYPYPATH", str(PACKAGE.parent))
    options = ["--follow-imports=skip", "--no-error-summary", f"--cache-dir={tmp_path / 'cache'}", "--config-file="]
    output, problem, _ = api.run([*options, *map(str, [file, *sources])])
    assert not problem
    found = re.findall(r"wrong\.py:(\d+): error: Unexpected keyword argument \"(\w+)\" for \"(\w+)\"", output)
    assert [(NAMES[int(line) - len(HEAD) - 1], name) for line, _, name in found] == [(name, name) for name in NAMES]
    assert len(re.findall(r"wrong\.py:\d+: error", output)) == len(NAMES), output


def test_options_of_evaluations_are_those_of_the_class():
    expected = {name: hint for name, hint in get_type_hints(EvaluationCallback.__init__).items() if name != "return"}
    assert get_type_hints(EvaluationOptions) == expected
