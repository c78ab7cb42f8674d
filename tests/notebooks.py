"""Executes the notebooks, and stores them with their outputs: ``python -m tests.notebooks [NAME ...]``."""

import base64
import io
import os
import re
import sys
from contextlib import contextmanager
from pathlib import Path

import nbformat
from jupyter_client.manager import start_new_kernel
from nbclient import NotebookClient
from PIL import Image

# What transformers, where it is installed, says about a missing ipywidgets is no output of a notebook.
os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"

FOLDER = Path(__file__).parents[1] / "notebooks"


def names():
    return sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


@contextmanager
def kernel():
    """A Jupyter kernel that works beside the notebooks; several may run in it, which saves the imports."""
    manager, client = start_new_kernel(cwd=str(FOLDER))
    try:
        yield manager, client
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def executed(name, running, settings=None):
    """Run a notebook with nothing defined before.

    Args:
        name: of the notebook.
        running: a ``kernel``.
        settings: numbers that replace those of the lines ``NAME = NUMBER``.

    Returns:
        The notebook with its outputs, without the times and counts that each run would change.
    """
    notebook = read(name)
    for cell in notebook.cells:
        for variable, value in (settings or {}).items():
            cell.source = re.sub(rf"^{variable} = \d+", f"{variable} = {value}", cell.source, flags=re.MULTILINE)
    manager, kernel_client = running
    kernel_client.execute_interactive("%reset -f", silent=True)
    client = NotebookClient(notebook, km=manager, timeout=900)
    client.kc = kernel_client
    client.execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = [output for output in cell.outputs if output.output_type != "error"]
            for output in cell.outputs:
                if "execution_count" in output:
                    output.execution_count = None
                if "image/png" in output.get("data", {}):
                    output.data["image/png"] = smaller(output.data["image/png"])
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return notebook


def smaller(picture):
    """Keep 64 colours of a PNG in base64, which makes charts three to four times smaller."""
    image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    file = io.BytesIO()
    image.quantize(64, kmeans=1, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def text_of(cell):
    """What a cell printed, and the plain text of what it displayed, if that is no picture."""
    parts = []
    for output in cell.get("outputs", []):
        if output.output_type == "stream":
            parts.append(output.text)
        elif "image/png" not in output.data:
            parts.append(output.data.get("text/plain", ""))
    return "\n".join(parts)


if __name__ == "__main__":
    for chosen in sys.argv[1:] or names():
        with kernel() as alone:
            nbformat.write(executed(chosen, alone), FOLDER / f"{chosen}.ipynb")
        print(f"{chosen}: {(FOLDER / f'{chosen}.ipynb').stat().st_size // 1024} kB")
