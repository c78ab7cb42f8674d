"""What users read: refusals with their reason and the way out, the table, and the rule of the default S."""

import dataclasses

import pytest
import torch
import transformers
from torch import nn

from lightning_manifold_mixup.layers import LayerReport, eligible_layers, observe
from tests import zoo


class Module(nn.Module):
    """Layers of all kinds around a small residual network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = zoo.ResidualNet(zoo.PreActBlock, "layer", 3)
        self.blocks = nn.ModuleList([nn.Linear(8, 8)])
        self.unused = nn.Linear(3, 3)
        self.constant = nn.Linear(3, 8)
        self.listing = ListOfWidth()
        self.frozen = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        with torch.no_grad():
            x = self.frozen(x)
        self.unused(x.mean((2, 3)))
        self.listing(x)
        return self.net(x) + self.constant(torch.ones(3)).sum()


class ListOfWidth(nn.Module):
    def forward(self, x):
        return [x.shape[-1]]


@pytest.fixture(scope="module")
def report() -> LayerReport:
    torch.manual_seed(0)
    return eligible_layers(Module(), torch.randn(3, 3, 16, 16))


@pytest.mark.parametrize(
    ("name", "refusal"),
    [
        (
            "net.layer1.0.conv1",
            "'net.layer1.0.conv1' is bypassed: another path (a skip connection or a parallel branch) leads from"
            " the input to the loss around its output, so only a part of the state would be mixed."
            " Nearest valid enclosing module: 'net.layer1.0', then 'net.layer1'."
            " Valid before it: 'net.conv1'. Valid after it: 'net.layer1.1'.",
        ),
        ("net.fc", "'net.fc' gives the final output: no weights follow it. Valid before it: 'net.bn'."),
        (
            "blocks",
            "'blocks' is never called as a module in the training forward pass (it is a container such as"
            " ModuleList, or only its parameters are used).",
        ),
        (
            "unused",
            "'unused' is called, but what it returns leads to no loss of the targets (it is not used, or only by a loss"
            " that reads other parts of the batch; list those as targets that are labels)."
            " Valid before it: 'input'. Valid after it: 'net.conv1'.",
        ),
        (
            "constant",
            "'constant' returns what does not depend on the input, so there is nothing to mix."
            " Valid before it: 'net.bn'.",
        ),
        (
            "listing",
            "'listing' returns no float tensor that could be replaced by a mixed one (its type is ListOfWidth)."
            " Valid before it: 'input'. Valid after it: 'net.conv1'.",
        ),
        (
            "frozen",
            "'frozen' runs under torch.no_grad(), outside of the part that is trained."
            " Valid before it: 'input'. Valid after it: 'net.conv1'.",
        ),
        ("net.layr1", "Expected the name of a layer of Module, got 'net.layr1'. Did you mean 'net.layer1',"),
    ],
)
def test_refusals(report, name, refusal):
    assert report.refusal(name).startswith(refusal)


def test_eligible_layers_are_not_refused(report):
    assert {report.refusal(name) for name in report.eligible} == {None}


def test_refusal_of_a_repeated_layer():
    report = eligible_layers(zoo.SharedBlock(), torch.randn(3, 20))
    assert report.refusal("block") == (
        "'block' is called 3 times in one forward pass, so its output is not one single state of the network."
        " Valid before it: 'stem'. Valid after it: 'norm'."
    )


def test_refusal_without_batch_dimension():
    class Rows(nn.Module):
        def forward(self, x):
            return x.reshape(-1, 6)

    report = eligible_layers(nn.Sequential(nn.Linear(6, 6), Rows(), nn.Linear(6, 2)), torch.randn(5, 4, 6))
    assert report.refusal("1") == (
        "'1' has rows that are not samples: its output has shape (20, 6), and the targets have 5 rows. Mix where there"
        " is one row for each sample (after pooling, say); if dimension 1 counts the samples, set batch_dim=1. Valid"
        " before it: '0'."
    )


def test_refusal_by_the_batch_dimension_that_was_set():
    report = eligible_layers(
        nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2)), torch.randn(5, 4, 6), batch_size=5, batch_dim=1
    )
    assert report.refusal("0") == (
        "'0' has no batch dimension: its output has shape (5, 4, 6), whose dimension batch_dim=1 has not the number"
        " of samples, 5 (the rows of the targets)."
    )


def test_refusal_for_an_unclear_batch_dimension():
    report = eligible_layers(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2)), torch.randn(8, 4, 6), batch_size=4)
    assert report.refusal("0") == (
        "'0' has no clear batch dimension: its output has shape (8, 4, 6), so dimension 1 may count the 4 samples, or"
        " dimension 0 several views of them; set batch_dim to say which one does."
    )


def test_refusals_of_the_input():
    report = eligible_layers(zoo.LSTMClassifier(), torch.randint(1, 50, (3, 7)))
    assert report.refusal("input") == (
        "'input' holds no float tensor, and integers and complex numbers are not mixed. Valid after it: 'emb'."
    )

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.fuse, self.fc = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, ids, x):
            return self.fc(self.fuse(self.emb(ids).mean(1) + x))

    report = eligible_layers(Both(), torch.randint(9, (3, 5)), torch.randn(3, 6))
    assert report.refusal("input") == (
        "'input' cannot be mixed as a whole: besides the float tensors, integers or complex numbers enter the network,"
        " and what they bring in would stay unmixed. Valid after it: 'fuse'."
    )


def test_table(report):
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "type", "output", "in", "S", "eligible"]
    assert len(lines) == len(report.rows) + 1
    (line,) = (line for line in lines if line.startswith("net.layer1 "))
    assert line.split("  ")[-1].strip() == "yes: on every path"
    assert "(3, 8, 16, 16)" in line
    (line,) = (line for line in lines if line.startswith("net.layer1.0.conv1 "))
    assert line.endswith("no: bypassed")


def test_rich_table(report):
    rich = pytest.importorskip("rich.console", reason="rich comes with the extra [cli]")
    console = rich.Console(width=200)
    with console.capture() as capture:
        console.print(report.as_table())
    text = capture.get()
    assert "Layers of Module" in text
    assert text.count("yes: on every path") == len(report.eligible)


def test_report_is_plain_data(report):
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.model = "other"
    assert [row.name for row in report.rows if row.selected] == report.default
    assert report.row("input").type == "input"


# ------------------------------------------------------------------------------------------- the default S


def test_default_inside_a_lightning_module_is_that_of_the_network():
    torch.manual_seed(0)
    module = nn.Module()
    module.model, module.criterion = zoo.ResidualNet(zoo.PreActBlock, "layer", 4), nn.CrossEntropyLoss()
    x, y = torch.randn(4, 3, 16, 16), torch.randint(10, (4,))
    with observe(module, x, y) as seen:
        module.criterion(module.model(x), y)
    report = seen.report()
    assert report.default == ["input", "model.layer1", "model.layer2"]
    # What tells a criterion: no eligible layer is in it.
    assert not any(name == "criterion" or name.startswith("criterion.") for name in report.eligible)


def test_more_than_seven_layers_are_thinned_evenly():
    blocks = [nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)) for _ in range(20)]
    report = eligible_layers(nn.Sequential(*blocks, nn.Linear(4, 2)), torch.randn(3, 4))
    assert report.default == ["input", "0", "1", "3", "5", "6", "8"]


def test_a_weight_computed_from_two_parameters_is_one():
    """Weight normalisation changes no S: a layer of one weight is no stage."""
    network = zoo.mlp()
    for index in (0, 2, 4):
        network[index] = nn.utils.parametrizations.weight_norm(network[index])
    assert eligible_layers(network, torch.randn(3, 20)).default == list(zoo.NETWORKS["mlp"].default)


def test_only_the_input_is_left_where_no_layer_is_eligible():
    report = eligible_layers(nn.Linear(4, 2), torch.randn(3, 4))
    assert report.default == ["input"]
    assert report.eligible == ["input"]


def test_no_layer_at_all():
    report = eligible_layers(nn.Embedding(5, 4), torch.randint(5, (3, 2)))
    assert report.default == []
    assert report.eligible == []


def test_rows_that_are_several_for_each_sample_are_counted():
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    report = eligible_layers(transformers.BertForMultipleChoice(config), torch.randint(50, (4, 3, 7)))
    refusal = report.refusal("bert.encoder.layer.0")
    assert refusal is not None
    assert "shape (12, 7, 16)" in refusal
    assert "number of samples, 4" in refusal
    assert "It has 3 rows for each sample" in refusal
