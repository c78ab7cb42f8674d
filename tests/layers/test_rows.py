"""Layers whose rows are not the samples of the targets, and example batches of other kinds than one tensor."""

from itertools import pairwise

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Accuracy
from transformers import BertConfig, BertForSequenceClassification

from lightning_manifold_mixup import ManifoldMixupCallback
from lightning_manifold_mixup._step.mix.dims import sample_dims
from lightning_manifold_mixup.layers import eligible_layers, observe
from lightning_manifold_mixup.layers.cutpoints import Verdict
from tests.exactness import by_hand, train
from tests.graphs import Batch, Data, GCNConv, global_mean_pool
from tests.helpers import weights_of

N = 16


def mlp(*sizes):
    pairs = pairwise(sizes)
    return nn.Sequential(*[part for a, b in pairs for part in (nn.Linear(a, b), nn.ReLU())][:-1])


def report(module, step, inputs, targets, **kwargs):
    with observe(module, inputs, targets, **kwargs) as seen:
        loss = step()
    found = seen.report()
    return found if found.sinks_found else seen.report(loss)


class Bags(nn.Module):
    def __init__(self, width, heads=None):
        super().__init__()
        self.enc = mlp(8, width, width)
        self.mid, self.head = mlp(width, 12), mlp(12, 12, 5)
        self.heads = heads

    def forward(self, x, bag):
        rows = self.mid(self.enc(x))
        return self.head(torch.zeros(N, rows.shape[1]).index_add(0, bag, rows))


@pytest.mark.parametrize("width", [N, 12])
def test_ragged_rows_are_never_mixed_along_their_features(width):
    sizes = torch.tensor([3 + j % 4 for j in range(N)])
    bag, x, y = torch.repeat_interleave(torch.arange(N), sizes), torch.randn(int(sizes.sum()), 8), torch.arange(N) % 5
    net = Bags(width)
    found = report(net, lambda: F.cross_entropy(net(x, bag), y), [x, bag], y, batch_size=N)
    assert found.row("enc.1").verdict is Verdict.OTHER_ROWS
    assert found.eligible == ["head.0", "head.1"]
    assert found.default == ["head.0"]
    assert found.refusal("enc.1") == (
        f"'enc.1' has rows that are not samples: its output has shape ({len(x)}, {width}), and the targets have 16"
        " rows. Mix where there is one row for each sample (after pooling, say); if dimension 1 counts the samples, set"
        " batch_dim=1. Valid after it: 'head.0'."
    )


def test_rows_of_the_input_are_known_also_in_three_dimensions():
    """(nodes, heads, width) with as many heads as samples looks like (time, samples, width)."""

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.enc, self.split, self.head = nn.Linear(8, 3 * N), nn.Unflatten(1, (N, 3)), mlp(3 * N, 8, 5)

        def forward(self, x, bag):
            return self.head(torch.zeros(N, 3 * N).index_add(0, bag, self.split(self.enc(x)).flatten(1)))

    net, x, bag, y = Heads(), torch.randn(37, 8), torch.arange(37) % N, torch.arange(N) % 5
    found = report(net, lambda: F.cross_entropy(net(x, bag), y), [x, bag], y, batch_size=N)
    assert found.row("split").verdict is Verdict.OTHER_ROWS
    assert found.eligible == ["head.0", "head.1"]


def test_time_major_sequences_are_still_mixed():
    class Sequences(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.rnn, self.head = nn.Embedding(9, 6), nn.GRU(6, 7), nn.Linear(7, 5)

        def forward(self, ids):
            return self.head(self.rnn(self.emb(ids))[0][-1])

    found = eligible_layers(Sequences(), torch.randint(9, (11, 4)), batch_size=4)
    assert found.row("emb").batch_dims == (1,)
    assert found.row("rnn").batch_dims == (1, 1)
    assert found.default == ["emb", "rnn"]


@pytest.mark.parametrize("entries", [7, N])
def test_a_codebook_beside_the_state_is_not_mixed(entries):
    class Quantizer(nn.Module):
        def __init__(self):
            super().__init__()
            self.codes = nn.Parameter(torch.randn(entries, 6))

        def forward(self, h):
            return h, self.codes * 2

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.enc, self.quantizer, self.head = mlp(8, 6, 6), Quantizer(), mlp(6, 6, 5)

        def forward(self, x):
            h, codes = self.quantizer(self.enc(x))
            return self.head(h + 0 * codes.mean())

    found = eligible_layers(Net(), torch.randn(N, 8))
    assert found.row("quantizer").eligible
    assert found.row("quantizer").batch_dims == (0, None)

    class Step(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net().double()

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    module, batches = Step(), DataLoader(TensorDataset(torch.randn(N, 8).double(), torch.arange(N) % 5), N)
    seen, _ = train(module, batches, ManifoldMixupCallback(layers=["net.quantizer"], seed=0))

    def step(twin, batch, choose, mix):
        h, codes = twin.net.quantizer(twin.net.enc(batch[0]))
        return F.cross_entropy(twin.net.head(mix(h) + 0 * codes.mean()), choose(batch[1]))

    for (draw, weights, value, grads), batch in zip(seen, batches, strict=True):
        wanted, wanted_grads = by_hand(module, step, batch, draw, weights)
        torch.testing.assert_close(value, wanted)
        for name, grad in wanted_grads.items():
            torch.testing.assert_close(grads[name], grad)


def test_a_network_called_on_unlabelled_rows_too():
    net, x, y, u = mlp(8, 16, 16, 5), torch.randn(8, 8), torch.arange(8) % 5, torch.randn(24, 8)

    def step():
        p = net(u)
        return F.cross_entropy(net(x), y) - 0.1 * (p.softmax(1) * p.log_softmax(1)).sum(1).mean()

    found = report(net, step, [x, u], y, batch_size=8)
    assert found.default == ["input"]
    assert found.row("1").verdict is Verdict.CALLED_ON_OTHERS
    assert found.refusal("1").startswith(
        "'1' is also called on other rows than those of the targets (unlabelled data, say), which have no labels to"
        " mix; the targets have 8 rows."
    )


def test_groups_of_samples_pass_in_turn():
    net, x, y = mlp(8, 16, 16, 5), torch.randn(11, 8), torch.arange(11) % 5
    step = lambda: F.cross_entropy(net(x[:6]), y[:6]) + F.cross_entropy(net(x[6:]), y[6:])  # noqa: E731
    found = report(net, step, [x[:6], x[6:]], y, batch_size=[6, 5])
    assert found.eligible == ["input", "0", "1", "2", "3"]
    assert report(net, step, [x[:6], x[6:]], y, batch_size=[5, 6]).eligible == ["input"]


class FiLM(nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.emb, self.h = mlp(8, 16, 16), nn.Embedding(5, 16), mlp(16, 16, 1)

    def forward(self, x, y):
        return self.h(self.f(x) * self.emb(y))


def test_labels_that_are_an_input_are_not_the_end_of_the_network():
    net, x, y = FiLM(), torch.randn(6, 8), torch.arange(6) % 5
    found = report(net, lambda: net(x, y).mean(), x, y)
    assert found.eligible == ["input", "f", "f.0", "f.1", "f.2", "h.0", "h.1"]
    assert found.row("h").verdict is Verdict.FINAL
    found = report(net, lambda: F.cross_entropy(net(x, y).expand(-1, 5), y), x, y)
    assert found.row("f").eligible


# ------------------------------------------------------------------------------------------------------------ graphs


class GraphNet(nn.Module):
    def __init__(self, pool=True):
        super().__init__()
        self.one, self.two = GCNConv(6, 12), GCNConv(12, 12)
        self.head = mlp(12, 12, 4)
        self.pool = pool

    def forward(self, data):
        h = self.two(self.one(data.x, data.edge_index).relu(), data.edge_index).relu()
        return self.head(global_mean_pool(h, data.batch) if self.pool else h)


def graphs(n=5, nodes=7):
    return Batch.from_data_list(
        [
            Data(x=torch.randn(nodes, 6), edge_index=torch.randint(nodes, (2, 15)), y=torch.tensor([i % 4]))
            for i in range(n)
        ]
    )


def test_whole_graphs_are_mixed_after_pooling():
    found = eligible_layers(GraphNet(), graphs())
    assert found.default == ["head.0"]
    assert found.eligible == ["head.0", "head.1"]
    assert found.row("one").verdict is Verdict.OTHER_ROWS


def test_nodes_are_mixed_after_the_last_edge():
    data = Data(x=torch.randn(20, 6), edge_index=torch.randint(20, (2, 50)))
    net, y = GraphNet(pool=False), torch.arange(20) % 4
    found = report(net, lambda: F.cross_entropy(net(data), y), [data.x, data.edge_index], y, batch_size=20)
    assert found.row("input").verdict is Verdict.ROWS_EXCHANGED
    assert found.row("one").verdict is Verdict.ROWS_EXCHANGED
    assert found.eligible == ["two", "two.aggr_module", "head.0", "head.1"]
    assert found.refusal("one").startswith("'one' is followed by an operation that moves rows to each other by indices")


def test_a_reordering_by_length_is_no_exchange():
    class Sorted(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.rnn, self.head = nn.Linear(3, 6), nn.GRU(6, 7, batch_first=True), mlp(7, 7, 5)

        def forward(self, x, lengths):
            packed = nn.utils.rnn.pack_padded_sequence(self.emb(x), lengths, batch_first=True, enforce_sorted=False)
            return self.head(self.rnn(packed)[1][-1])

    found = eligible_layers(Sorted(), torch.randn(4, 6, 3), torch.tensor([2, 6, 3, 5]))
    assert found.row("emb").eligible
    assert found.row("rnn").verdict is Verdict.OTHER_ROWS  # of the packed sequence
    assert found.row("head.1").eligible


# -------------------------------------------------------------------------------------------------- example batches


def text():
    ids = torch.randint(1, 30, (4, 9))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 1, 0])}


@pytest.fixture
def bert():
    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def test_a_batch_of_named_entries(bert):
    batch = text()
    found = eligible_layers(bert, batch)
    assert found.default == ["bert.embeddings", "bert.encoder.layer.0"]
    assert found.default == eligible_layers(bert, batch["input_ids"], batch["attention_mask"]).default
    assert eligible_layers(bert, {**batch, "sample_id": 3}).default == found.default

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = bert

        def forward(self, **inputs):
            return self.model(**inputs).logits

    assert eligible_layers(Wrapper(), batch).default == [f"model.{name}" for name in found.default]


def test_a_network_that_takes_the_batch_as_it_is():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp(8, 8, 8, 5)

        def forward(self, batch):
            return self.net(batch["x"])

    assert eligible_layers(Net(), {"x": torch.randn(4, 8)}).default == ["input", "net.1"]


class StepOnly(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5)
        )
        self.accuracy = Accuracy(task="multiclass", num_classes=5)
        self.outputs = []

    def training_step(self, batch, batch_idx):
        logits = self.net(batch["image"])
        self.accuracy(logits, batch["label"])
        self.log("accuracy", self.accuracy)
        self.outputs.append(batch_idx)
        return F.cross_entropy(logits, batch["label"])


def test_a_module_that_has_a_training_step_only():
    module, batch = StepOnly(), {"image": torch.randn(6, 8), "label": torch.arange(6) % 5}
    before, state = weights_of(module), torch.get_rng_state()
    found = eligible_layers(module, batch)
    assert found.default == ["input", "net.2"]
    assert found.batch_size == 6
    assert module.outputs == []
    assert module.accuracy.update_count == 0
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(ValueError, match="Set `target_key`"):
        eligible_layers(module, (batch["image"], batch["label"], batch["label"]))


@pytest.mark.parametrize(
    "step",
    [
        lambda self, batch: self.loss(batch),
        lambda self, batch, i: self.loss(batch),
        lambda self, batch, batch_idx=0, optimizer=None: self.loss(batch),
    ],
    ids=["one", "two", "more"],
)
def test_arguments_of_a_training_step(step):
    class Step(StepOnly):
        training_step = step

        def loss(self, batch):
            return F.cross_entropy(self.net(batch["image"]), batch["label"])

    batch = {"image": torch.randn(6, 8), "label": torch.arange(6) % 5}
    assert eligible_layers(Step(), batch).default == ["input", "net.2"]


def test_dims_of_a_packed_output():
    rnn = nn.LSTM(3, 4, batch_first=True)
    assert sample_dims([(13, 4), (1, 5, 4), (1, 5, 4)], n=5, module=rnn) == (None, 1, 1)
    assert sample_dims([(5, 5, 4), (1, 5, 4), (1, 5, 4)], n=5, module=rnn) == (0, 1, 1)
