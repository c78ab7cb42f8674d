"""Reads `environments.toml`: prints the constraints of an environment, one a line.

`python environments.py NAME` prints the constraints, `python environments.py --table` the table of README.
"""

import re
import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

HERE = Path(__file__).parent
ENVIRONMENTS = tomllib.loads((HERE / "environments.toml").read_text(encoding="utf-8"))
COLUMNS = ("python", "torch", "torchvision", "lightning", "torchmetrics")


def floors():
    """Return the oldest releases that pyproject.toml admits, for what the package itself needs."""
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = [*project["dependencies"], *project["optional-dependencies"]["cli"]]
    return dict(re.fullmatch(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", requirement).groups() for requirement in requirements)


def constraints(name):
    """Return the oldest of everything, or the versions that the file names."""
    if name == "oldest":
        oldest = floors()
        oldest["pytorch-lightning"] = oldest["lightning"]  # it comes along, and unpinned
        return [f"{package}=={'.'.join([*version.split('.'), '0', '0'][:3])}" for package, version in oldest.items()]
    pinned = {package: ENVIRONMENTS[name][package] for package in COLUMNS[1:]}
    return [f"{package}=={version}.*" for package, version in pinned.items() if version != "newest"]


def table():
    """Return the table of README, in Markdown."""
    rows = [["", *COLUMNS, "tests"], ["---"] * (len(COLUMNS) + 2)]
    rows += [[name, *(row[column] for column in COLUMNS), row["tests"]] for name, row in ENVIRONMENTS.items()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    print(table() if sys.argv[1] == "--table" else "\n".join(constraints(sys.argv[1])))
