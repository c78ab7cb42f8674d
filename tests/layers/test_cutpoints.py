"""Cut points against networks judged by hand, and against networkx."""

import networkx as nx
import pytest
import torch
from torch import nn

from lightning_manifold_mixup.layers import LayerReport, eligible_layers, observe
from lightning_manifold_mixup.layers.cutpoints import Verdict
from lightning_manifold_mixup.layers.flow import Flow
from lightning_manifold_mixup.layers.paths import count_paths, find_sinks
from tests import zoo


def cut_points(report: LayerReport) -> set[str]:
    """The layers judged cut points, the final output among them."""
    found = (Verdict.ELIGIBLE, Verdict.FINAL)
    return {row.name for row in report.rows if row.verdict in found and row.name != "input"}


@pytest.mark.parametrize("name", zoo.NETWORKS)
def test_cut_points_and_default_of_known_networks(name):
    torch.manual_seed(0)
    known = zoo.NETWORKS[name]
    network = known.build()
    report = eligible_layers(network, *known.inputs())
    called_once = {row.name for row in report.rows if row.calls == 1 and row.name != "input"}
    assert cut_points(report) == {name for name in called_once if known.is_cut_point(network, name)}
    assert tuple(report.default) == known.default
    assert report.sinks_found


@pytest.mark.parametrize("case", zoo.MICRO_CASES, ids=lambda case: case.__name__)
def test_cut_points_of_micro_cases(case):
    torch.manual_seed(0)
    assert cut_points(eligible_layers(case(), *case.inputs())) == case.cut_points


def test_final_output_is_no_eligible_layer():
    report = eligible_layers(zoo.mlp(), torch.randn(3, 20))
    assert report.row("6").verdict is Verdict.FINAL
    assert "6" not in report.eligible


@pytest.mark.parametrize(
    ("case", "layer", "verdict"),
    [
        (zoo.NoGradTrunk, "a", Verdict.NO_GRADIENT),
        (zoo.InPlaceResultIgnored, "act", Verdict.UNUSED),
        (zoo.StructuredOutputs, "record", Verdict.NO_TENSOR),
        (zoo.LearnedQueries, "project", Verdict.NO_DATA),
        (zoo.ControlFlow, "c", Verdict.UNCALLED),
        (zoo.DropoutInABranch, "b", Verdict.BYPASSED),
        (zoo.Ensemble, "members.0.1", Verdict.TRANSFORMED),
    ],
)
def test_verdicts(case, layer, verdict):
    assert eligible_layers(case(), *case.inputs()).row(layer).verdict is verdict


def test_serial_reuse_is_refused_and_parallel_use_is_not():
    shared = eligible_layers(zoo.SharedBlock(), torch.randn(3, 20))
    assert shared.row("block").verdict is Verdict.REPEATED
    assert shared.row("block").calls == 3
    siamese = eligible_layers(zoo.Siamese(), torch.randn(3, 8)).row("enc")
    assert siamese.eligible
    assert siamese.live_calls == (0, 1)


class Transposed(nn.Module):
    def forward(self, x):
        return x.transpose(0, 1).contiguous()


def test_batch_dimension_is_told_by_size():
    """Sizes: 5 samples of 4 x 6 numbers; the second layer puts samples second."""
    network = nn.Sequential(nn.Linear(6, 6), Transposed(), Transposed(), nn.Flatten(), nn.Linear(24, 3))
    report = eligible_layers(network, torch.randn(5, 4, 6))
    assert [report.row(str(index)).batch_dim for index in range(4)] == [0, 1, 0, 0]
    assert not any(row.ambiguous for row in report.rows)


def test_batch_dimension_given_is_verified():
    network = nn.Sequential(nn.Linear(6, 6), Transposed(), Transposed(), nn.Flatten(), nn.Linear(24, 3))
    report = eligible_layers(network, torch.randn(5, 4, 6), batch_size=5, batch_dim=1)
    assert [name for name in report.eligible if name != "input"] == ["1"]
    assert report.row("0").verdict is Verdict.NO_BATCH


def test_layer_without_batch_dimension_is_refused():
    class Rows(nn.Module):
        def forward(self, x):
            return x.reshape(-1, 6)

    report = eligible_layers(nn.Sequential(nn.Linear(6, 6), Rows(), nn.Linear(6, 2)), torch.randn(5, 4, 6))
    assert report.row("1").verdict is Verdict.OTHER_ROWS
    assert report.row("0").eligible


def test_several_views_are_not_taken_for_a_sequence():
    """8 rows of 4: two views of 4 samples, or 8 steps of a time-major sequence."""
    network = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
    assert eligible_layers(network, torch.randn(8, 4, 6), batch_size=4).row("0").verdict is Verdict.UNCLEAR_BATCH
    assert eligible_layers(network, torch.randn(8, 4, 6), batch_size=4, batch_dim=1).row("0").eligible
    assert eligible_layers(network, torch.randn(8, 4, 6), batch_size=4, batch_dim=-2).row("0").batch_dim == -2
    assert eligible_layers(network, torch.randn(7, 4, 6), batch_size=4).row("0").batch_dim == 1


def test_all_that_a_layer_returns_must_have_a_batch_dimension():
    """A hook mixes it all, also what is not used."""

    class Returning(nn.Module):
        def __init__(self, beside):
            super().__init__()
            self.returning, self.fc = zoo.Returning(lambda h: (h, beside(h))), zoo.square()

        def forward(self, x):
            return self.fc(self.returning(x)[0])

    def verdict(beside):
        return eligible_layers(Returning(beside), torch.randn(3, 8)).row("returning").verdict

    assert verdict(lambda h: h.mean(0)) is Verdict.NO_BATCH
    assert verdict(lambda h: h.mean()) is Verdict.ELIGIBLE
    assert verdict(lambda h: torch.arange(8)) is Verdict.ELIGIBLE


def test_ambiguous_batch_dimension_is_reported():
    network = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
    report = eligible_layers(network, torch.randn(5, 5, 6))
    assert report.row("0").ambiguous
    assert not eligible_layers(network, torch.randn(5, 5, 6), batch_dim=0).row("0").ambiguous
    assert not eligible_layers(network, torch.randn(5, 4, 6)).row("0").ambiguous


def test_every_tensor_of_an_output_has_its_own_batch_dimension():
    row = eligible_layers(zoo.LSTMClassifier(layers=2), torch.randint(1, 50, (4, 7))).row("lstm")
    assert row.shapes == ((4, 7, 24), (2, 4, 24), (2, 4, 24))
    assert row.batch_dims == (0, 1, 1)
    assert row.batch_dim is None


@pytest.mark.parametrize("size", [2, 4, 7])
def test_recurrent_layers_say_themselves_where_their_samples_are(size):
    """By their size alone, 4 states of 2 samples could be two views, and 7 samples of 7 steps either way round."""
    lstm = nn.LSTM(6, 5, num_layers=2, bidirectional=True, batch_first=True)

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.fc = lstm, nn.Linear(10, 3)

        def forward(self, x):
            return self.fc(self.lstm(x)[0][:, -1])

    row = eligible_layers(Last(), torch.randn(size, 7, 6)).row("lstm")
    assert row.eligible
    assert not row.ambiguous
    assert row.batch_dims == (0, 1, 1)


def test_layers_in_eval_mode_are_refused_in_a_training_step_only():
    """A frozen part is often kept in eval mode, where a mixing hook, which must leave teachers alone, does nothing."""
    network = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3))
    network[0].eval()
    report = eligible_layers(network, torch.randn(5, 6))
    assert report.row("0").verdict is Verdict.EVAL_MODE
    assert report.default == ["input", "1"]
    assert eligible_layers(network.eval(), torch.randn(5, 6)).eligible == ["input", "0", "1"]


def test_complex_input_is_no_state_that_can_be_mixed():
    class Magnitude(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.fc = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.fc(self.a(x.abs()))

    report = eligible_layers(Magnitude(), torch.randn(5, 6, dtype=torch.cfloat))
    assert report.row("input").verdict is Verdict.NO_TENSOR
    assert report.eligible == ["a"]


def test_input_beside_token_ids_is_no_whole_state():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.linear, self.fuse = nn.Embedding(9, 4), nn.Linear(6, 4), nn.Linear(4, 4)
            self.fc = nn.Linear(4, 2)

        def forward(self, ids, x):
            return self.fc(self.fuse(self.emb(ids).mean(1) + self.linear(x)))

    report = eligible_layers(Both(), torch.randint(9, (3, 5)), torch.randn(3, 6))
    assert report.row("input").verdict is Verdict.LOOKED_UP
    assert report.eligible == ["fuse"]
    assert report.default == ["fuse"]


@pytest.mark.parametrize(
    "name", ["preact_resnet", "unet", "transformer", "two_inputs", "googlenet", "mobilenet_v3_small"]
)
def test_counting_agrees_with_immediate_dominators(name):
    """A node is on every path to the end exactly if it is among the end's dominators."""
    torch.manual_seed(0)
    known = zoo.NETWORKS[name]
    network, inputs = known.build(), known.inputs()
    with observe(network, inputs) as seen:
        output = network(*inputs)
    flow = seen.flow
    sink = flow.node(output)
    into, onward = count_paths(flow.predecessors, [sink])
    counted = {node for node in range(len(into)) if into[node] * onward[node] == into[sink]}

    graph = nx.DiGraph((before, node) for node, befores in enumerate(flow.predecessors) for before in befores)
    above = nx.immediate_dominators(graph, 0)
    dominators, node = {sink}, sink
    while node != 0:
        node = above[node]
        dominators.add(node)
    assert counted == dominators
    assert len(dominators) > 10


def test_path_counts_are_exact_beyond_floating_point():
    """200 diamonds in a row: 2 ** 200 paths, and one more around all of them."""
    predecessors = [()]
    for _ in range(200):
        start = len(predecessors) - 1
        predecessors += [(start,), (start,), (start + 1, start + 2)]
    end = len(predecessors) - 1
    predecessors.append((end, 0))
    into, onward = count_paths(predecessors, [end + 1])
    assert into[end + 1] == 2**200 + 1
    assert into[end] * onward[end] == 2**200


def test_sinks_are_the_last_comparisons():
    """Content meets the target inside the network (node 2), and again as logits (node 4): the latter is the end."""
    flow = Flow()
    flow.predecessors = [(), (0,), (1,), (2,), (3,)]
    flow.weighted = [False, True, False, True, False]
    flow.comparisons = {2: (1,), 4: (3,)}
    assert find_sinks(flow) == [3]
    flow.comparisons = {2: (1,)}
    assert find_sinks(flow) == []  # labels that are an input, and compared with nothing
    flow.losses = {2}
    assert find_sinks(flow) == [1]
