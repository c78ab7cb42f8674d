"""Labelled sentences from files, and the networks on them: padding changes nothing, mixing is exact."""

import csv
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sklearn.feature_extraction.text import CountVectorizer

from lightning_manifold_mixup import ManifoldMixupModule, Mix, eligible_layers, mixing
from lightning_manifold_mixup.paper.data import TextDataModule
from lightning_manifold_mixup.paper.data.text import Vocabulary, read_labelled_text
from lightning_manifold_mixup.paper.data.word_vectors import word_vectors
from lightning_manifold_mixup.paper.models import TextConvNet, TextLSTM
from tests.helpers import trainer as make_trainer

NETWORKS = [TextConvNet, TextLSTM]
SENTENCES = ["Who was Galileo ?", "how far is it , in miles ?", "Name a city .", "who ?"]
LABELS = ["HUM", "NUM", "LOC", "HUM"]


@pytest.fixture
def lines(tmp_path: Path) -> str:
    """Forty sentences as lines, ten of each of the four above with a number."""
    file = tmp_path / "questions.txt"
    pairs = [f"{label} {text} {i}" for i in range(10) for label, text in zip(LABELS, SENTENCES, strict=True)]
    file.write_text("\n".join(pairs) + "\n", encoding="utf-8")
    return str(file)


class TestFiles:
    @pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".tsv", "\t")])
    def test_tables_with_quotes(self, tmp_path: Path, suffix: str, delimiter: str) -> None:
        file = tmp_path / f"table{suffix}"
        texts = ['said "no", twice', "two\nlines", "tab\there"]
        with file.open("w", newline="", encoding="utf-8") as out:
            writer = csv.writer(out, delimiter=delimiter)
            writer.writerow(["id", "body", "kind"])
            writer.writerows([i, text, i % 2] for i, text in enumerate(texts))
        assert read_labelled_text(file, text_column="body", label_column="kind") == (texts, ["0", "1", "0"])
        with pytest.raises(ValueError, match=r"column 'text'.*got \['id', 'body', 'kind'\]: set text_column"):
            read_labelled_text(file)

    def test_lines(self, tmp_path: Path) -> None:
        file = tmp_path / "lines"
        # one with a label alone, an empty one, and a character that str.splitlines takes for the end of a line
        file.write_bytes("1 one  two \n0\n\n0 a\x85b\n".encode("latin-1"))
        assert read_labelled_text(file, encoding="latin-1") == (["one  two", "", "a\x85b"], ["1", "0", "0"])
        with pytest.raises(ValueError, match=r"to be utf-8, got the byte 0x85: set encoding"):
            read_labelled_text(file)
        with pytest.raises(FileNotFoundError, match=r"file of labelled texts at .*nowhere"):
            read_labelled_text(tmp_path / "nowhere")

    def test_a_row_without_a_label(self, tmp_path: Path) -> None:
        file = tmp_path / "table.csv"
        file.write_text("text,label\nfine,1\nbad,\n")
        with pytest.raises(ValueError, match="text and label in row 2"):
            read_labelled_text(file)


class TestVocabulary:
    def test_against_counts_by_hand(self) -> None:
        words = Vocabulary(SENTENCES, min_count=2)
        split = [set(text.lower().split()) for text in SENTENCES]
        frequent = sorted(w for w in set().union(*split) if sum(w in s for s in split) >= 2)
        assert len(words) == len(frequent) + 2
        expected = [frequent.index(w) + 2 if w in frequent else 1 for w in ["who", "is", "?"]]
        assert words.encode("WHO is ?").tolist() == expected
        assert words.encode("").tolist() == [1]


class TestDataModule:
    def test_splits_are_disjoint_and_the_vocabulary_is_that_of_the_training(self, lines: str) -> None:
        data = TextDataModule(lines, test_size=8, val_size=8, train_size=0.5, seed=3)
        assert [len(part) for part in (data.train_set, data.val_set, data.test_set)] == [12, 8, 8]
        indices = [data.indices(split) for split in ("train", "val", "test")]
        assert len(set().union(*indices)) == 28
        texts, names = read_labelled_text(lines)
        for part in indices:
            assert {names[i] for i in part} == set(data.class_names)
        seen = CountVectorizer(token_pattern=r"\S+").fit([texts[i] for i in indices[0]])
        assert data.vocabulary_size == len(seen.vocabulary_) + 2
        assert data.class_names == ("HUM", "LOC", "NUM")

    def test_word_vectors_are_made_of_all_that_is_not_held_out(self, lines: str) -> None:
        data = TextDataModule(lines, test_size=8, val_size=8, train_size=0.5, vectors_dim=4, seed=3)
        plain = TextDataModule(lines, test_size=8, val_size=8, train_size=0.5, seed=3)
        assert plain.word_vectors is None
        for split in ("train", "val", "test"):
            assert data.indices(split) == plain.indices(split)
        held_out = {*data.indices("val"), *data.indices("test")}
        texts, _ = read_labelled_text(lines)
        known = [text for i, text in enumerate(texts) if i not in held_out]
        words = Vocabulary(known)
        assert data.vocabulary_size == len(words) > plain.vocabulary_size
        expected = word_vectors([words.encode(text) for text in known], len(words), 4)
        vectors = data.word_vectors
        assert vectors is not None
        torch.testing.assert_close(vectors, expected)
        assert vectors.norm(dim=1).gt(0.99).sum() == len(words) - 2

    def test_a_batch_is_padded_to_its_longest(self, lines: str) -> None:
        data = TextDataModule(lines, test_size=0.25, batch_size=40, max_length=6)
        tokens, labels = next(iter(data.train_dataloader()))
        assert tokens.shape == (30, 6)
        assert labels.bincount().tolist() == [15, 7, 8] or labels.bincount().tolist() == [15, 8, 7]
        lengths = tokens.ne(0).sum(1)
        assert set(lengths.tolist()) == {3, 5, 6}
        assert all(row[:length].ne(0).all() for row, length in zip(tokens, lengths, strict=True))

    def test_a_test_file_with_other_labels(self, lines: str, tmp_path: Path) -> None:
        other = tmp_path / "other.txt"
        other.write_text("HUM who\nDESC what\n")
        data = TextDataModule(lines, str(other), seed=1)
        assert len(data.train_set) == 40
        with pytest.raises(ValueError, match=r"got \['DESC'\] too"):
            len(data.test_set)


@pytest.mark.parametrize("network", NETWORKS)
class TestNetworks:
    def test_padding_changes_nothing(self, network: type) -> None:
        model = network(30, 4).double().eval()
        rows = [torch.randint(1, 30, (length,)) for length in (1, 2, 3, 7, 9)]
        batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        alone = torch.cat([model(row[None]) for row in rows])
        torch.testing.assert_close(model(F.pad(batch, (0, 5))), alone)

    def test_word_vectors_given_and_random(self, network: type) -> None:
        vectors = torch.randn(30, 5)
        model = network(30, 4, embedding_dim=5, word_vectors=vectors)
        torch.testing.assert_close(model.embedding.weight[1:], vectors[1:])
        assert not model.embedding.weight[0].any()
        assert network(30, 4).embedding.weight.abs().max() <= 0.1
        with pytest.raises(ValueError, match=r"shape \(30, 6\), got \(30, 5\): set embedding_dim"):
            network(30, 4, embedding_dim=6, word_vectors=vectors)

    def test_layers(self, network: type) -> None:
        tokens = torch.randint(1, 30, (7, 9))
        tokens[2, 4:] = 0
        report = eligible_layers(network(30, 4), tokens)
        assert {"embedding", "features"} <= set(report.eligible)

    def test_mixed_at_the_embedding_the_longer_sentence_decides(self, network: type) -> None:
        model = network(30, 4, dropout=0.0).double()
        short, long = torch.randint(1, 30, (1, 3)), torch.randint(1, 30, (1, 8))
        tokens = torch.cat([F.pad(short, (0, 5)), long])
        with mixing(model.embedding, Mix(torch.tensor(0.7, dtype=torch.float64), torch.tensor([1, 0]))):
            mixed = model(F.pad(tokens, (0, 2)))
        vectors = model.embedding(tokens)  # eight words: those of the long one
        by_hand = model.linear(model.features(0.7 * vectors + 0.3 * vectors.flip(0)))
        torch.testing.assert_close(mixed, by_hand)
        gradients = torch.autograd.grad(mixed.square().sum(), list(model.parameters()))
        expected = torch.autograd.grad(by_hand.square().sum(), list(model.parameters()))
        for one, other in zip(gradients, expected, strict=True):
            torch.testing.assert_close(one, other)

    @pytest.mark.parametrize("layers", [["model.embedding"], ["model.features"], "auto"])
    def test_trains_and_learns(self, network: type, lines: str, layers: list[str] | str) -> None:
        data = TextDataModule(lines, test_size=8, batch_size=8)
        model = network(data.vocabulary_size, data.num_classes)
        module = ManifoldMixupModule(
            model, data.num_classes, alpha=1.0, layers=layers, optimizer=lambda p: torch.optim.Adam(p, lr=1e-2)
        )
        trainer = make_trainer(max_epochs=12)
        trainer.fit(module, datamodule=data)
        trainer.test(module, datamodule=data, verbose=False)
        assert trainer.callback_metrics["test/error"] == 0
        assert not model.embedding.weight[0].any()
