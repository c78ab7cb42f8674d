"""What data modules hand on is what the classes beneath them take, with the same types."""

from inspect import signature
from typing import get_type_hints

import pytest

from lightning_manifold_mixup.paper.data import ImageDataModule
from lightning_manifold_mixup.paper.data.base import SplitDataModule
from lightning_manifold_mixup.paper.data.options import ImageOptions, LoaderOptions


@pytest.mark.parametrize(("options", "taken_by"), [(LoaderOptions, SplitDataModule), (ImageOptions, ImageDataModule)])
def test_options_are_those_of_the_class(options, taken_by):
    expected = {name: value for name, value in get_type_hints(taken_by.__init__).items() if name != "return"}
    assert get_type_hints(options) == expected
    assert set(expected) == set(signature(taken_by).parameters)
