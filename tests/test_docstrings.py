"""The reference is the docstrings: each public name has shapes, errors and an example where they apply."""

import importlib
import inspect
import re
from dataclasses import is_dataclass
from typing import get_type_hints

import pytest

import lightning_manifold_mixup

DATA = ("base", "batches", "image_base", "resized", "shapes", "spirals", "splits", "text", "word_vectors")
MODULES = (
    "partners",
    "evaluation",
    "layers",
    "modules.losses",
    "paper.data",
    *(f"paper.data.{name}" for name in DATA),
    "paper.models",
    "paper.recipes",
    "paper.tasks",
    "paper.theorem",
)
NO_EXAMPLE = ("evaluation.console",)  # what depends on the terminal
SHAPE = re.compile(r"\([\w.][\w ./*+-]*,[^)]*\)|\bscalar\b|0-d|\bshape", re.IGNORECASE)


def names_of(module):
    if hasattr(module, "__all__"):
        return module.__all__
    own = (name for name, thing in vars(module).items() if inspect.isclass(thing) or inspect.isfunction(thing))
    return [name for name in own if not name.startswith("_")]


def public():
    """The public classes and functions of this package, by where a user imports them from."""
    package = lightning_manifold_mixup.__name__
    found = {}
    for module in (package, *(f"{package}.{name}" for name in MODULES)):
        imported = importlib.import_module(module)
        for name in names_of(imported):
            thing = getattr(imported, name)
            error = inspect.isclass(thing) and issubclass(thing, Exception)
            if callable(thing) and not error and thing.__module__.startswith(package):
                found[f"{module.removeprefix(package).lstrip('.')}.{name}".lstrip(".")] = thing
    return found


PUBLIC = public()


def doc_of(thing):
    return inspect.getdoc(thing) if thing.__doc__ else ""


def source_of(thing):
    """What runs when it is called; of a class, what runs when it is made."""
    if inspect.isclass(thing):
        made = vars(thing).get("__post_init__") or (None if is_dataclass(thing) else vars(thing).get("__init__"))
        return inspect.getsource(made) if made else ""
    return inspect.getsource(thing)


def takes_tensors(thing):
    return inspect.isfunction(thing) and any("Tensor" in str(hint) for hint in hints_of(thing).values())


def hints_of(function):
    try:
        return get_type_hints(function)
    except NameError:  # a name for type checkers only
        return function.__annotations__


def test_the_public_names_are_found():
    assert len(PUBLIC) > 110
    assert {"ManifoldMixupCallback", "draw_mix", "partners.LabelDistancePartners", "evaluation.fgsm"} <= PUBLIC.keys()


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring(name):
    thing = PUBLIC[name]
    doc = doc_of(thing)
    assert doc, f"{name} has no docstring"
    parameters = [p for p in inspect.signature(thing).parameters.values() if p.name not in ("self", "args", "kwargs")]
    if "Made by ``" in doc:  # not by a user
        parameters = []
    missing = [p.name for p in parameters if not re.search(rf"(?<![\w.]){re.escape(p.name)}\b", doc)]
    if parameters and not re.search(r"^Args:|^Attributes:", doc, re.MULTILINE):
        missing.append("Args")
    if takes_tensors(thing) and not SHAPE.search(doc):
        missing.append("shapes")
    own = re.sub(r"(?s)\"\"\".*?\"\"\"", "", source_of(thing))
    if re.search(r"^\s+raise (?!NotImplemented)\w+\(", own, re.MULTILINE) and "Raises:" not in doc:
        missing.append("Raises")
    if name not in NO_EXAMPLE and ">>>" not in doc:
        missing.append("an example")
    assert not missing, f"{name}: {', '.join(missing)}"
