"""What the tests of data share: a tokenizer of bytes, and corpora made on the spot."""

from dataclasses import dataclass

import numpy as np

from ftc.data.document_stream import DocumentStream
from ftc.data.sources import BadRecord, Document
from ftc.data.tokens import TokenizedText, tokenize


@dataclass(frozen=True)
class Bytes:
    """Each byte is a token; 256 and 257 begin and end a text where they are set."""

    bos_id: int | None = None
    eos_id: int | None = 257

    vocab_size = 258

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


class Corpus:
    """Documents in memory, shuffled and read from any place like files."""

    def __init__(self, texts: list, title: str = "corpus"):
        self.texts, self.title = texts, title

    def read(self, start=None):
        return self._read(range(len(self.texts)), start)

    def shuffled(self, seed, epoch, start=None):
        return self._read(np.random.default_rng([seed, epoch]).permutation(len(self.texts)), start)

    def _read(self, order, start):
        for number in range(start or 0, len(order)):
            text = self.texts[order[number]]
            yield text if isinstance(text, BadRecord) else Document(text, "name"), number + 1

    def identity(self):
        return str(len(self.texts))


def texts(count: int, longest: int, seed: int = 0) -> list[str]:
    """Documents of distinct letters and 1 to `longest` bytes."""
    generator = np.random.default_rng(seed)
    return [
        "".join(map(chr, generator.integers(33, 127, generator.integers(1, longest + 1)))) for _ in range(count)
    ]


def stored(documents: list[str], tokenizer=Bytes()) -> TokenizedText:
    return tokenize(tokenizer, documents, "test")


def stream(documents: list, seed: int = 0, **options) -> DocumentStream:
    return DocumentStream(Corpus(documents), "stream", seed, **options)
