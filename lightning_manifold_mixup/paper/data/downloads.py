"""Downloads that fail: what is missing, in one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["downloading"]


@contextmanager
def downloading(owner: str, name: str, folder: Path) -> Iterator[None]:
    """Download in the block; if there is no network, say what is missing and where it can be put by hand.

    Args:
        owner: the data module, for the message.
        name: of the data set.
        folder: where it will be.

    Raises:
        FileNotFoundError: if the download fails.

    Example:
        >>> with downloading("CIFAR10DataModule", "CIFAR10", Path("data")):
        ...     raise ConnectionError("no route to host")
        Traceback (most recent call last):
            ...
        FileNotFoundError: CIFAR10DataModule: no CIFAR10 in ...data, and its download failed (no route to host). ...
    """
    try:
        yield
    except (OSError, RuntimeError, EOFError) as error:  # RuntimeError: torchvision found an incomplete file
        reason = getattr(error, "reason", None) or error
        raise FileNotFoundError(
            f"{owner}: no {name} in {folder.expanduser().resolve()}, and its download failed ({reason}). Put it "
            "there by hand, or set data_dir to the folder that has it."
        ) from error
