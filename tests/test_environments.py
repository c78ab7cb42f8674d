"""What README and pyproject.toml say about versions is what `.ci/run` tests."""

import importlib.util
import os
import re
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("environments", ROOT / ".ci" / "environments.py")
environments = importlib.util.module_from_spec(spec)
spec.loader.exec_module(environments)


def test_readme_has_the_table():
    assert environments.table() in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_oldest_are_the_floors():
    floors, oldest = environments.floors(), environments.ENVIRONMENTS["oldest"]
    assert {name: oldest[name] for name in environments.COLUMNS[1:]} == {
        name: floors[name] for name in environments.COLUMNS[1:]
    }


def test_files_that_are_run_exist():
    run = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    files = re.findall(r"tests/[\w/]+\.py", run)
    assert files
    assert [file for file in files if not (ROOT / file).exists()] == []


def test_every_environment_is_run():
    run = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for name, row in environments.ENVIRONMENTS.items():
        if row["tests"].endswith("by hand"):
            assert name not in run
            continue
        [line] = [line for line in run.splitlines() if line.startswith(f"test_in {name}")]
        assert ("test_compile" in line or row["tests"] == "all") == (row["tests"] != "core")
        assert f"python_of {row['python']}" in run or name == "newest"


def test_pythons_of_the_classifiers_are_those_of_the_table():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    named = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', text)
    assert sorted(named) == sorted({row["python"] for row in environments.ENVIRONMENTS.values()})


@pytest.mark.parametrize("package", environments.COLUMNS[1:])
def test_this_environment_is_the_one_that_is_named(package):
    row = environments.ENVIRONMENTS[os.environ.get("CI_ENVIRONMENT", "newest")]
    if row[package] == "newest":
        assert release(version(package)) >= release(environments.floors()[package])
    else:
        assert release(version(package))[:2] == release(row[package])
    if "CI_ENVIRONMENT" in os.environ and row["tests"] != "all":
        assert release(row["python"]) == sys.version_info[:2]


def release(text):
    return tuple(int(part) for part in text.split("+")[0].split(".") if part.isdigit())
