"""Word vectors from sentences without labels: pointwise mutual information with the neighbours, factorised.

Words that stand among the same words get vectors that are near, so that a network with few labelled sentences knows
something of the words that are not in them. Counting and one sparse SVD take seconds where skip-gram takes minutes, and
are about as good (Levy, Goldberg & Dagan, "Improving Distributional Similarity with Lessons Learned from Word
Embeddings", TACL 2015).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_manifold_mixup._step.extras import require

__all__ = ["word_vectors"]


def word_vectors(sentences: Sequence[Tensor], vocabulary_size: int, dim: int, window: int = 4) -> Tensor:
    """Give each word a vector by the words that stand near it.

    Args:
        sentences: token ids of each, (length,) int64.
        vocabulary_size: number of token ids.
        dim: numbers for a word.
        window: how many words before and after count as near.

    Returns:
        (vocabulary_size, dim) float32, of length 1; zeros for ids that have no neighbours, as padding has none.

    Raises:
        ValueError: if there are not more words with neighbours than ``dim``.

    Example:
        >>> cat, dog, red, blue = 1, 2, 3, 4
        >>> said = [[cat, 5, 6], [dog, 5, 6], [red, 7, 8], [blue, 7, 8]]
        >>> vectors = word_vectors([torch.tensor(words) for words in said], vocabulary_size=9, dim=4)
        >>> bool(vectors[cat] @ vectors[dog] > vectors[cat] @ vectors[red]), vectors[0].tolist()
        (True, [0.0, 0.0, 0.0, 0.0])
    """
    sparse = require("scipy.sparse", "cli")
    words, near = _pairs([sentence.numpy() for sentence in sentences], window)
    found = len(np.unique(words))
    if found <= dim:
        raise ValueError(
            f"Expected more than {dim} words with neighbours for vectors of {dim} numbers, got {found}: "
            "take a smaller dim (vectors_dim of a TextDataModule)."
        )
    shape = (vocabulary_size, vocabulary_size)
    counts = sparse.coo_matrix((np.ones(len(words)), (words, near)), shape=shape).tocsr().tocoo()
    of_word = np.bincount(words, minlength=vocabulary_size)
    of_context = of_word**0.75  # smoothed: otherwise rare words are too near to all that they were seen with
    expected = of_word[counts.row] * of_context[counts.col] / of_context.sum()
    information = np.maximum(np.log(counts.data / expected), 0)
    matrix = sparse.csr_matrix((information, (counts.row, counts.col)), shape=shape)
    svd = require("sklearn.utils.extmath", "cli").randomized_svd  # with a seed, unlike scipy's, the same on each run
    left, values, _ = svd(matrix, dim, n_iter=10, random_state=0)
    vectors = torch.from_numpy(left * np.sqrt(values)).float()
    vectors[torch.from_numpy(of_word) == 0] = 0  # noise of the factorisation, which normalising would blow up
    return torch.nn.functional.normalize(vectors)


def _pairs(sentences: Sequence[np.ndarray], window: int) -> tuple[np.ndarray, np.ndarray]:
    """Each word beside each of its neighbours, once for every time that it has it; both (pairs,)."""
    words, near = [], []
    for ids in sentences:
        for distance in range(1, min(window, len(ids) - 1) + 1):
            before, after = ids[:-distance], ids[distance:]
            words += [before, after]
            near += [after, before]
    empty = np.zeros(0, dtype=np.int64)
    return np.concatenate([*words, empty]), np.concatenate([*near, empty])
