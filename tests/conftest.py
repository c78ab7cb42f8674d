import atexit
import logging
import os
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # pytest-xdist has a worker on each core; also for processes that tests start

# Where Python writes no bytecode and the packages came without any, each process that a test starts would compile all
# that it imports, for longer than most tests take. So they have it in a folder that goes when the tests end.
if sys.dont_write_bytecode and sys.pycache_prefix is None and not Path(find_spec("torch").cached).exists():
    os.environ["PYTHONPYCACHEPREFIX"] = tempfile.mkdtemp(prefix="bytecode-of-tests-")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    atexit.register(shutil.rmtree, os.environ["PYTHONPYCACHEPREFIX"], ignore_errors=True)

import pytest
import torch
from lightning_utilities.core.inheritance import get_all_subclasses
from torch.utils.data import BatchSampler, DataLoader

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # a plugin may have imported torch before

PATCHED = ("__init__", "__setattr__", "__delattr__")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _messages_reach_caplog(monkeypatch):
    """The commands make Lightning quieter, and the Trainer keeps its messages from the root logger."""
    logger = logging.getLogger("lightning.pytorch")
    monkeypatch.setattr(logger, "propagate", True)
    level = logger.level
    logger.setLevel(logging.INFO)
    yield
    logger.setLevel(level)


@pytest.fixture(autouse=True)
def _data_loaders_as_they_were():
    """Lightning patches these classes while it asks for data, and leaves them so if it is given an error."""
    classes = {cls for base in (DataLoader, BatchSampler) for cls in get_all_subclasses(base) | {base}}
    before = {cls: {name: vars(cls)[name] for name in PATCHED if name in vars(cls)} for cls in classes}
    yield
    for cls, methods in before.items():
        for name in PATCHED:
            if name in methods:
                setattr(cls, name, methods[name])
            elif name in vars(cls):
                delattr(cls, name)
            if f"__old{name}" in vars(cls):
                delattr(cls, f"__old{name}")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch.cuda.is_available() is False here"))
