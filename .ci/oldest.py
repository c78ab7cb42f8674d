"""Print the oldest releases of the libraries below that pyproject.toml admits, as pip takes them.

Those that are pure Python: they can be laid over an environment that holds the newest of all else.
"""

import re
from pathlib import Path

import tomllib

NAMES = ("lightning", "torchmetrics", "jsonargparse", "rich")

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
requirements = " ".join([*project["dependencies"], *project["optional-dependencies"]["cli"]])
for name in NAMES:
    (version,) = re.findall(rf"\b{name}(?:\[\w+\])?>=([\d.]+)", requirements)
    print(f"{name}=={version}")
