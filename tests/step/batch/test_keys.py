"""Where inputs, targets and masks are found in a batch; and each refusal, with what it tells the user to set."""

import collections
import copy
import pickle
import timeit

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from lightning_manifold_mixup._step.batch import tree as batches
from lightning_manifold_mixup._step.batch.keys import Keys
from lightning_manifold_mixup._step.batch.names import attention_masks, label_candidates, marks_padding, never_a_label
from tests.graphs import Batch, Data, HeteroData

N = 4
X, V, Y, Z = torch.randn(N, 3), torch.randn(N, 5), torch.arange(N), torch.arange(N) + 1
F = torch.rand(N)
IMAGE, MASK = torch.randn(N, 3, 6, 6), torch.zeros(N, 6, 6).long()
IDS = torch.ones(N, 7).long()
Named = collections.namedtuple("Named", "a b")


def graph():
    return Data(x=torch.randn(5, 6), edge_index=torch.randint(0, 5, (2, 12)), y=torch.tensor([1]))


@pytest.mark.parametrize(
    ("batch", "inputs", "targets"),
    [
        ((X, Y), (0,), (1,)),
        ([X, F], (0,), (1,)),
        ([(X, V), Y], (0,), (1,)),
        (Named(X, Y), ("a",), ("b",)),
        ({"image": X, "label": Y}, ("image",), ("label",)),
        ({"pixels": X, "label": Y}, ("pixels",), ("label",)),
        ({"image": X, "grade": Y}, ("image",), ("grade",)),
        ({"image": X, "label": Y, "id": Z, "label_mask": Z}, ("image",), ("label",)),
        ({"image": IMAGE, "mask": MASK}, ("image",), ("mask",)),
        ({"input_ids": IDS, "attention_mask": IDS, "labels": Y}, ("input_ids",), ("labels",)),
        ({"x": X, "y": {"a": Y, "b": F}}, ("x",), ("y",)),
        (({"input_ids": IDS, "attention_mask": IDS}, {"labels": Y}), (0,), (1,)),
        (((IMAGE, V), (F, Y)), (0,), (1,)),
        ({"image": X, "gt": Y, "id": Z, "path": ["a"] * N}, ("image",), ("gt",)),
        ({"image": X, "class_id": Y}, ("image",), ("class_id",)),
        ({"image": X, "category_idx": Y, "index": Z}, ("image",), ("category_idx",)),
        ({"image": IMAGE, "mask_labels": MASK}, ("image",), ("mask_labels",)),
        ({"image": IMAGE, "mask": MASK, "valid_mask": MASK > 0}, ("image",), ("mask",)),
        ({"input_ids": IDS, "token_type_ids": IDS, "attention_mask": IDS, "intent": Y}, ("input_ids",), ("intent",)),
        ({"input_ids": IDS, "labels": IDS, "decoder_input_ids": IDS}, ("input_ids",), ("labels", "decoder_input_ids")),
        ((X, Y, ["a.png"] * N), (0,), (1,)),
        ((X, Y, {"id": Z}), (0,), (1,)),
        ([[X[:2], X, X, X[1:]], Y], (0,), (1,)),
        (Batch.from_data_list([graph() for _ in range(N)]), ("x",), ("y",)),
    ],
    ids=lambda value: None,
)
def test_found_by_itself(batch, inputs, targets):
    places = Keys().locate(batch)
    assert places.targets == targets
    assert places.inputs == inputs
    assert places.samples(batch) == N
    assert len(places.groups) == 1


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((X, Y, Z), r"none is known to be it. Set `target_key` to its index or name, .*list.*`target_key=\[1, 2\]`"),
        ({"label": Y, "target": Z, "x": X}, r"\['label', 'target'\] all could be it.*target_key=\['label', 'target'\]"),
        ({"image": X, "grade": Y, "color": Z}, r"none is known.*`target_key=\['grade', 'color'\]`"),
        ({"input_ids": IDS, "attention_mask": IDS}, r"labels are made from the input .*batch\['labels'\]"),
        ({"input_ids": IDS, "token_type_ids": IDS, "attention_mask": IDS}, "labels are made from the input"),
        ({"x": X, "mask": IDS}, r"none is known.*\(here maybe 'mask'\)"),
        ({"x": X, "lengths": Y}, "none is known"),
        ({"x": X, "sample_weight": F}, "none is known"),
        ({"image": X, "intent_id": Y}, r"none is known.*\(here maybe 'intent_id'\)"),
        ((Z, (X, Y)), r"such a pair at 1, beside int64 tensor \(4,\). Set `input_key='1.0', target_key='1.1'`"),
        (((X, Y), ["a"] * N), "Set `input_key='0.0', target_key='0.1'`"),
        ([(x, y) for x, y in zip(X, Y, strict=True)], "got 4 samples in a list. Stack them in the collate function"),
        ([{"x": x, "y": int(y)} for x, y in zip(X, Y, strict=True)], "got 4 samples in a list. Stack them"),
        ((X, list(Y)), r"at 1, got 4 tensors with one number each. Make `torch.stack\(labels\)`"),
        ({"user_id": Y, "item_id": Z, "rating": F}, r"none is known.*\(here maybe 'rating'\)"),
        ({"l": (X, Y), "u": torch.randn(9, 3)}, "Set `input_key='l.0', target_key='l.1'`."),
        (X, "got one tensor. The target is the network's input as well"),
        ((Y, IMAGE), r"the two may be swapped. Set `input_key=1, target_key=0` if they are"),
        ([X], "got one tensor. The target is the network's input as well"),
        ([[X, Y], [V, Z]], r"several dataloaders.*input_key=\['0.0', '1.0'\], target_key=\['0.1', '1.1'\]"),
        ({"a": [X, Y], "b": [V, Z]}, r"input_key=\['a.0', 'b.0'\], target_key=\['a.1', 'b.1'\]`: each pair"),
        ([[X, Y], [V, Z], [V, Z]], r"target_key=\['0.1', '1.1', '2.1'\]"),
        ([[X, X], [V, V]], r"several dataloaders.*If the first is the input.*`input_key=0, target_key=1`"),
        ({"l": [X, Y], "u": [torch.randn(9, 3)]}, "Set `input_key='l.0', target_key='l.1'`."),
        ([[X, Y], [torch.randn(9, 3)]], "Set `input_key='0.0', target_key='0.1'`."),
        ([{"image": X, "label": Y}, {"image": X, "label": Y}], r"target_key=\['0.label', '1.label'\]"),
        ((IMAGE, torch.rand(9, 6)), "each of the 4 samples, got 9 rows at 1. .*boxes of YOLO"),
        ((X, torch.arange(9)), "each of the 4 samples, got 9 rows at 1. .*words of CTC"),
    ],
    ids=lambda value: None,
)
def test_refused_with_what_to_set(batch, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        Keys().locate(batch)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([0, 1, 2, 3], r"got a list of 4 int at 1. Make `torch.tensor\(labels\)` of them in the collate function"),
        (["cat", "dog"], "got a list of 2 str at 1. Make numbers for them"),
        (Y.numpy(), r"got a ndarray at 1. Make `torch.tensor\(labels\)`"),
        ([{"boxes": X}, {"boxes": X}], "a list with a dict for each image at 1: targets of object detection"),
        (nn.utils.rnn.pack_sequence([X, X[:2]]), "a packed sequence at 1: its rows are the time steps of all samples"),
        (None, "got NoneType without such a tensor"),
    ],
)
def test_targets_that_are_no_tensors(value, message):
    with pytest.raises(TypeError, match=message):
        Keys().locate((X, value))


def test_targets_of_different_lengths():
    with pytest.raises(ValueError, match=r"(?s)one number of samples.*got shapes \(4,\), \(3,\)"):
        Keys(target_key=[1, 2]).locate((X, Y, Y[:3]))
    with pytest.raises(ValueError, match=r"one number of samples in dimension 0 at 1, got shapes \(\)"):
        Keys().locate((X, torch.tensor(1.0)))


@pytest.mark.parametrize("make", [list, tuple, OmegaConf.create])
def test_several_keys_of_any_sequence(make):
    keys = Keys(input_key=make([0]), target_key=make([1, 2]))
    places = keys.locate((X, Y, Z))
    assert (places.inputs, places.targets) == ((0,), (1, 2))
    assert [value is part for value, part in zip(places.targets_of((X, Y, Z)), (Y, Z), strict=True)] == [True, True]


@pytest.mark.parametrize("wrong", [[], 1.5, True, [None], {"a"}, [1, "1"]])
def test_no_keys(wrong):
    with pytest.raises(TypeError, match=r"`target_key`.*got"):
        Keys(target_key=wrong)


def test_near_misses():
    with pytest.raises(
        ValueError, match=r"`target_key='labels'` is not in the batch: no 'labels' there. Did you mean label"
    ):
        Keys(target_key="labels").locate({"image": X, "label": Y})
    with pytest.raises(ValueError, match="`mask_key='mask'` is not in the batch"):
        Keys(mask_key="mask").locate((X, Y))


def test_other_floats_may_be_inputs():
    batch = {"image": X, "meta": V, "label": Y, "sample_weight": F, "pad_mask": V}
    places = Keys().locate(batch)
    with pytest.raises(ValueError, match=r"one floating point input, got 'image', 'meta'. Set `input_key='image'`.*"):
        places.require_inputs()
    assert Keys(input_key="image").locate(batch).require_inputs() == ["image"]
    assert Keys(input_key=["image", "meta"]).locate(batch).require_inputs() == ["image", "meta"]
    assert Keys(target_key=["label", "meta"]).locate(batch).require_inputs() == ["image"]


def test_numbers_of_samples_are_no_input():
    assert Keys(target_key=1).locate((X, Y, F)).inputs == (0,)
    assert Keys(target_key=2).locate((Z, X, Y)).inputs == (1,)


def test_inputs_are_asked_for_lazily():
    places = Keys(target_key=2).locate((IDS, V, Y))
    assert places.inputs == ()
    with pytest.raises(ValueError, match="Expected to find the input in the batch, but none is known to be it"):
        places.require_inputs()


def test_packed_inputs():
    places = Keys().locate((nn.utils.rnn.pack_sequence([X, X[:2], X[:2], X[:1]]), Y))
    with pytest.raises(ValueError, match=r"'input' is in S, but the input at 0 is a packed sequence.*Take 'input' out"):
        places.require_inputs()


def test_identities_are_inputs_beside_a_target():
    assert Keys(target_key="rating").locate({"user_id": Y, "item_id": Z, "rating": F}).targets == ("rating",)


def test_a_target_that_is_the_input():
    with pytest.raises(ValueError, match=r"an input beside the target 0.*let the dataset return \(x, x\)"):
        Keys(target_key=0).locate([X])
    with pytest.raises(ValueError, match="an input beside the target 'input_ids'"):
        Keys(target_key="input_ids").locate({"input_ids": IDS, "attention_mask": IDS})
    with pytest.raises(ValueError, match="an input beside the target 'x'"):
        Keys(target_key="x").locate({"x": X, "label": Y})
    assert Keys(0, 0).locate([X]).shared == [0]  # the user says so: right for input mixup
    assert Keys().locate((X, X)).shared == []


def test_several_loaders():
    batch = [(X, Y), (V[:3], Z[:3])]
    for keys in (Keys(["0.0", "1.0"], ["0.1", "1.1"]), Keys(target_key=["0.1", "1.1"])):
        places = keys.locate(batch)
        assert [(group.inputs, group.targets) for group in places.groups] == [
            (("0.0",), ("0.1",)), (("1.0",), ("1.1",)),
        ]  # fmt: skip
        assert [places.samples(batch, group) for group in (0, 1)] == [4, 3]
        assert places.require_inputs() == ["0.0", "1.0"]
        new = places.replace(batch, {"0.1": "a", "1.1": "b", "1.0": "c"})
        assert [new[0][0] is X, new[0][1], new[1]] == [True, "a", ("c", "b")]
        assert batch[1][1] is not "b"  # noqa: F632
    texts = {"a": {"input_ids": IDS, "attention_mask": IDS, "labels": Y}, "b": {"input_ids": IDS, "labels": Y}}
    assert [group.masks for group in Keys(target_key=["a.labels", "b.labels"]).locate(texts).groups] == [
        ("a.attention_mask",), (),
    ]  # fmt: skip
    unlabelled = {"l": (X, Y), "u": (torch.randn(9, 3),)}
    places = Keys("l.0", "l.1").locate(unlabelled)
    assert (len(places.groups), places.samples(unlabelled)) == (1, 4)


def test_a_loader_that_has_come_to_its_end():
    """`CombinedLoader(mode="max_size")` puts None in its place."""
    keys = Keys(["a.0", "b.0"], ["a.1", "b.1"])
    assert keys.locate({"a": (X, Y), "b": (V, Z)}).targets == ("a.1", "b.1")
    places = keys.locate({"a": (X, Y), "b": None})
    assert (places.inputs, places.targets, len(places.groups)) == (("a.0",), ("a.1",), 1)
    with pytest.raises(ValueError, match=r"`target_key='a\.1'` is not in the batch"):
        keys.locate({"a": None, "b": None})


def test_targets_in_one_part_are_one_group():
    batch = {"x": X, "targets": {"a": Y, "b": Z}}
    assert len(Keys(target_key=["targets.a", "targets.b"]).locate(batch).groups) == 1


def test_attention_masks():
    batch = {"input_ids": IDS, "attention_mask": IDS, "labels": Y}
    assert Keys().locate(batch).masks == ("attention_mask",)
    assert Keys().locate(({"input_ids": IDS, "attention_mask": IDS}, Y)).masks == ("0.attention_mask",)
    assert Keys(mask_key="pad").locate({"x": X, "pad": IDS, "label": Y}).masks == ("pad",)
    assert attention_masks({"attention_mask": IDS[:2]}, N) == []
    assert attention_masks({"pixel_mask": MASK, "decoder_attention_mask": IDS, "loss_mask": IDS}, N) == ["pixel_mask"]
    assert marks_padding("key_padding_mask")
    assert not marks_padding("attention_mask")


def test_rows_that_are_trained_on():
    train = torch.tensor([True, False, True, True])
    batch = {"x": X, "y": Y, "train_mask": train, "val_mask": ~train}
    places = Keys().locate(batch)
    assert places.rows_of(batch) is train
    assert Keys().locate((X, Y)).rows_of((X, Y)) is None
    sampled = Data(x=torch.randn(6, 3), y=torch.arange(6), edge_index=torch.zeros(2, 3).long(), n_id=torch.arange(6))
    sampled.batch_size = 2
    assert Keys().locate(sampled).rows_of(sampled).tolist() == [True, True, False, False, False, False]


def test_graphs():
    nodes = HeteroData()
    nodes["paper"].x, nodes["paper"].y = X, Y
    nodes["paper", "cites", "paper"].edge_index = torch.zeros(2, 3).long()
    with pytest.raises(ValueError, match=r"here maybe 'paper.y'"):
        Keys().locate(nodes)
    places = Keys(target_key="paper.y").locate(nodes)
    new = places.replace(nodes, {"paper.y": Z})
    assert type(new) is HeteroData
    assert new["paper"].y is Z
    assert nodes["paper"].y is Y
    edges = Data(x=X, y=torch.arange(9), edge_index=torch.zeros(2, 9).long())
    assert Keys().locate(edges).samples(edges) == 9


@pytest.mark.parametrize(
    ("x", "y", "batch_dim", "dim", "n"),
    [
        (torch.zeros(7, N, 3), torch.zeros(7, N).long(), 1, 1, N),
        (torch.zeros(7, N, 3), Y, 1, 0, N),
        (torch.zeros(7, N, 3), torch.zeros(N, 5), 1, 0, N),
        (torch.zeros(N, 7, 3), torch.zeros(N, 7).long(), None, 0, N),
    ],
)
def test_time_major_targets(x, y, batch_dim, dim, n):
    places = Keys().locate((x, y), batch_dim)
    assert (places.target_dim, places.samples((x, y))) == (dim, n)


def test_label_candidates():
    batch = {
        "image": X, "view": X + 1, "label": Y, "mask": MASK, "loss_mask": IDS, "id": Z, "lengths": Z, "score": F,
        "label_lengths": Z, "edge_index": Y, "epoch": torch.tensor(3), "rest": torch.zeros(9), "user_id": Y,
        "aux": [Y, {"soft": V}],
    }  # fmt: skip
    assert label_candidates(batch, N, ["image"]) == ["label", "mask", "score", "aux.0", "aux.1.soft"]
    assert not never_a_label("label_ids")


def test_found_once_for_batches_built_alike():
    keys = Keys()
    places = keys.locate((X, Y))
    assert keys.locate((X[:2], Y[:2])) is places
    assert keys.locate([X, Y]) is not places
    assert keys.locate((X, F)) is not places
    again = pickle.loads(pickle.dumps(copy.deepcopy(keys)))
    assert again.locate((X, Y)).targets == (1,)


def test_structure_ignores_sizes_and_entries_for_each_sample():
    build = lambda n: (torch.zeros(n, 2), {"names": ["a"] * n, "boxes": [{"b": torch.zeros(k, 4)} for k in range(n)]})  # noqa: E731
    assert batches.structure(build(9)) == batches.structure(build(6))
    assert batches.structure((X, Y)) != batches.structure((X, X, Y))


def test_places_are_fast():
    batch = (X, Y)
    places = Keys().locate(batch)
    seconds = min(timeit.repeat(lambda: places.targets_of(batch), number=2000, repeat=5)) / 2000
    by_hand = min(timeit.repeat(lambda: [batch[1]], number=2000, repeat=5)) / 2000
    assert seconds < by_hand + 2e-6
