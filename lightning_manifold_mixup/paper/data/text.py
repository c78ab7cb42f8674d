"""Labelled sentences from files: a vocabulary of words, batches of padded token ids."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from typing_extensions import Unpack, override

from lightning_manifold_mixup._step.extras import require
from lightning_manifold_mixup.paper.data.base import ClassificationDataModule, Split
from lightning_manifold_mixup.paper.data.batches import LabelledDataset
from lightning_manifold_mixup.paper.data.options import LoaderOptions
from lightning_manifold_mixup.paper.data.splits import split_by_class
from lightning_manifold_mixup.paper.data.word_vectors import word_vectors

__all__ = ["PADDING", "UNKNOWN", "TextDataModule", "TextDataset", "Vocabulary", "read_labelled_text"]

PADDING = 0
"""The token id that fills up shorter sentences."""

UNKNOWN = 1
"""The token id of words that are not in the vocabulary."""

_NotHeldOut = Literal["not held out"]

_SEPARATORS = {".csv": ",", ".tsv": "\t"}


def read_labelled_text(
    path: str | Path, text_column: str = "text", label_column: str = "label", encoding: str = "utf-8"
) -> tuple[list[str], list[str]]:
    r"""Read texts and their labels.

    Args:
        path: a ``.csv`` or ``.tsv`` file with a header, or any other text file with one sample a line, ``label text``.
        text_column: name of the column with the text, in a file with a header.
        label_column: name of the column with the label.
        encoding: of the file.

    Returns:
        The texts (a label alone in its line has an empty one), and the labels as strings. Empty lines are left out.

    Raises:
        FileNotFoundError: if the file is not there.
        ValueError: if it has no such column, a row has no label, or the encoding is wrong.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "questions.txt")
        ...     _ = file.write_text("HUM Who was Galileo ?\nNUM How far is it ?\n")
        ...     read_labelled_text(file)
        (['Who was Galileo ?', 'How far is it ?'], ['HUM', 'NUM'])
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"Expected a file of labelled texts at {path.absolute()}, found none. Give a .csv or .tsv file with a "
            "header, or lines `label text`."
        )
    separator = _SEPARATORS.get(path.suffix.lower())
    try:
        with path.open(encoding=encoding, newline="" if separator else None) as file:
            if separator:
                return _from_table(csv.DictReader(file, delimiter=separator), path, text_column, label_column)
            return _from_lines(file)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"Expected {path} to be {encoding}, got the byte {error.object[error.start]:#x}: set encoding, for "
            "instance to latin-1."
        ) from error


def _from_table(
    reader: "csv.DictReader[str]", path: Path, text_column: str, label_column: str
) -> tuple[list[str], list[str]]:
    columns = list(reader.fieldnames or [])
    for name in (text_column, label_column):
        if name not in columns:
            raise ValueError(f"Expected a column {name!r} in {path}, got {columns}: set text_column and label_column.")
    rows = list(reader)
    for number, row in enumerate(rows, 1):
        if row[text_column] is None or not row[label_column]:
            raise ValueError(f"Expected text and label in row {number} of {path}, got {row}.")
    return [row[text_column] for row in rows], [row[label_column] for row in rows]


def _from_lines(lines: Iterable[str]) -> tuple[list[str], list[str]]:
    pairs = [line.split(maxsplit=1) for line in lines if line.strip()]
    return [pair[1].strip() if len(pair) > 1 else "" for pair in pairs], [pair[0] for pair in pairs]


class Vocabulary:
    """The words of some texts, numbered: lower case, separated by white space or by scikit-learn's ``token_pattern``.

    Id 0 is padding, 1 a word that is not in the vocabulary, the others follow in alphabetical order.

    Args:
        texts: where the words come from: the training texts.
        min_count: a word in fewer texts than this is unknown.
        token_pattern: regular expression of a word.

    Example:
        >>> words = Vocabulary(["who was it ?", "Who ?"])
        >>> len(words), words.encode("Who was Galileo ?")
        (6, tensor([5, 4, 1, 2]))
    """

    def __init__(self, texts: Sequence[str], min_count: int = 1, token_pattern: str = r"\S+") -> None:
        counter = require("sklearn.feature_extraction.text", "cli").CountVectorizer(
            token_pattern=token_pattern, min_df=min_count
        )
        counter.fit(texts)
        self._ids = {word: int(number) + 2 for word, number in counter.vocabulary_.items()}
        self._words = counter.build_analyzer()

    def __len__(self) -> int:
        return len(self._ids) + 2

    def encode(self, text: str) -> Tensor:
        """Token ids (length,) int64; one unknown word where there is no word at all."""
        return torch.tensor([self._ids.get(word, UNKNOWN) for word in self._words(text)] or [UNKNOWN])


class TextDataset(LabelledDataset):
    """Token ids of sentences of different length; a batch is padded to its longest sentence.

    Args:
        tokens: of each sentence, (length,) int64.
        labels: (n,) int64.

    Example:
        >>> TextDataset([torch.tensor([5, 4, 2]), torch.tensor([3])], torch.tensor([1, 0])).__getitems__([0, 1])
        (tensor([[5, 4, 2],
                [3, 0, 0]]), tensor([1, 0]))
    """

    def __init__(self, tokens: Sequence[Tensor], labels: Tensor) -> None:
        self.tokens = list(tokens)
        self.labels = labels

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        rows = torch.as_tensor(indices, dtype=torch.long)
        padded = pad_sequence([self.tokens[row] for row in rows], batch_first=True, padding_value=PADDING)
        return padded, self.labels[rows]


class TextDataModule(ClassificationDataModule):
    r"""Labelled sentences from files of your own: batches of token ids (n, longest of the batch) and labels (n,).

    Token ids cannot be mixed, so the layers of Manifold Mixup begin with the embedding. There is no separate mask: the
    networks ``TextConvNet`` and ``TextLSTM`` see where a sentence ends: the embedding gives zeros for padding.

    Args:
        train_file: a ``.csv`` or ``.tsv`` file with a header, or lines ``label text``; see ``read_labelled_text``.
        test_file: likewise; None takes ``test_size`` samples of the training file.
        test_size: test samples, a number or a share, class-balanced, drawn by ``seed``; only without a ``test_file``.
        val_size: validation samples taken out of what is left, likewise; 0 for none.
        train_size: train on that many of what is then left, a number or a share, likewise; None for all.
        min_count: a word in fewer training texts than this is unknown.
        max_length: words of a text beyond this are cut off.
        vectors_dim: make ``word_vectors`` with that many numbers from all texts of the training file that are not held
            out, those that ``train_size`` leaves without labels too, whose words are then in the vocabulary; None for
            no vectors.
        text_column, label_column, encoding: see ``read_labelled_text``.
        kwargs: the arguments of ``ClassificationDataModule``.

    Attributes:
        num_classes, vocabulary_size, class_names, word_vectors: what a model needs to know.

    Raises:
        ValueError: for a ``max_length`` or a batch size below 1. In ``setup``: for a file without the columns or of
            another encoding, labels in ``test_file`` that ``train_file`` lacks, or sizes above what there is.
        FileNotFoundError: in ``setup``, if a file is missing.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "reviews.tsv")
        ...     _ = file.write_text("label\ttext\n" + "good\tfine and dandy\nbad\tawful\n" * 20)
        ...     data = TextDataModule(str(file), test_size=0.25, batch_size=10)
        ...     tokens, labels = next(iter(data.train_dataloader()))
        >>> tokens.shape, data.class_names, data.vocabulary_size, len(data.train_set), len(data.test_set)
        (torch.Size([10, 3]), ('bad', 'good'), 6, 30, 10)
    """

    def __init__(
        self,
        train_file: str,
        test_file: str | None = None,
        test_size: int | float = 0.1,
        val_size: int | float = 0,
        train_size: int | float | None = None,
        min_count: int = 1,
        max_length: int = 200,
        text_column: str = "text",
        label_column: str = "label",
        encoding: str = "utf-8",
        vectors_dim: int | None = None,
        **kwargs: Unpack[LoaderOptions],
    ) -> None:
        super().__init__(**kwargs)
        if max_length < 1:
            raise ValueError(f"TextDataModule: expected max_length of at least 1, got {max_length}.")
        self.train_file, self.test_file = train_file, test_file
        self.test_size, self.val_size, self.train_size = test_size, val_size, train_size
        self.min_count, self.max_length = min_count, max_length
        self.vectors_dim = vectors_dim
        self.text_column, self.label_column, self.encoding = text_column, label_column, encoding
        self._read: dict[str, tuple[list[str], list[str]]] = {}
        self._vocabulary: Vocabulary | None = None

    @property
    @override
    def class_names(self) -> tuple[str, ...]:
        return tuple(sorted(set(self._file(self.train_file)[1])))

    @property
    def vocabulary(self) -> Vocabulary:
        """The words of the texts to train on, and of those without labels that ``word_vectors`` are made from."""
        if self._vocabulary is None:
            known: Split | _NotHeldOut = "train" if self.vectors_dim is None else "not held out"
            self._vocabulary = Vocabulary(self._texts(known), self.min_count)
        return self._vocabulary

    @property
    def word_vectors(self) -> Tensor | None:
        """Vectors (vocabulary_size, vectors_dim) to start an embedding from; None without ``vectors_dim``."""
        if self.vectors_dim is None:
            return None
        sentences = [self.vocabulary.encode(text) for text in self._texts("not held out")]
        return word_vectors(sentences, self.vocabulary_size, self.vectors_dim)

    @property
    def vocabulary_size(self) -> int:
        """Number of token ids, padding and the unknown word included."""
        return len(self.vocabulary)

    @override
    def make_dataset(self, split: Split) -> LabelledDataset | None:
        if split == "val" and self.val_size == 0:
            return None
        if split == "test" and self.test_file is not None:
            texts, _ = self._file(self.test_file)
            return self._encoded(texts, self._labels(self.test_file))
        return self._encoded(self._texts(split), self._labels(self.train_file)[self.indices(split)])

    def _encoded(self, texts: Sequence[str], labels: Tensor) -> TextDataset:
        return TextDataset([self.vocabulary.encode(text)[: self.max_length] for text in texts], labels)

    def _texts(self, split: Split | _NotHeldOut) -> list[str]:
        texts, _ = self._file(self.train_file)
        return [texts[i] for i in self.indices(split)]

    def indices(self, split: Split | _NotHeldOut) -> list[int]:
        """Find the samples of the training file that belong to a split, or to neither validation nor test."""
        labels = self._labels(self.train_file)
        rest, test = split_by_class(labels, self.test_size if self.test_file is None else 0, self.generator())
        kept, val = split_by_class(labels[rest], self.val_size, self.generator())
        train = not_held_out = rest[kept]
        if self.train_size is not None:
            train = train[split_by_class(labels[train], self.train_size, self.generator())[1]]
        return {"train": train, "not held out": not_held_out, "val": rest[val], "test": test}[split].tolist()

    def _labels(self, path: str) -> Tensor:
        numbers = {name: number for number, name in enumerate(self.class_names)}
        _, labels = self._file(path)
        if unknown := sorted(set(labels) - numbers.keys()):
            raise ValueError(
                f"Expected the labels {sorted(numbers)} of {self.train_file} in {path}, got {unknown} too."
            )
        return torch.tensor([numbers[label] for label in labels])

    def _file(self, path: str) -> tuple[list[str], list[str]]:
        if path not in self._read:
            self._read[path] = read_labelled_text(path, self.text_column, self.label_column, self.encoding)
        return self._read[path]
