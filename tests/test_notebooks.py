"""The notebooks run from a clean kernel: as they are when slow tests are asked for, else with less training."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
FAST = {"EPOCHS": 2, "SEEDS": 1}

pytestmark = [
    # of jupyter_client and its event loop
    pytest.mark.filterwarnings("ignore:::jupyter_client"),
    pytest.mark.filterwarnings("ignore:::zmq"),
]


@pytest.fixture(autouse=True)
def _no_warning_of_tqdm(monkeypatch):
    """What transformers, where it is installed, says about a missing ipywidgets is no error of a notebook."""
    monkeypatch.setenv("PYTHONWARNINGS", "ignore:IProgress not found")


def names():
    return sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))


def run(name, settings):
    """Execute a notebook with some numbers replaced; gives what it printed and the types of what it displayed."""
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    for cell in notebook.cells:
        for variable, value in settings.items():
            cell.source = re.sub(rf"^{variable} = \d+$", f"{variable} = {value}", cell.source, flags=re.MULTILINE)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    errors = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stderr")
    assert not errors
    return printed, {kind for output in outputs for kind in output.get("data", {})}


def test_the_notebooks_are_there_and_numbered():
    assert [name[:2] for name in names()] == [f"{number:02}" for number in range(1, len(names()) + 1)]
    assert len(names()) >= 4


@pytest.mark.parametrize("name", names())
def test_outputs_are_stripped(name):
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs
            assert cell.execution_count is None


@pytest.mark.parametrize("name", names())
def test_notebook_runs(name):
    printed, displayed = run(name, FAST)
    assert printed
    if not name.startswith("01"):
        assert "image/png" in displayed


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_notebook_runs_as_it_is(name):
    printed, _ = run(name, {})
    numbers = {
        "01": r"mean ([\d.]+)",
        "02": r"(?:none|manifold) +test error +[\d.]+ % +confidence above 0.95 on (\d+) %",
        "03": r"sum of the others +([\d.]+)",
        "04": r"(?:supervised +student|EMA teacher .* teacher) test error +([\d.]+)",
        "05": r"(?:no mixup|Manifold Mixup) +rmse ([\d.]+)",
    }[name[:2]]
    without, with_mixup, *_ = map(float, re.findall(numbers, printed))
    assert with_mixup < without, printed
