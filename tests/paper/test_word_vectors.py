"""Word vectors against counts in a plain loop and numpy's SVD."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from lightning_manifold_mixup.paper.data.word_vectors import word_vectors


def information_by_hand(sentences: list[list[int]], size: int, window: int) -> np.ndarray:
    pairs: Counter[tuple[int, int]] = Counter()
    for ids in sentences:
        for i, word in enumerate(ids):
            pairs.update((word, ids[j]) for j in range(max(0, i - window), min(len(ids), i + window + 1)) if j != i)
    words: Counter[int] = Counter()
    for (word, _), count in pairs.items():
        words[word] += count
    total = sum(count**0.75 for count in words.values())
    matrix = np.zeros((size, size))
    for (word, near), count in pairs.items():
        matrix[word, near] = max(0.0, math.log(count / (words[word] * words[near] ** 0.75 / total)))
    return matrix


@pytest.mark.parametrize("window", [1, 3])
def test_against_counts_by_hand(window: int) -> None:
    generator = np.random.default_rng(1)
    sentences = [generator.integers(1, 29, length).tolist() for length in (0, 1, 2, 9, 30, 40, 50)]
    vectors = word_vectors([torch.tensor(ids, dtype=torch.long) for ids in sentences], 32, 5, window).numpy()
    left, values, _ = np.linalg.svd(information_by_hand(sentences, 32, window))
    expected = left[:, :5] * np.sqrt(values[:5])
    seen = np.isin(np.arange(32), np.concatenate(sentences[2:]))
    assert 10 < seen.sum() < 32
    expected = expected[seen] / np.linalg.norm(expected[seen], axis=1, keepdims=True)
    # a factorisation is unique up to the signs of its columns: the products are what is compared
    np.testing.assert_allclose(vectors[seen] @ vectors[seen].T, expected @ expected.T, atol=1e-5)
    assert not vectors[~seen].any()


def test_too_few_words() -> None:
    with pytest.raises(ValueError, match="more than 3 words with neighbours for vectors of 3 numbers, got 2"):
        word_vectors([torch.tensor([1, 2]), torch.tensor([3])], 5, 3)
