"""Errors of jsonargparse in one line: which option is not known, and what was probably meant."""

from __future__ import annotations

import re
from collections.abc import Callable
from difflib import get_close_matches
from pydoc import locate
from typing import Any

from lightning_manifold_mixup._step.extras import require
from lightning_manifold_mixup.cli.request import handed_on

__all__ = ["shortened"]

_UNKNOWN = re.compile(
    r"(?:Option|Key|option|key)s? '(?P<a>[^']+)' (?:is )?not (?:accepted|expected)"
    r"|not accept (?:option|key|nested key) '(?P<b>[^']+)'"
    r"|[Uu]nrecognized arguments?: (?P<c>.+)"
    r"|No action for (?:destination )?key \"(?P<d>[^\"]+)\""
)
_CLASS = re.compile(r"class_path '([\w.]+)'")


def shortened(message: str, parser: Any) -> str:
    """Say in one line what is wrong with an option.

    Args:
        message: of jsonargparse.
        parser: that raised it; it knows the options.

    Returns:
        The name of an option that is not known, with near misses; or the part of another message that says most.
    """
    found = list(_UNKNOWN.finditer(message))
    if not found:
        lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
        return lines[0] if len(lines) == 1 else f"{lines[0].rstrip(':')}: {_reason(lines[1:])}"
    name = next(group for group in found[-1].groups() if group).split("=")[0].split()[0]
    classes = _CLASS.findall(message[: found[-1].start()])
    known = _arguments(classes[-1]) if classes else [action.dest for action in parser._actions]
    near = get_close_matches(name.lstrip("-"), known, n=1)
    owner = f" of {classes[-1].rpartition('.')[2]}" if classes else ""
    hint = f"; did you mean {near[0]}?" if near else "." if not classes else f", only {', '.join(known)}."
    return f"There is no option {name}{owner}{hint}"


def _reason(lines: list[str]) -> str:
    """Say what was expected and what was given, of the lines in which each type says why it does not fit."""
    given = [line for line in lines if line.startswith("Given value:")]
    reasons = [line.removeprefix("- ") for line in lines if line.startswith("- ")]
    first = next((reason for reason in reasons if not reason.endswith(":")), lines[0])
    return f"{first.rstrip('.')}. {given[-1]:.100}" if given and reasons else first


def _arguments(path: str) -> list[str]:
    target: Any = locate(path)
    parser = require("jsonargparse", "cli").ArgumentParser()
    add: Callable[..., list[str]] = (
        parser.add_class_arguments if isinstance(target, type) else parser.add_function_arguments
    )
    return [*(name.removeprefix("x.") for name in add(target, "x", fail_untyped=False)), *handed_on(target)]
