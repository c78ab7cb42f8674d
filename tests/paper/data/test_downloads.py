"""Downloads without a network."""

import urllib.error
import urllib.request

import pytest

from lightning_manifold_mixup.cli import main
from lightning_manifold_mixup.paper.data import CIFAR100DataModule, TinyImageNetDataModule


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refused(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", refused)


@pytest.mark.parametrize("module", [CIFAR100DataModule, TinyImageNetDataModule])
def test_what_is_missing_and_why(module, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"its download failed \(.*not known\)\. Put it there by hand"):
        module(str(tmp_path), download=True).prepare_data()


def test_one_line_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["fit", "--config=cifar10-preactresnet18-manifold", "--data.init_args.download=true"])
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("manifold-mixup: error")]
    assert len(error) == 1
    assert "no CIFAR10 in" in error[0]
