"""Windows over a stream of documents, tokenized when a lane comes to need them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ftc.data.document_stream import Block, Dealer, Dealt, DocumentStream
from ftc.data.packing import fill
from ftc.data.tokens import Framing, text_ids, text_parts
from ftc.data.windows import Window, document_window, stream_window
from ftc.errors import FtcFailure

_WAITING = 32  # documents at most from which a lane chooses what fits into a window


class OpenDocument:
    """A framed document from `offset` on, tokenized part by part as far as it is asked for."""

    def __init__(self, dealt: Dealt, tokenizer: Any, framing: Framing, offset: int = 0):
        self.number, self.block, self.offset = dealt.number, dealt.block, 0
        self._parts = text_parts(dealt.text)
        self._tokenizer, self._after = tokenizer, framing.after
        self._ids = np.asarray(framing.before, dtype=np.int32)
        while self.offset < offset:
            if not self.left(1):
                raise FtcFailure("a streamed text has changed since the checkpoint; put it back, or begin anew with --restart")
            self.drop(self.left(min(offset - self.offset, 1 << 16)))

    def left(self, limit: int) -> int:
        """How many ids are left, counted up to `limit`."""
        while len(self._ids) < limit and self._parts is not None:
            part = next(self._parts, None)
            if part is None:
                self._parts = None
            more = self._after if part is None else text_ids(self._tokenizer, part)
            self._ids = np.concatenate([self._ids, np.asarray(more, dtype=np.int32)])
        return min(len(self._ids), limit)

    def head(self, count: int) -> np.ndarray:
        """The next `count` ids, int32."""
        count = self.left(count)
        return self._ids[:count]

    def drop(self, count: int) -> None:
        """Go on `count` ids further."""
        self._ids, self.offset = self._ids[count:], self.offset + count


class StreamedCursor:
    """A lane's place in a stream: the documents it has begun or holds back, and the next one's number."""

    def __init__(self, lane: int, source: "StreamedWindows", state: Any):
        self._lane, self._source = lane, source
        block, held, self._next_number = state or (None, (), 0)
        self.block = Block() if block is None else Block.from_json(block)
        self._held = {number: offset for number, offset in held}  # of an earlier process, still to be read again
        self.open: list[OpenDocument] = []

    def next(self) -> Window:
        while self._held:
            self._pull()
        return self._source.cut(self.open, self._pull)

    def state(self) -> tuple:
        """Block, (number, offset) of each open document, number from which on all documents are still to come."""
        block = self.open[0].block if self.open else self.block
        held = tuple((document.number, document.offset) for document in self.open)
        return block.as_json(), held or tuple(self._held.items()), self._next_number

    def _pull(self) -> None:
        """Open the lane's next document that is not used up."""
        while True:
            dealt = self._source.dealer.next(self._lane)
            if dealt.number >= self._next_number or dealt.number in self._held:
                break
        offset = self._held.pop(dealt.number, 0)
        self._next_number = max(self._next_number, dealt.number + 1)
        self.block = dealt.block
        self.open.append(OpenDocument(dealt, self._source.tokenizer, self._source.framing, offset))


class StreamedWindows:
    """A stream of documents as windows: of one stream a lane, or filled with whole documents."""

    def __init__(self, stream: DocumentStream, tokenizer: Any, seq_len: int, whole: bool, apart: bool):
        self.stream, self.tokenizer, self.seq_len, self._apart = stream, tokenizer, seq_len, apart
        self.framing = Framing.of_documents(tokenizer) if whole else Framing.of_stream(tokenizer)
        self.cut = self._documents if whole else self._stream
        self._padding = (*self.framing.after, *self.framing.before, 0)[0]

    def cursors(self, lanes: Sequence[int], states: Mapping[int, Any]) -> dict[int, StreamedCursor]:
        """Cursors that read the stream together, from the earliest block that one of them needs."""
        cursors = {lane: StreamedCursor(lane, self, states.get(lane)) for lane in lanes}
        first = min((cursor.block for cursor in cursors.values()), key=lambda block: block.first)
        self.dealer = Dealer(self.stream, lanes, first)
        return cursors

    def _stream(self, open_documents: list[OpenDocument], pull: Any) -> Window:
        """The next T + 1 ids; the last of them begins the next window."""
        parts, borders, missing, index = [], [], self.seq_len + 1, 0
        while missing:
            if index == len(open_documents):
                pull()
            document = open_documents[index]
            part = document.head(missing)
            if document.offset == 0:
                borders.append(self.seq_len + 1 - missing)
            parts.append(part)
            missing -= len(part)
            index += 1
        last = parts.pop()
        for part, document in zip(parts, open_documents, strict=False):
            document.drop(len(part))
        del open_documents[: index - 1]
        open_documents[0].drop(len(last) - 1)
        return stream_window(np.concatenate([*parts, last]), borders, self.framing.end, self._apart)

    def _documents(self, open_documents: list[OpenDocument], pull: Any) -> Window:
        """The oldest document that is open, and of those waiting what fits beside it."""
        size = self.seq_len
        while len(open_documents) < _WAITING and sum(self._slots(document) for document in open_documents) < 4 * size:
            pull()
            if not self._slots(open_documents[-1]):
                open_documents.pop()
        chosen = fill([self._slots(document) for document in open_documents], size)
        pieces = [open_documents[index].head(size + 1) for index in chosen]
        for index, piece in zip(chosen, pieces, strict=True):
            open_documents[index].drop(len(piece) - 1)
        open_documents[:] = [document for document in open_documents if self._slots(document)]
        return document_window(pieces, size, self._padding, self._apart)

    def _slots(self, document: OpenDocument) -> int:
        """Inputs that are left, counted up to a window; the last id is a label only."""
        return max(0, document.left(self.seq_len + 1) - 1)
