"""What a model is given at a time: a window of T tokens, cut from a stream of documents or filled with whole ones."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

IGNORED = -100  # a label that does not count, PyTorch's default ignore_index


@dataclass(frozen=True)
class Window:
    """Inputs and labels, int32 [T]; `positions`, int32 [T], start at 0 with each document, None where documents are not
    kept apart. `num_tokens` are those that are no padding. `place`: of the first input in the stream of all held sources."""

    inputs: np.ndarray
    labels: np.ndarray
    positions: np.ndarray | None
    num_tokens: int
    place: int | None = None


def stream_window(ids: np.ndarray, borders: Sequence[int], end: int | None, apart: bool) -> Window:
    """Consecutive ids [T + 1] of a stream, in which documents begin at `borders`, as T inputs and the T ids after them.

    With `apart`, positions restart at borders, and the id that begins a document is predicted only where it is `end`, which
    also ends the document before it.
    """
    inputs, labels, size = ids[:-1], ids[1:].copy(), len(ids) - 1
    if not apart:
        return Window(inputs, labels, None, size)
    starts = np.zeros(size, dtype=np.int32)
    for border in borders:
        if 0 < border:
            if ids[border] != end:
                labels[border - 1] = IGNORED
            starts[border:] = border
    return Window(inputs, labels, np.arange(size, dtype=np.int32) - starts, size)


def document_window(pieces: Sequence[np.ndarray], size: int, padding: int, apart: bool) -> Window:
    """Pieces of documents side by side: of k + 1 ids each, k inputs and the k ids after them; padding fills up to `size`."""
    inputs, labels = np.full(size, padding, dtype=np.int32), np.full(size, IGNORED, dtype=np.int32)
    positions, at = np.empty(size, dtype=np.int32), 0
    for piece in pieces:
        stop = at + len(piece) - 1
        inputs[at:stop], labels[at:stop], positions[at:stop] = piece[:-1], piece[1:], np.arange(stop - at)
        at = stop
    positions[at:] = np.arange(size - at)
    return Window(inputs, labels, positions if apart else None, at)
