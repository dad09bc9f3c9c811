"""An interpolated modified Kneser-Ney trigram: the baseline that a trained model has to beat.

    p(w | u v) = (c(uvw) - D(c(uvw))) / c(uv.) + g(uv) p(w | v),   g(uv) = (D1 N1(uv.) + D2 N2(uv.) + D3 N3+(uv.)) / c(uv.)

and the same one order down, where c becomes the number of distinct words to the left (continuation counts), down to the
uniform distribution. Chen and Goodman 1999, equations 24 to 27, with one set of discounts an order.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ftc.errors import FtcError


@dataclass(frozen=True)
class _Order:
    """One order's table: sorted n-gram keys with discounted counts, sorted context keys with totals and back-off weight."""

    keys: np.ndarray  # int64, context * V + word
    discounted: np.ndarray  # float64, max(c - D(c), 0)
    contexts: np.ndarray  # int64
    totals: np.ndarray  # float64, sum of c over the context
    backoff_mass: np.ndarray  # float64, D1 N1 + D2 N2 + D3 N3+, before the division by totals


class Trigram:
    """A smoothed trigram over token ids; every document begins after two boundary tokens."""

    def __init__(self, documents: Sequence[Sequence[int] | np.ndarray], vocab_size: int, boundary: int):
        """Count `documents` (token ids in [0, vocab_size)); `boundary` is the id before and after each one.

        Raises FtcError for no tokens, or ids outside the vocabulary.
        """
        self.vocab_size, self.boundary = vocab_size, boundary
        if vocab_size**3 >= 2**62:
            raise FtcError(f"the trigram baseline packs three ids in 62 bits; vocab_size {vocab_size} is too large")
        u, v, w = self._trigrams(documents, closing=True)
        if len(w) <= len(documents):
            raise FtcError("there are no tokens to count; give the trigram at least one non-empty document")
        V = vocab_size
        keys, counts = np.unique((u * V + v) * V + w, return_counts=True)
        self._orders = [_order(keys, counts, V)]
        for modulus in (V * V, V):  # how many distinct words stand before each bigram, then before each word
            keys, counts = np.unique(keys % modulus, return_counts=True)
            self._orders.append(_order(keys, counts, V))

    def probability(self, u: np.ndarray, v: np.ndarray, w: np.ndarray) -> np.ndarray:
        """p(w | u v), float64, elementwise over three integer arrays of one shape."""
        V = self.vocab_size
        u, v, w = (np.asarray(ids, dtype=np.int64) for ids in (u, v, w))
        p = np.full(w.shape, 1.0 / V)
        for order, context in zip(reversed(self._orders), (np.zeros_like(w), v, u * V + v), strict=True):
            p = _interpolate(order, context, context * V + w, p)
        return p

    def nats(self, documents: Sequence[Sequence[int] | np.ndarray]) -> float:
        """Total negative log-likelihood in nats of the documents' own tokens (the closing boundary is not counted)."""
        u, v, w = self._trigrams(documents, closing=False)
        return float(-np.log(self.probability(u, v, w)).sum())

    def bits_per_byte(self, documents: Sequence[Sequence[int] | np.ndarray], num_bytes: int) -> float:
        """`nats` in bits over the size of the text in UTF-8 bytes."""
        if num_bytes < 1:
            raise FtcError("there is no validation text; bits per byte need at least one byte")
        return self.nats(documents) / math.log(2) / num_bytes

    def _trigrams(self, documents, closing: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The three columns u, v, w of every trigram that ends on a counted token, int64."""
        columns: tuple[list, list, list] = ([], [], [])
        for document in documents:
            ids = np.asarray(document, dtype=np.int64)
            if len(ids) and (ids.min() < 0 or ids.max() >= self.vocab_size):
                raise FtcError(f"token ids reach {ids.max()}, outside the vocabulary of {self.vocab_size}")
            ends = [self.boundary] if closing else []
            padded = np.concatenate([[self.boundary, self.boundary], ids, ends]).astype(np.int64)
            for column, start in zip(columns, range(3), strict=True):
                column.append(padded[start : len(padded) - 2 + start])
        empty = [np.empty(0, np.int64)]
        u, v, w = (np.concatenate(column or empty) for column in columns)
        return u, v, w


def _order(keys: np.ndarray, counts: np.ndarray, vocab_size: int) -> _Order:
    discounts = _discounts(counts)
    contexts, first = np.unique(keys // vocab_size, return_index=True)
    discount = discounts[np.minimum(counts, 3)]
    return _Order(
        keys=keys,
        discounted=counts - discount,
        contexts=contexts,
        totals=np.add.reduceat(counts, first).astype(np.float64),
        backoff_mass=np.add.reduceat(discount, first),
    )


def _discounts(counts: np.ndarray) -> np.ndarray:
    """D(0..3+) by Chen and Goodman's estimate; 0.75 where the counts of counts leave it undefined."""
    n1, n2, n3, n4 = (int((counts == c).sum()) for c in (1, 2, 3, 4))
    fallback = np.array([0.0, 0.75, 0.75, 0.75])
    if min(n1, n2, n3) == 0:
        return fallback
    y = n1 / (n1 + 2 * n2)
    estimate = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    valid = (estimate > 0) & (estimate < np.arange(4))
    return np.where(valid, estimate, fallback)


def _interpolate(order: _Order, context: np.ndarray, key: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """The order's discounted estimate plus its back-off mass times `lower`; `lower` itself in an unseen context."""
    at, seen_context = _find(order.contexts, context)
    total = np.where(seen_context, order.totals[at], 1.0)
    backoff = np.where(seen_context, order.backoff_mass[at] / total, 1.0)
    at, seen = _find(order.keys, key)
    return np.where(seen, order.discounted[at] / total, 0.0) + backoff * lower


def _find(table: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each value stands in the sorted table (clipped to it), and whether it is really there."""
    at = np.minimum(np.searchsorted(table, values), len(table) - 1)
    return at, table[at] == values
