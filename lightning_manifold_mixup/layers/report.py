"""What a user reads about layers: a table of all of them, and the sentences that refuse one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_manifold_mixup._step.extras import require
from lightning_manifold_mixup.layers.choice import default_layers
from lightning_manifold_mixup.layers.cutpoints import Layer, Rows, Verdict
from lightning_manifold_mixup.layers.names import INPUT, unknown_name

if TYPE_CHECKING:
    from rich.table import Table

_HEADINGS = ("layer", "type", "output", "in S", "eligible")


@dataclass(frozen=True)
class LayerRow:
    """What was found about one layer.

    Attributes:
        name: its name, relative to the observed module; ``"input"`` for the network's input.
        type: the name of its class.
        shapes: the shapes of all float tensors of its output, in the order of the structure.
        eligible: whether mixing there mixes the whole state.
        selected: whether it is in the default S.
        verdict: the finding.
        batch_dims: for each of ``shapes``, the dimension that runs over samples (0 or 1), None if none does.
        batch_dim: the one that they share, None if they share none (an LSTM's output and its last states).
        ambiguous: whether dimensions 0 and 1 both have the size of the batch, so that ``batch_dim`` is a guess.
        calls: how often it was called in all, teachers' and second forward passes included.
        live_calls: which of the calls (counted from 0) lie on the way from the input to the logits.
        order: its position among all calls; -1 for the input, None if it was never called.
        group: layers of one group return the very same tensor.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_manifold_mixup import eligible_layers
        >>> row = eligible_layers(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), torch.zeros(5, 4)).row("0")
        >>> row.type, row.shapes, row.eligible, row.batch_dim
        ('Linear', ((5, 8),), True, 0)
    """

    name: str
    type: str
    shapes: tuple[tuple[int, ...], ...]
    eligible: bool
    selected: bool
    verdict: Verdict
    batch_dims: tuple[int | None, ...]
    batch_dim: int | None
    ambiguous: bool
    calls: int
    live_calls: tuple[int, ...]
    order: int | None
    group: int

    @property
    def reason(self) -> str:
        """The finding in a few words."""
        words = self.verdict.value
        if self.verdict is Verdict.REPEATED:
            words = f"called {len(self.live_calls)} times"
        return f"{words} (ambiguous batch dimension)" if self.ambiguous and self.eligible else words


@dataclass(frozen=True)
class LayerReport:
    """The layers of a network, and which of them are eligible for mixing.

    Attributes:
        rows: one row per layer, the input first, then in the order of ``named_modules``.
        default: the default S, from the input on.
        model: the name of the observed module's class.
        batch_size: the number of samples observed; of several groups, that of the first.
        batch_dim: the dimension that was said to run over samples, None if it was told by its size.
        sinks_found: whether the end of the network was found; False if no loss used the targets.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_manifold_mixup import eligible_layers
        >>> report = eligible_layers(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), torch.zeros(5, 4))
        >>> report.eligible, report.default
        (['input', '0'], ['input', '0'])
    """

    rows: tuple[LayerRow, ...]
    default: list[str]
    model: str
    batch_size: int
    batch_dim: int | None
    sinks_found: bool

    @property
    def eligible(self) -> list[str]:
        """The names of the eligible layers."""
        return [row.name for row in self.rows if row.eligible]

    def row(self, name: str) -> LayerRow:
        """Return the row of one layer.

        Raises:
            ValueError: if there is no layer of this name.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise ValueError(unknown_name(name, [row.name for row in self.rows], self.model))

    def refusal(self, name: str) -> str | None:
        """Say why a layer is refused, and which ones near it are not.

        Args:
            name: A layer's name.

        Returns:
            Sentences for an error; None if the layer is eligible.
        """
        try:
            row = self.row(name)
        except ValueError as error:
            return str(error)
        return None if row.eligible else f"{_cause(row, self)}.{_neighbours(row, self)}"

    def as_table(self) -> Table:
        """Return the rows as a table of the package rich.

        Raises:
            ModuleNotFoundError: if rich is not installed; the message has the pip command.
        """
        table: Table = require("rich.table", "cli").Table(title=f"Layers of {self.model}")
        for heading in _HEADINGS:
            # Where it is too wide, the type is cut short: a name is there to be copied.
            table.add_column(heading, no_wrap=heading != "type", overflow="ellipsis")
        for row in self.rows:
            style = "bold green" if row.selected else None if row.eligible else "dim"
            table.add_row(*_cells(row), style=style)
        return table

    def __str__(self) -> str:
        lines = [_HEADINGS, *map(_cells, self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        )


def make_report(layers: Sequence[Layer], model: str, observed: Rows, sinks_found: bool) -> LayerReport:
    """Put the findings in the form that users see.

    Args:
        layers: all layers, judged, the input first.
        model: the name of the observed module's class.
        observed: what counts samples.
        sinks_found: whether the end of the network was found.

    Returns:
        The report.
    """
    default = default_layers(layers)
    rows = tuple(_row(layer, selected=layer.name in default) for layer in layers)
    return LayerReport(rows, default, model, observed.sizes[0], observed.batch_dim, sinks_found)


def _row(layer: Layer, selected: bool) -> LayerRow:
    shown = next(iter(layer.live or layer.calls), None)
    shapes = () if shown is None else shown.shapes
    dims = set(layer.batch_dims)
    return LayerRow(
        name=layer.name,
        type=INPUT if layer.module is None else type(layer.module).__name__,
        shapes=shapes,
        eligible=layer.eligible,
        selected=selected,
        verdict=layer.verdict,
        batch_dims=layer.batch_dims,
        batch_dim=dims.pop() if len(dims) == 1 else None,
        ambiguous=layer.ambiguous,
        calls=len(layer.calls),
        live_calls=tuple(index for index, call in enumerate(layer.calls) if call in layer.live),
        order=None if shown is None else shown.order,
        group=layer.group,
    )


def _cause(row: LayerRow, report: LayerReport) -> str:
    name = repr(row.name)
    match row.verdict:
        case Verdict.BYPASSED:
            return (
                f"{name} is bypassed: another path (a skip connection or a parallel branch) leads from the input to the"
                " loss around its output, so only a part of the state would be mixed"
            )
        case Verdict.FINAL:
            return f"{name} gives the final output: no weights follow it"
        case Verdict.REPEATED:
            return (
                f"{name} is called {len(row.live_calls)} times in one forward pass, so its output is not one single"
                " state of the network"
            )
        case Verdict.UNCALLED:
            return (
                f"{name} is never called as a module in the training forward pass (it is a container such as"
                " ModuleList, or only its parameters are used)"
            )
        case Verdict.SCRIPTED:
            return f"{name} is compiled by TorchScript, which takes no hooks"
        case Verdict.TRANSFORMED:
            return f"{name} runs inside torch.func or torch.vmap, where its output cannot be replaced"
        case Verdict.UNUSED:
            return (
                f"{name} is called, but what it returns leads to no loss of the targets (it is not used, or only by a"
                " loss that reads other parts of the batch; list those as targets that are labels)"
            )
        case Verdict.NO_DATA:
            return f"{name} returns what does not depend on the input, so there is nothing to mix"
        case Verdict.NO_TENSOR if row.name == INPUT:
            return f"{name} holds no float tensor, and integers and complex numbers are not mixed"
        case Verdict.NO_TENSOR:
            return f"{name} returns no float tensor that could be replaced by a mixed one (its type is {row.type})"
        case Verdict.NO_GRADIENT:
            return f"{name} runs under torch.no_grad(), outside of the part that is trained"
        case Verdict.EVAL_MODE:
            return f"{name} runs in eval mode, in which nothing is mixed"
        case Verdict.LOOKED_UP:
            return (
                f"{name} cannot be mixed as a whole: besides the float tensors, integers or complex numbers enter the"
                " network, and what they bring in would stay unmixed"
            )
        case Verdict.UNCLEAR_BATCH:
            return (
                f"{name} has no clear batch dimension: its output has shape {_shapes(row)}, so dimension 1 may count"
                f" the {report.batch_size} samples, or dimension 0 several views of them; set batch_dim to say"
                " which one does"
            )
        case Verdict.OTHER_ROWS:
            return (
                f"{name} has rows that are not samples: its output has shape {_shapes(row)}, and the targets have"
                f" {report.batch_size} rows. Mix where there is one row for each sample (after pooling, say); if"
                " dimension 1 counts the samples, set batch_dim=1"
            )
        case Verdict.CALLED_ON_OTHERS:
            return (
                f"{name} is also called on other rows than those of the targets (unlabelled data, say), which have no"
                f" labels to mix; the targets have {report.batch_size} rows"
            )
        case Verdict.ROWS_EXCHANGED:
            return (
                f"{name} is followed by an operation that moves rows to each other by indices of the batch (the edges"
                " of a graph, say), so each row would meet rows of others in place of its own neighbours"
            )
        case _:
            dims, advice = "and none of its first two dimensions has", ""
            firsts = [shape[0] for shape in row.shapes if shape and report.batch_dim in (None, 0)]
            if report.batch_dim is None and report.batch_size in firsts:
                advice = "; if these are the time steps of (time, samples), set batch_dim=1"
            elif report.batch_size and firsts and all(first % report.batch_size == 0 for first in firsts):
                advice = (
                    f". It has {firsts[0] // report.batch_size} rows for each sample (choices, views or crops that were"
                    " put into one batch): mix where there is one"
                )
            if report.batch_dim is not None:
                dims = f"whose dimension batch_dim={report.batch_dim} has not"
            return (
                f"{name} has no batch dimension: its output has shape {_shapes(row)}, {dims} the number of samples,"
                f" {report.batch_size} (the rows of the targets){advice}"
            )


def _neighbours(row: LayerRow, report: LayerReport) -> str:
    """Name the nearest eligible layers: around the refused one, before it, and after it."""
    parts = row.name.split(".")
    parents = {".".join(parts[:end]) for end in range(1, len(parts))}
    around = [other.name for other in reversed(report.rows) if other.eligible and other.name in parents]
    text = ""
    if around:
        text += f" Nearest valid enclosing module: {', then '.join(map(repr, around))}."
    inside = (other.order for other in report.rows if other.name.startswith(f"{row.name}."))
    orders = [order for order in (row.order, *inside) if order is not None]
    if not orders:
        return text
    outermost: dict[int, LayerRow] = {}
    for other in sorted(report.rows, key=lambda other: other.name.count(".")):
        if other.eligible and other.name not in parents:
            outermost.setdefault(other.group, other)
    known = sorted((other.order, other.name) for other in outermost.values() if other.order is not None)
    before = [name for order, name in known if order < orders[0]]
    after = [name for order, name in known if order > orders[0]]
    if before:
        text += f" Valid before it: {before[-1]!r}."
    if after:
        text += f" Valid after it: {after[0]!r}."
    return text


def _cells(row: LayerRow) -> tuple[str, ...]:
    finding = f"{'yes' if row.eligible else 'no'}: {row.reason}"
    return row.name, row.type, _shapes(row), "yes" if row.selected else "", finding


def _shapes(row: LayerRow) -> str:
    return ", ".join(str(shape) for shape in row.shapes)
