"""The arguments that data modules hand on to the classes they are made from, for type checkers and editors."""

from collections.abc import Callable
from typing import Any, Literal

from typing_extensions import TypedDict

__all__ = ["ImageOptions", "LoaderOptions"]


class LoaderOptions(TypedDict, total=False):
    """What ``SplitDataModule`` takes; it says what each is."""

    batch_size: int
    eval_batch_size: int
    num_workers: int
    pin_memory: bool
    seed: int


class ImageOptions(LoaderOptions, total=False):
    """What ``ImageDataModule`` takes; it says what each is."""

    val_size: int | float | Literal["test"]
    labels_per_class: int | None
    padding: int | None
    flip: bool | None
    train_transform: Callable[..., Any] | None
    on_device: bool
