import collections
import dataclasses

import pytest
import torch

from lightning_manifold_mixup._step.batch import describe, find, get, replaced, tensors, without

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
    keys = find(batch, "input", None), find(batch, "target", None)
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
        ((X, Y, Y), "target", None, "none is known to be it. Set `target_key` to its index or name"),
        ({"label": Y, "target": Y}, "target", None, r"\['label', 'target'\] all could be it"),
        ({"image": X, "label": Y}, "target", "labels", "`target_key='labels'` is not in the batch.*Did you mean label"),
        ((X, Y), "input", 5, "`input_key=5` is not in the batch: no 5 there. Did you mean 0 or 1"),
        ({"a": (X, Y)}, "target", "a.2", "no 2 there"),
    ],
)
def test_errors_show_the_batch(batch, role, key, match):
    with pytest.raises(ValueError, match=match) as error:
        find(batch, role, key)
    assert "float32 tensor (2, 3)" in str(error.value) or "int64 tensor (2,)" in str(error.value)


def test_tensors():
    batch = {"a": [X, "text", 3], "b": Frozen(X, Y)}
    assert [t is X for t in tensors(batch)] == [True, True, False]
    assert list(without((X, Y), [1])) == [X]


def test_describe_nested():
    text = describe({"image": X, "meta": [{"id": 3}, None]})
    assert text.splitlines() == [
        "  'image': float32 tensor (2, 3)",
        "  'meta': list of 2",
        "    0: dict of 1",
        "      'id': int",
        "    1: NoneType",
    ]
