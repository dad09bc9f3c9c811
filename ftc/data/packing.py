"""Best-fit packing of documents into windows, so that none is cut that fits into one (Ding et al., 2024).

A document that is longer than a window fills windows of its own, and what is left of it is packed like a document.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packed:
    """Window w holds the pieces first[w] to first[w + 1]: `length` ids of `document` from `offset` on, each int64 [pieces]."""

    first: np.ndarray
    document: np.ndarray
    offset: np.ndarray
    length: np.ndarray

    def __len__(self) -> int:
        return len(self.first) - 1


def pack(lengths: Sequence[int], capacity: int) -> Packed:
    """Best fit, longest documents first: each goes where the least room is left that is enough."""
    windows: list[list[tuple[int, int, int]]] = []
    rests: list[tuple[int, int, int]] = []  # (-length, document, offset)
    for document, length in enumerate(lengths):
        full = int(length) // capacity * capacity
        windows += [[(document, offset, capacity)] for offset in range(0, full, capacity)]
        if length > full:
            rests.append((full - int(length), document, full))
    room: dict[int, list[int]] = {}  # room left -> windows
    levels: list[int] = []  # the keys of `room`, ascending
    for negative, document, offset in sorted(rests):
        length = -negative
        at = bisect_left(levels, length)
        if at < len(levels):
            left = levels[at]
            window = room[left].pop()
            if not room[left]:
                del room[left], levels[at]
        else:
            left, window = capacity, len(windows)
            windows.append([])
        windows[window].append((document, offset, length))
        if left > length:
            if left - length not in room:
                room[left - length] = []
                insort(levels, left - length)
            room[left - length].append(window)
    pieces = np.array([piece for window in windows for piece in window], dtype=np.int64).reshape(-1, 3)
    first = np.cumsum([0, *(len(window) for window in windows)], dtype=np.int64)
    return Packed(first, *pieces.T)


def fill(lengths: Sequence[int], capacity: int) -> list[int]:
    """Which of a few waiting documents share the next window: the first, then whatever is longest and still fits.

    A first document that is longer than the window fills it alone.
    """
    chosen, left = [0], capacity - lengths[0]
    waiting = sorted(range(1, len(lengths)), key=lambda index: (-lengths[index], index))
    for index in waiting:
        if lengths[index] <= left:
            chosen.append(index)
            left -= lengths[index]
    return chosen
