"""The order of the package: what may import what, how long a file may be, and one dialect in all docstrings."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import networkx

import lightning_manifold_mixup

ROOT = Path(lightning_manifold_mixup.__file__).parent
PACKAGE = ROOT.name
FILES = {
    ".".join((PACKAGE, *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}

FLOORS = (
    {"_step", "_tables", "layers", "mixing", "partners"},
    {"callback"},
    {"modules"},
    {PACKAGE},
    {"evaluation"},
    {"paper"},
    {"cli"},
    {"__main__"},
)
"""From the ground up. A file imports from its own floor or from one below; the product ends at the package's face."""


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def floor(name: str) -> int:
    part = name.split(".")[1] if "." in name else name
    return next(number for number, parts in enumerate(FLOORS) if part in parts)


def imported(tree: ast.AST) -> Iterator[str]:
    """The package's files that a file imports when it is run; imports for type checkers do not run."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom):
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name if name in FILES else node.module for name in names if node.module in FILES)
        yield from imported(node)


def test_files_import_from_below_only():
    upward = [
        f"{name} imports {other}"
        for name, path in FILES.items()
        for other in imported(parsed(path))
        if floor(other) > floor(name)
    ]
    assert not upward


def test_imports_do_not_run_in_circles():
    """Nor with the imports inside functions, which only hide a circle."""
    graph = networkx.DiGraph([(name, other) for name, path in FILES.items() for other in imported(parsed(path))])
    assert not [part for part in networkx.strongly_connected_components(graph) if len(part) > 1]


def test_files_are_short():
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES.values()}
    assert not {name: number for name, number in lines.items() if number > 350}


def test_docstrings_have_no_other_marks_than_double_backticks():
    """Single backticks and roles of Sphinx would be another dialect; what an example prints is not looked at."""
    strings = (
        (path.name, node.value.value)
        for path in FILES.values()
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    )
    prose = (
        (name, re.sub(r"``[^`]+``|^ *>>> (.|\n(?! *\n))*", "", text, flags=re.MULTILINE)) for name, text in strings
    )
    assert not [(name, found) for name, text in prose for found in re.findall(r".*`.*", text)]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def private_names(tree: ast.AST) -> set[str]:
    """The names with one underscore that a file defines: functions, classes, variables, attributes of its objects."""
    defined = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_own(node):
            defined.add(node.attr)
    return set(filter(is_private, defined))


def is_own(node: ast.Attribute) -> bool:
    return ast.unparse(node.value) in ("self", "cls", "super()")


def private_reads(tree: ast.AST) -> Iterator[str]:
    """The names with one underscore that a file takes from modules, and from other objects than its own."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from (alias.name for alias in node.names if is_private(alias.name))
        elif isinstance(node, ast.Attribute) and not is_own(node) and is_private(node.attr):
            yield node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("setattr", "getattr", "delattr")):
            texts = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
            yield from (name for text in texts if is_private(name := text.rpartition(".")[2]))


def test_private_names_are_used_in_the_file_that_defines_them_alone():
    """Also in the tests. Names that the package does not define are those of torch and Lightning."""
    trees = {path: parsed(path) for path in [*FILES.values(), *Path(__file__).parent.rglob("*.py")]}
    ours = set().union(*(private_names(trees[path]) for path in FILES.values())) - {"_step"}
    assert not [
        (path.name, name)
        for path, tree in trees.items()
        for name in private_reads(tree)
        if name in ours - private_names(tree)
    ]


def test_names_that_are_imported_when_they_are_used_are_those_that_type_checkers_see():
    checked, homes = {}, {}
    for node in ast.walk(parsed(ROOT / "__init__.py")):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOMES":
            homes = ast.literal_eval(node.value)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE):
            checked |= {alias.name: node.module for alias in node.names}
    assert {name: f"{PACKAGE}.{home}" for name, home in homes.items()} == checked
    assert sorted(lightning_manifold_mixup.__all__) == sorted(checked)
    assert set(checked) <= set(dir(lightning_manifold_mixup))
