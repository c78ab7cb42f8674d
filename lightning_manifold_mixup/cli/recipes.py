"""``manifold-mixup recipes``: what is packaged, what the paper got with it, and what it costs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from operator import itemgetter

from lightning_manifold_mixup._tables import print_table
from lightning_manifold_mixup.cli.terminal import PROGRAM
from lightning_manifold_mixup.paper import recipes

PUBLISHED: dict[tuple[str, str], dict[str, tuple[float, float]]] = {
    ("cifar10", "preactresnet18"): {"none": (4.83, 0.190), "input": (3.82, 0.186), "manifold": (2.95, 0.137)},
    ("cifar100", "preactresnet18"): {"none": (24.01, 1.189), "input": (22.11, 1.055), "manifold": (20.34, 0.912)},
    ("svhn", "preactresnet18"): {"none": (2.89, 0.136), "input": (2.76, 0.212), "manifold": (2.27, 0.122)},
    ("cifar10", "preactresnet34"): {"none": (4.64, 0.200), "input": (2.88, 0.176), "manifold": (2.54, 0.118)},
    ("cifar100", "preactresnet34"): {"none": (23.55, 1.189), "input": (20.53, 1.039), "manifold": (18.35, 0.877)},
    ("svhn", "preactresnet34"): {"none": (2.97, 0.165), "input": (2.67, 0.199), "manifold": (2.18, 0.137)},
    ("cifar10", "wrn28_10"): {"none": (3.99, 0.162), "input": (2.92, 0.173), "manifold": (2.55, 0.111)},
    ("cifar100", "wrn28_10"): {"none": (21.72, 1.023), "input": (18.89, 0.927), "manifold": (18.04, 0.809)},
    ("svhn", "wrn28_10"): {"none": (2.80, 0.143), "input": (2.68, 0.184), "manifold": (2.06, 0.126)},
}
"""Test error in percent and NLL, mean of 5 runs, at the best epoch of each (Verma et al. 2019, tables 1 and 2)."""

PUBLISHED_TOP: dict[tuple[str, str], dict[str, tuple[float, float]]] = {
    ("tinyimagenet", "preactresnet18"): {"none": (55.52, 71.04), "input": (56.47, 71.74), "manifold": (58.70, 73.59)},
}
"""Top-1 and top-5 accuracy in percent."""

_MULTIPLICATIONS = {"preactresnet18": 0.56e9, "preactresnet34": 1.16e9, "wrn28_10": 5.25e9}
"""Of one image's forward pass, 32x32 pixels (or 64x64 with a stem of stride 2)."""

_IMAGES = {"cifar10": 50_000, "cifar100": 50_000, "svhn": 73_257, "tinyimagenet": 100_000}

_NOTES = f"""
Error %, NLL: the paper's mean of 5 runs, each at the epoch that was best on the test set. `{PROGRAM} compare`
reports that epoch, and the last one, which most others report; `fit` logs the best as val/error_best, tests the last.
Cost: 6 floating point operations per multiplication of the forward pass, image and epoch. Hours assume 20 TFLOP/s;
they are computed, not measured.
-code at the end of a row's name is the public code's convention where it differs from the text: loss bce; 2000 epochs
with milestones 500, 1000, 1500 (PreActResNets); S = input, layer1, layer2 for WRN-28-10.

One row:             {PROGRAM} fit --config cifar10-preactresnet18-manifold
on 8 GPUs:           ... --trainer.devices 8 --trainer.sync_batchnorm true --data.init_args.batch_size 13
                     (13 on each: the row's 100 in all; the learning rate stands for that)
its three methods:   {PROGRAM} compare --config cifar10-preactresnet18-manifold --seeds 0,1,2,3,4
what is in it:       {PROGRAM} recipes show cifar10-preactresnet18-manifold
"""


def main(args: Sequence[str]) -> None:
    """Run the command.

    Args:
        args: what follows ``manifold-mixup recipes``.
    """
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} recipes", description="Lists the packaged recipes, or prints one.", allow_abbrev=False
    )
    parser.add_argument("action", nargs="?", choices=["list", "show"], default="list")
    parser.add_argument("name", nargs="?", help="with show: the recipe")
    options = parser.parse_args(args)
    if (options.action == "show") != (options.name is not None):
        parser.error("expected `recipes`, or `recipes show NAME`")
    if options.action == "show":
        print(shown(options.name), end="")
    else:
        _print_list()


def shown(name: str) -> str:
    """Return the text of a recipe's files, each under its name; a later one overrides an earlier one.

    Example:
        >>> print(shown("cifar10-preactresnet18-none")[:50])
        # ----- common.yaml
        # What all rows of the paper's
    """
    parts = [f"# ----- {file.name}\n{file.read_text(encoding='utf-8')}" for file in recipes.layers_of(name)]
    return "\n".join(parts)


def about(name: str) -> str:
    """Return the comment at the head of the recipe's own file, up to the first empty line.

    Example:
        >>> about("cifar10_small-5000")
        'cifar10_small with 5,000 training images, in as many steps. Cost: that of cifar10_small.'
    """
    head: list[str] = []
    for line in recipes.layers_of(name)[-1].read_text(encoding="utf-8").splitlines():
        if not line.startswith("# "):
            break
        head.append(line.removeprefix("# "))
    return " ".join(head)


def operations(row: str) -> float:
    """Compute the floating point operations of training a row.

    Example:
        >>> f"{operations('cifar10-preactresnet18-none'):.1e}"
        '2.0e+17'
    """
    data, network, *_ = row.split("-")
    epochs = recipes.read(recipes.layers_of(row))["trainer"]["max_epochs"]
    return float(6 * _MULTIPLICATIONS[network] * _IMAGES[data] * epochs)


def _print_list() -> None:
    small = [{"recipe": name, "what": about(name)} for name in recipes.names() if not recipes.is_row(name)]
    print_table(small, "Recipes", section=itemgetter("recipe"))
    rows = []
    for name in recipes.row_names():
        data, network, method = name.split("-")
        if (data, network) in PUBLISHED:
            error, nll = PUBLISHED[data, network][method]
            numbers = f"{error:.2f}", f"{nll:.3f}"
        else:
            top1, top5 = PUBLISHED_TOP[data, network][method]
            numbers = f"{100 - top1:.2f} (top 5: {100 - top5:.2f})", ""
        cost = operations(name)
        cells = (name, *numbers, f"{cost / 1e18:.1f} EFLOP, {cost / 20e12 / 3600:.0f} h")
        rows.append(dict(zip(("recipe", "error %", "NLL", "cost (GPU)"), cells, strict=True)))
    print_table(rows, "Rows of the paper's tables", section=lambda row: row["recipe"].rpartition("-")[0])
    print(_NOTES, end="")
