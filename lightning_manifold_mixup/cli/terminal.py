"""What all commands share: names, and errors in one line. It imports no other file of this folder, and no torch."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["DEBUG", "PROGRAM", "RUNS", "UsageError", "short_errors"]

PROGRAM = "manifold-mixup"
RUNS = "manifold_mixup_runs"
"""Folder of logs and results, below the current one."""

DEBUG = "MANIFOLD_MIXUP_DEBUG"
"""Environment variable; 1 shows tracebacks."""


class UsageError(ValueError):
    """The command line asks for something that cannot be done; the message says why."""


@contextmanager
def short_errors() -> Iterator[None]:
    """Run a block; if it raises an error that the user can mend, print one line and end the process.

    The user can mend the errors of this package and of Lightning's checks, and missing files and packages. With
    ``MANIFOLD_MIXUP_DEBUG=1`` in the environment they are raised with their traceback. Ctrl-C ends with status 130,
    also where Lightning has made an exit with status 1 of it.
    """
    try:
        yield
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(130)
    except SystemExit as stop:
        sys.exit(130 if isinstance(stop.__context__, KeyboardInterrupt) else stop.code)
    except Exception as error:
        if os.environ.get(DEBUG) or (cause := _users_error(error)) is None:
            raise
        print(f"{PROGRAM}: error: {_said(cause)}", file=sys.stderr)
        if not isinstance(cause, UsageError):
            print(f"({DEBUG}=1 shows where it comes from)", file=sys.stderr)
        sys.exit(2)


_USERS = {
    "FileNotFoundError",
    "MisconfigurationException",  # lightning's
    "MixingError",
    "ModuleNotFoundError",
    "UsageError",
}
"""By name, since their modules may not have been imported. Their subclasses count, too."""


def _users_error(error: BaseException | None) -> BaseException | None:
    """Find the first error in the chain of causes that the user can mend; None if there is none."""
    while error is not None and not _USERS & {base.__name__ for base in type(error).__mro__}:
        if isinstance(error, ValueError | TypeError) and _raised_in_package(error):
            return error
        if isinstance(error, RuntimeError) and str(error).startswith("Error(s) in loading state_dict"):
            return error
        error = error.__cause__
    return error


def _raised_in_package(error: BaseException) -> bool:
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    package = str(Path(__file__).parents[1])
    return traceback is not None and traceback.tb_frame.f_code.co_filename.startswith(package)


def _said(error: BaseException) -> str:
    """Say an error in one line."""
    if isinstance(error, RuntimeError) and str(error).startswith("Error(s) in loading state_dict"):
        first = re.sub(r"\s+", " ", str(error)).strip()
        return f"The checkpoint is that of another network; give the options that it was trained with. {first:.200}"
    return str(error)
