"""The package's face: names are imported when they are used, and the light commands do without torch."""

import subprocess
import sys
from importlib import import_module

import pytest

import lightning_manifold_mixup

LIGHT = ("--help", "--version", "recipes")


def run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)


def test_the_function_mixing_is_not_hidden_by_its_file():
    file = import_module("lightning_manifold_mixup.mixing")
    lightning_manifold_mixup.mixing = file  # what Python does after it has imported a file of a package
    assert lightning_manifold_mixup.mixing is file.mixing


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="has no attribute 'Mixup'"):
        _ = lightning_manifold_mixup.Mixup
    assert lightning_manifold_mixup.partners.__name__ == "lightning_manifold_mixup.partners"


@pytest.mark.parametrize("command", LIGHT)
def test_light_commands_import_neither_torch_nor_lightning(command):
    done = run(
        f"import sys; from lightning_manifold_mixup.cli import main; main([{command!r}]);"
        "print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    assert done.returncode == 0, done.stderr
    assert not {"torch", "lightning", "numpy", "torchmetrics"} & set(done.stderr.split())
    assert done.stdout
