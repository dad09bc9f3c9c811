"""Windows over text that is tokenized already, each once an epoch, in an order that (seed, epoch) decides."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from ftc.data.lanes import LANES
from ftc.data.packing import pack
from ftc.data.tokens import Framing, TokenizedText
from ftc.data.windows import Window, document_window, stream_window
from ftc.errors import FtcError, FtcFailure


class FramedTexts:
    """Tokenized documents with what stands before and after each. `lengths` int64 [documents]."""

    def __init__(self, text: TokenizedText, framing: Framing):
        self._ids, self._first = text.ids, np.concatenate([[0], np.cumsum(text.lengths, dtype=np.int64)])
        self._before = np.asarray(framing.before, dtype=np.int32)
        self._after = np.asarray(framing.after, dtype=np.int32)
        self.lengths = text.lengths + len(framing.before) + len(framing.after)

    def slice(self, document: int, start: int, stop: int) -> np.ndarray:
        """The ids start to stop of one framed document, int32."""
        first, last = self._first[document], self._first[document + 1]
        begin, end = len(self._before), len(self._before) + int(last - first)
        return np.concatenate(
            [
                self._before[start:stop],
                self._ids[first + max(0, start - begin) : max(first, min(last, first + stop - begin))],
                self._after[max(0, start - end) : max(0, stop - end)],
            ]
        )


class StoredWindows:
    """Any window by its number, counted over epochs; what windows over a stream and whole documents have in common."""

    def __init__(self, title: str, seed: int, max_epochs: int):
        self.title, self.seed, self.max_epochs = title, seed, max_epochs
        self._first = [0]  # the number of the first window of each epoch, as far as was asked for
        self._offset = lru_cache(maxsize=4)(lambda epoch: self._generator(epoch)[0])
        self._order = lru_cache(maxsize=4)(lambda epoch: self._generator(epoch)[1].permutation(self.num_windows(epoch)))

    def num_windows(self, epoch: int) -> int:
        """How many windows the epoch has."""
        raise NotImplementedError

    def cut(self, epoch: int, index: int) -> Window:
        """Window `index` of the epoch in the order of the text."""
        raise NotImplementedError

    def window(self, number: int) -> Window:
        """Window `number` of the endless sequence of epochs. Raises FtcFailure past the last epoch."""
        while self._first[-1] <= number:
            self._first.append(self._first[-1] + self.num_windows(len(self._first) - 1))
        epoch = bisect_right(self._first, number) - 1
        if self.max_epochs and epoch >= self.max_epochs:
            raise ended(self.title, self.max_epochs)
        return self.cut(epoch, int(self._order(epoch)[number - self._first[epoch]]))

    def cursors(self, lanes: Sequence[int], states: Mapping[int, Any]) -> dict[int, "StoredCursor"]:
        """Lane k takes the windows k, k + 64, k + 128, ..."""
        return {lane: StoredCursor(self, lane, states.get(lane) or 0) for lane in lanes}

    def _generator(self, epoch: int) -> tuple[int, np.random.Generator]:
        """The epoch's offset, and the generator that draws its order next."""
        generator = np.random.default_rng([self.seed, epoch])
        return int(generator.integers(self.seq_len)), generator


class StoredCursor:
    """A lane's place in stored windows: how many it has taken."""

    def __init__(self, windows: StoredWindows, lane: int, taken: int):
        self._windows, self._lane, self._taken = windows, lane, taken

    def next(self) -> Window:
        window = self._windows.window(self._lane + self._taken * LANES)
        self._taken += 1
        return window

    def state(self) -> int:
        return self._taken


class StreamWindows(StoredWindows):
    """Windows over one stream of all documents; each epoch begins at another offset, below `seq_len`.

    `first_place`: of the text's first token in the stream of all sources. Raises FtcError for a text that does not fill a window at every offset.
    """

    def __init__(
        self,
        text: TokenizedText,
        tokenizer: Any,
        seq_len: int,
        apart: bool,
        seed: int,
        title: str,
        max_epochs: int = 0,
        first_place: int = 0,
    ):
        super().__init__(title, seed, max_epochs)
        self.first_place = first_place
        framing = Framing.of_stream(tokenizer)
        self.seq_len, self._apart, self._end = seq_len, apart, framing.end
        self._texts, self._last = FramedTexts(text, framing), np.asarray(framing.last, dtype=np.int32)
        self._first_id = np.concatenate([[0], np.cumsum(self._texts.lengths, dtype=np.int64)])
        self.num_tokens = int(self._first_id[-1]) + len(self._last)
        if self.num_tokens < 2 * seq_len:
            raise FtcError(
                f"the training text of {title!r} has {self.num_tokens} tokens; windows of {seq_len} need {2 * seq_len} at "
                "least: give more text, or lower training.seq_len"
            )

    def num_windows(self, epoch: int) -> int:
        return (self.num_tokens - 1 - self._offset(epoch)) // self.seq_len

    def cut(self, epoch: int, index: int) -> Window:
        start = self._offset(epoch) + index * self.seq_len
        stop, at = start + self.seq_len + 1, start
        document = int(np.searchsorted(self._first_id, start, side="right")) - 1
        parts, borders = [], []
        while at < stop and document < len(self._first_id) - 1:
            first, last = int(self._first_id[document]), min(stop, int(self._first_id[document + 1]))
            if at == first:
                borders.append(at - start)
            parts.append(self._texts.slice(document, at - first, last - first))
            at, document = last, document + 1
        if at < stop:
            borders.append(at - start)
            parts.append(self._last)
        window = stream_window(np.concatenate(parts), borders, self._end, self._apart)
        return replace(window, place=self.first_place + start)

    @property
    def next_place(self) -> int:
        """Where the text that follows in the stream of all sources begins; it has the end-of-text of this one for its first."""
        return self.first_place + self.num_tokens - len(self._last)


class DocumentWindows(StoredWindows):
    """Windows filled with whole documents, packed once by best fit.

    Raises FtcError where no document has two tokens.
    """

    def __init__(
        self, text: TokenizedText, tokenizer: Any, seq_len: int, apart: bool, seed: int, title: str, max_epochs: int = 0
    ):
        super().__init__(title, seed, max_epochs)
        framing = Framing.of_documents(tokenizer)
        self.seq_len, self._apart, self._padding = seq_len, apart, (*framing.after, *framing.before, 0)[0]
        self._texts = FramedTexts(text, framing)
        self._packed = pack(np.maximum(self._texts.lengths - 1, 0), seq_len)
        self.num_tokens = int(self._packed.length.sum())
        if not len(self._packed):
            raise FtcError(f"the training text of {title!r} has no document of two tokens or more; give more text")

    def num_windows(self, epoch: int) -> int:
        return len(self._packed)

    def cut(self, epoch: int, index: int) -> Window:
        packed, pieces = self._packed, []
        for number in range(packed.first[index], packed.first[index + 1]):
            document, offset, length = packed.document[number], packed.offset[number], packed.length[number]
            pieces.append(self._texts.slice(int(document), int(offset), int(offset + length) + 1))
        return document_window(pieces, self.seq_len, self._padding, self._apart)


def ended(title: str, max_epochs: int) -> FtcFailure:
    """The error of a source that was read as often as it may be."""
    times = "once" if max_epochs == 1 else f"{max_epochs} times"
    return FtcFailure(
        f"the source {title!r} has been read {times}, its max_epochs; give more text, fewer steps or a lower weight"
    )
