"""Where the package runs: all systems, and what an import of it brings along."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lightning_manifold_mixup
from lightning_manifold_mixup._step.devices import float64, float64_device
from lightning_manifold_mixup._step.mix import interpolation

ROOT = Path(lightning_manifold_mixup.__file__).parent
PACKAGE = ROOT.name
WINGS = ("paper", "cli", "evaluation")
POSIX = {"fcntl", "grp", "mmap", "posix", "pty", "pwd", "resource", "signal", "syslog", "termios", "tty", "ctypes"}
POSIX_CALLS = {"fork", "forkpty", "dup", "dup2", "kill", "killpg", "getuid", "nice", "mallopt", "sched_getaffinity"}
EXTRAS = {"torchvision", "sklearn", "matplotlib", "rich", "jsonargparse", "timm", "tensorboard", "pytorch_lightning"}
EXTRAS |= {"pandas", "triton", "PIL"}


def files(*wings):
    """The files of some wings; without any, those of the product."""
    for path in sorted(ROOT.rglob("*.py")):
        wing = path.relative_to(ROOT).parts[0]
        if wing in wings if wings else wing not in (*WINGS, "__main__.py"):
            yield path


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def importers(paths, *forbidden):
    return {
        f"{path.relative_to(ROOT).as_posix()} imports {name}"
        for path in paths
        for name in imports(path)
        if any(name == f"{PACKAGE}.{wing}" or name.startswith(f"{PACKAGE}.{wing}.") for wing in forbidden)
    }


def test_product_imports_no_wing():
    assert not importers(files(), *WINGS)


def test_evaluation_and_paper_import_no_command():
    assert not importers(files("evaluation"), "paper", "cli")
    assert not importers(files("paper"), "cli")


def test_product_needs_no_posix():
    for path in files():
        assert not POSIX.intersection(name.split(".")[0] for name in imports(path)), path
        tree = ast.parse(path.read_text(encoding="utf-8"))
        attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not POSIX_CALLS & attributes, path


def test_import_brings_no_extra_and_no_wing():
    """Compared with what Lightning and torchmetrics themselves import where it is installed."""
    script = (
        "import sys, lightning, torchmetrics; from importlib.util import find_spec; before = set(sys.modules);"
        "from lightning_manifold_mixup import *; assert find_spec('pytorch_lightning').origin;"
        "print(*set(sys.modules) - before); import lightning_manifold_mixup.paper.models as _;"
        "import lightning_manifold_mixup.paper.data as _; print(*set(sys.modules) - before)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    product, paper = (set(line.split()) for line in run.stdout.splitlines())
    assert f"{PACKAGE}.callback" in product
    assert not [name for name in product if name.startswith(tuple(f"{PACKAGE}.{wing}" for wing in WINGS))]
    assert f"{PACKAGE}.paper.data" in paper
    assert not EXTRAS & {name.split(".")[0] for name in product | paper}


def test_lightning_that_is_missing_is_named():
    """Its twin `pytorch_lightning` may well be there."""
    script = "import sys; sys.modules['lightning'] = None; from lightning_manifold_mixup import Mix"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT.parent)
    assert "`lightning` is needed here and not installed: pip install lightning\n" in run.stderr


# ------------------------------------------------------------------------------------------------------------ devices


def calls(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield node, node.func.attr if isinstance(node.func, ast.Attribute) else ""


def test_no_copy_is_left_to_itself_but_to_cuda():
    """Apple's GPUs, and copies to the host, would read what is not there."""
    for path in files():
        for call, _ in calls(path):
            for keyword in call.keywords:
                if keyword.arg == "non_blocking" and path.name not in (
                    "devices.py",
                    "kernels.py",
                ):
                    assert isinstance(keyword.value, ast.Attribute), path
                    assert keyword.value.attr == "is_cuda", path


def test_float64_is_asked_of_devices_that_have_it():
    for path in files():
        if path.name not in ("devices.py", "partners.py"):  # where partners are chosen on the host
            assert not [name for _, name in calls(path) if name == "double"], path
    assert float64_device(torch.device("mps")) == torch.device("cpu")
    assert float64_device(torch.device("cuda")) == torch.device("cuda")
    tensor = torch.ones(2, requires_grad=True)
    assert float64(tensor).dtype == torch.float64
    assert torch.autograd.grad(float64(tensor).sum(), tensor)[0].tolist() == [1, 1]


@pytest.mark.parametrize("lam", [torch.tensor(0.3), torch.rand(4)], ids=["one lam", "a lam for each"])
@pytest.mark.parametrize("permutation", [True, False])
def test_other_devices_mix_by_operations_that_all_of_them_have(lam, permutation, monkeypatch):
    """A device that is neither a CPU nor CUDA, as Apple's: no row by row, no kernel, and the same shape of graph."""
    monkeypatch.setattr(interpolation, "row_by_row", None)
    monkeypatch.setattr(interpolation, "kernel_for", None)
    h = torch.empty(4, 3, device="meta", requires_grad=True)
    partners = torch.arange(4, device="meta")
    mixed = interpolation.differentiable(h, lam.to("meta"), partners, 0, permutation=permutation, number=None)
    mixed.sum().backward()
    assert mixed.shape == h.grad.shape == (4, 3)
    assert mixed.device == h.grad.device == h.device
