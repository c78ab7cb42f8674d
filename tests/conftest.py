import os

os.environ.setdefault("MPLBACKEND", "agg")

import pytest
import torch
from lightning_utilities.core.inheritance import get_all_subclasses
from torch.utils.data import BatchSampler, DataLoader


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _data_loaders_as_they_were():
    """Lightning patches these classes while it asks for data, and leaves them so if it is given an error."""
    yield
    for base in (DataLoader, BatchSampler):
        for cls in get_all_subclasses(base) | {base}:
            for name in ("__init__", "__setattr__", "__delattr__"):
                if f"__old{name}" in vars(cls):
                    setattr(cls, name, getattr(cls, f"__old{name}"))
                    delattr(cls, f"__old{name}")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch.cuda.is_available() is False here"))
