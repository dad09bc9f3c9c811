"""An endless stream of documents that is never held as a whole: block by block, shuffled, dealt out to lanes.

A block is some documents of the corpus one after the other, and the next one begins where it ends. Inside a block the documents
are shuffled, numbered on, and each goes to the lane that was given the fewest bytes so far, so that lanes use the stream up
alike. All of this depends on the corpus and the seed only, and it can begin again at any block.
"""

import heapq
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ftc.data.corpus import Corpus
from ftc.data.lanes import LANES
from ftc.data.sources import BadRecord, Place
from ftc.data.stored_windows import ended
from ftc.errors import FtcError

BLOCK_DOCUMENTS, BLOCK_BYTES = 1024, 16 << 20  # a block ends with the first document that reaches one of them
_REPORTED = 5  # bad records of each source that are logged one by one
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Block:
    """Where a block begins: the epoch, the place in it, the number of its first document, counted over epochs, and how
    many bytes more each lane was given than the least."""

    epoch: int = 0
    place: Place = None
    first: int = 0
    given: tuple[int, ...] = (0,) * LANES

    def as_json(self) -> tuple[Any, ...]:
        return self.epoch, self.place, self.first, self.given

    @classmethod
    def from_json(cls, values: Sequence[Any]) -> "Block":
        epoch, place, first, given = values
        return cls(epoch, place, first, tuple(given))


@dataclass(frozen=True)
class Dealt:
    """A document of a lane."""

    number: int
    lane: int
    text: str
    block: Block


@dataclass(frozen=True)
class DocumentStream:
    """The endless stream of a corpus; bad records raise FtcError or, with `skip_bad`, are logged."""

    corpus: Corpus
    title: str
    seed: int
    skip_bad: bool = False
    max_epochs: int = 0

    def blocks(self, block: Block = Block()) -> Iterator[list[Dealt]]:
        """Blocks from `block` on, endlessly.

        Raises FtcError for a corpus with fewer documents than lanes, FtcFailure after `max_epochs`.
        """
        bad = 0
        while True:
            texts, size, place = [], 0, block.place
            for record, place in self.corpus.shuffled(self.seed, block.epoch, block.place):
                if isinstance(record, BadRecord):
                    bad += 1
                    self._report(record, bad)
                elif record.text:
                    texts.append(record.text)
                    size += len(record.text.encode())
                if len(texts) == BLOCK_DOCUMENTS or size >= BLOCK_BYTES:
                    dealt, given = self._deal(texts, block)
                    yield dealt
                    block = Block(block.epoch, place, block.first + len(texts), given)
                    texts, size = [], 0
            if block.epoch == 0 and block.first + len(texts) < LANES:
                raise FtcError(
                    f"the source {self.title!r} holds {block.first + len(texts)} documents, and a stream needs at least {LANES}; "
                    "drop streaming, as so little text is better tokenized up front"
                )
            if texts:
                dealt, given = self._deal(texts, block)
                yield dealt
                block = Block(block.epoch, place, block.first + len(texts), given)
            block = self._next_epoch(block)

    def _next_epoch(self, block: Block) -> Block:
        if block.place is None:
            raise FtcError(f"the source {self.title!r} holds no text any more; put its files back")
        if self.max_epochs and block.epoch + 1 >= self.max_epochs:
            raise ended(self.title, self.max_epochs)
        return Block(block.epoch + 1, None, block.first, block.given)

    def _deal(self, texts: list[str], block: Block) -> tuple[list[Dealt], tuple[int, ...]]:
        """The block's documents, dealt out, and what each lane was given after them, above the least."""
        order = np.random.default_rng([self.seed, block.first]).permutation(len(texts))
        heap = [(given, lane) for lane, given in enumerate(block.given)]
        heapq.heapify(heap)
        dealt = []
        for number, index in enumerate(order, block.first):
            given, lane = heap[0]
            heapq.heapreplace(heap, (given + len(texts[index].encode()), lane))
            dealt.append(Dealt(number, lane, texts[index], block))
        least = heap[0][0]
        return dealt, tuple(given - least for _, given in sorted((lane, given) for given, lane in heap))

    def _report(self, record: BadRecord, count: int) -> None:
        if not self.skip_bad:
            raise FtcError(record.message)
        if count <= _REPORTED:
            more = "; further ones are not named" if count == _REPORTED else ""
            log.warning("left out of %s: %s%s", self.title, record.message, more)


class Dealer:
    """Hands the stream's documents to some lanes, each in order, and holds those that other lanes have yet to ask for."""

    def __init__(self, stream: DocumentStream, lanes: Sequence[int], block: Block):
        self._blocks = stream.blocks(block)
        self._waiting: dict[int, deque[Dealt]] = {lane: deque() for lane in lanes}

    def next(self, lane: int) -> Dealt:
        """The lane's next document."""
        while not self._waiting[lane]:
            for document in next(self._blocks):
                if document.lane in self._waiting:
                    self._waiting[document.lane].append(document)
        return self._waiting[lane].popleft()
