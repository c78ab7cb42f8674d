import collections
import dataclasses

import pytest
import torch
from monai.data import MetaTensor
from omegaconf import OmegaConf
from transformers import BatchEncoding
from transformers.utils import ModelOutput

from lightning_manifold_mixup import draw_mix
from lightning_manifold_mixup._step.batch.finding import find_input, find_target
from lightning_manifold_mixup._step.batch.tree import describe, get, leaves, replaced, structure, tensors, without
from tests.graphs import Batch, Data, HeteroData, TensorDict, tensorclass

Named = collections.namedtuple("Named", "a b")
X, Y = torch.zeros(2, 3), torch.zeros(2).long()


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    label: torch.Tensor


class Plain:
    def __init__(self):
        self.image, self.target = X, Y


class Mapping(collections.UserDict):
    pass


BATCHES = [
    (X, Y), [X, Y], Named(X, Y), Frozen(X, Y), Plain(), {"x": X, "y": Y}, Mapping(inputs=X, labels=Y),
    {"Image": X, "LABEL": Y}, {"pixels": X, "label": Y},
]  # fmt: skip


@pytest.mark.parametrize("batch", BATCHES, ids=lambda b: type(b).__name__)
def test_find_get_and_replace(batch):
    keys = find_input(batch), find_target(batch)
    assert get(batch, keys[0]) is X
    assert get(batch, keys[1]) is Y
    new = replaced(batch, keys[0], "other")
    assert type(new) is type(batch)
    assert get(new, keys[0]) == "other"
    assert get(new, keys[1]) is Y
    assert get(batch, keys[0]) is X  # as it was


def test_nested_keys():
    batch = {"labelled": (X, Y), "rest": [X]}
    assert get(batch, "labelled.1") is Y
    new = replaced(batch, "labelled.1", 7)
    assert new == {"labelled": (X, 7), "rest": [X]}
    assert batch["labelled"][1] is Y


def test_index_into_a_named_tuple():
    assert get(Named(X, Y), 1) is Y
    assert replaced(Named(X, Y), 1, 5).b == 5


@pytest.mark.parametrize(
    ("batch", "role", "key", "match"),
    [
        ({"image": X, "label": Y}, "target", "labels", "`target_key='labels'` is not in the batch.*Did you mean label"),
        ((X, Y), "input", 5, "`input_key=5` is not in the batch: no 5 there. Did you mean 0 or 1"),
        ({"a": (X, Y)}, "target", "a.2", "no 2 there"),
    ],
)
def test_errors_show_the_batch(batch, role, key, match):
    with pytest.raises(ValueError, match=match) as error:
        get(batch, key, role)
    assert "float32 tensor (2, 3)" in str(error.value) or "int64 tensor (2,)" in str(error.value)


def test_tensors():
    batch = {"a": [X, "text", 3], "b": Frozen(X, Y)}
    assert [t is X for t in tensors(batch)] == [True, True, False]
    assert list(without((X, Y), [1])) == [X]
    assert list(without(((X, Y), X), [1, "0.1"])) == [X]  # an autoencoder's


def test_describe_nested():
    text = describe({"image": X, "meta": [{"id": 3}, None]})
    assert text.splitlines() == [
        "  'image': float32 tensor (2, 3)",
        "  'meta': list of 2",
        "    0: dict of 1",
        "      'id': int",
        "    1: NoneType",
    ]


@tensorclass
class Sample:
    x: torch.Tensor
    y: torch.Tensor
    name: str


class Slots:
    __slots__ = ("x", "y")

    def __init__(self):
        self.x, self.y = X, Y


@dataclasses.dataclass
class Output(ModelOutput):
    x: torch.Tensor = None
    y: torch.Tensor = None
    hidden_states: tuple = None


def hetero():
    data = HeteroData()
    data["paper"].x, data["paper"].y = X, Y
    data["paper", "cites", "paper"].edge_index = torch.zeros(2, 3).long()
    return data


def graph():
    return Data(x=X, edge_index=torch.zeros(2, 3).long(), y=torch.tensor([1]))


OTHERS = {
    "graphs": (Batch.from_data_list([graph(), graph()]), "y"),
    "graph": (Data(x=X, y=Y), "y"),
    "heterogeneous graph": (hetero(), "paper.y"),
    "heterogeneous graphs": (Batch.from_data_list([hetero(), hetero()]), "paper.y"),
    "TensorDict": (TensorDict({"x": X, "y": Y}, batch_size=[2]), "y"),
    "nested TensorDict": (TensorDict({"x": X, "n": {"y": Y}}, batch_size=[2]), "n.y"),
    "locked TensorDict": (TensorDict({"x": X, "y": Y}, batch_size=[2]).lock_(), "y"),
    "tensorclass": (Sample(x=X, y=Y, name="text", batch_size=[2]), "y"),
    "slots": (Slots(), "y"),
    "BatchEncoding": (BatchEncoding({"x": X, "y": Y}), "y"),
    "ModelOutput": (Output(x=X, y=Y), "y"),
    "DictConfig": (OmegaConf.create({"x": X, "y": Y}, flags={"allow_objects": True}), "y"),
    "MetaTensor": ((MetaTensor(X), MetaTensor(Y)), "1"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_batches_of_other_packages(kind):
    batch, key = OTHERS[kind]
    labels = get(batch, key)
    before = [(where, leaf.clone()) for where, leaf in leaves(batch)]
    mixed = draw_mix(len(labels), 1.0).target(labels)
    new = replaced(batch, key, mixed)
    assert type(new) is type(batch)
    assert get(new, key) is mixed
    after = leaves(batch)
    assert [where for where, _ in after] == [where for where, _ in before]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(after, before, strict=True))
    assert get(batch, key) is labels
    assert key in [str(where) for where, _ in leaves(new)]
    assert structure(batch) == structure(replaced(batch, key, labels))
    assert f"int64 tensor {tuple(labels.shape)}" in describe(batch)


def test_an_object_that_refers_to_itself():
    batch = Plain()
    batch.batch = batch
    assert [key for key, _ in leaves(batch)] == ["image", "target"]
    assert "'target': int64 tensor (2,)" in describe(batch)
    assert structure(batch) == structure(batch)
