"""Tables in the terminal, for commands and evaluation callbacks. It imports neither torch nor lightning."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lightning_manifold_mixup._step.extras import require

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Row", "console", "number", "print_table"]

Row = dict[str, Any]
"""One line of a table. Texts say what was measured, numbers are the results, None is a result that does not apply."""

_NUMBER = re.compile(r"-?(\d|nan|inf)")


def console() -> Console:
    """Return the console that tables are printed to: 120 columns where the output is not a terminal."""
    made: Console = require("rich.console", "cli").Console(width=None if sys.stdout.isatty() else 120)
    return made


def print_table(rows: Sequence[Row], title: str | None = None, section: Callable[[Row], object] | None = None) -> None:
    """Print rows of results to the terminal.

    Floats are written as ``number`` writes them. Columns of numbers, also of texts that begin with a number, are
    aligned to the right.

    Args:
        rows: the lines of the table; all have the columns of the first.
        title: stands above the table.
        section: of a row; a rule separates rows of different sections.

    Raises:
        ModuleNotFoundError: without rich; the message has the pip command.

    Example:
        >>> rows = [{"attack": "fgsm", "epsilon": None, "accuracy": 0.25}]
        >>> print_table(rows, "test attacks")  # doctest: +NORMALIZE_WHITESPACE
                  test attacks
        ┏━━━━━━━━┳━━━━━━━━━┳━━━━━━━━━━┓
        ┃ attack ┃ epsilon ┃ accuracy ┃
        ┡━━━━━━━━╇━━━━━━━━━╇━━━━━━━━━━┩
        │ fgsm   │         │   0.2500 │
        └────────┴─────────┴──────────┘
    """
    table = require("rich.table", "cli").Table(title=title)
    cells = [[_cell(row[column]) for column in rows[0]] for row in rows]
    for column, texts in zip(rows[0], zip(*cells, strict=True), strict=True):
        numbers = all(_NUMBER.match(text) for text in texts if text)
        # In a narrow terminal long words are folded, not cut off, so that names can still be copied.
        table.add_column(column, justify="right" if numbers else "left", overflow="fold")
    for row, following, line in zip(rows, [*rows[1:], None], cells, strict=True):
        last = section is not None and following is not None and section(row) != section(following)
        table.add_row(*line, end_section=last)
    console().print(table)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return number(value)
    return "" if value is None else str(value)


def number(value: float, decimals: int = 4) -> str:
    """Write a number with as many decimals, from 10,000 on with three digits.

    Args:
        value: any float, also infinite or NaN.
        decimals: of smaller numbers.

    Example:
        >>> number(0.25), number(9999.5, 1), number(10359.1234), number(float("nan"))
        ('0.2500', '9999.5', '1.04e+04', 'nan')
    """
    return f"{value:.3g}" if 1e4 <= abs(value) < float("inf") else f"{value:.{decimals}f}"
