"""The tokenizer.bin of llama2.c: a scored vocabulary, greedy merging, bytes for what it lacks.

    int32                       longest piece, in bytes
    per token: float32, int32   score, length of the piece
               bytes            the piece, UTF-8

Token 0 is unknown, 1 begins a text, 2 ends it, 3 to 258 are the bytes 0 to 255. A text is encoded from single
characters by merging, again and again, the neighbours whose joint piece has the highest score (leftmost first), as
SentencePiece's BPE does; a space goes before the text. (https://github.com/karpathy/llama2.c, run.c)
"""

import heapq
import re
import struct
from collections.abc import Sequence
from pathlib import Path

from ftc.errors import FtcError

BOS_ID, EOS_ID, FIRST_BYTE_ID = 1, 2, 3
_MAX_KNOWN_WORDS = 100_000
_WORDS = re.compile(r" *[^ ]+| +")
_BYTE_PIECE = re.compile(rb"<0x([0-9A-Fa-f]{2})>")


class Llama2cTokenizer:
    """Encodes and decodes; the interface is that of `ftc.data.tokenizer.load_tokenizer`."""

    bos_id = BOS_ID
    eos_id = EOS_ID

    def __init__(self, pieces: Sequence[bytes], scores: Sequence[float]):
        if len(pieces) < FIRST_BYTE_ID + 256:
            raise FtcError(
                f"the tokenizer has {len(pieces)} tokens; it needs 259 (3 special ones and 256 bytes) at least"
            )
        self.pieces, self.scores = list(pieces), list(scores)
        self._ids: dict[bytes, int] = {}
        for token, piece in enumerate(pieces):
            self._ids.setdefault(piece, token)
        self._pieces_stay_in_words = not any(re.search(rb"[^ ] ", piece) for piece in pieces)
        self._known_words: dict[str, list[int]] = {}

    @classmethod
    def from_file(cls, path: str | Path) -> "Llama2cTokenizer":
        """Read a tokenizer.bin. Raises FtcError when it is missing, truncated or something else."""
        path = Path(path)
        if not path.is_file():
            raise FtcError(f"{path} does not exist")
        data, offset = path.read_bytes(), 4
        pieces, scores = [], []
        try:
            (longest,) = struct.unpack_from("<i", data)
            while offset < len(data):
                score, size = struct.unpack_from("<fi", data, offset)
                piece = data[offset + 8 : offset + 8 + size]
                if not 0 <= size <= longest or len(piece) < size:
                    raise FtcError(f"token {len(pieces)} claims {size} bytes")
                pieces.append(piece)
                scores.append(score)
                offset += 8 + size
            return cls(pieces, scores)
        except (struct.error, FtcError) as error:
            raise FtcError(f"{path} is no complete llama2.c tokenizer ({error}); copy it again") from error

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without the token that begins a text."""
        if not text:
            return []
        text = " " + text if b" " in self._ids else text
        return [token for word in self._words(text) for token in self._encode_word(word)]

    def _words(self, text: str) -> list[str]:
        """Cut where a space follows another character, if no piece reaches across such a place: words then merge apart."""
        return _WORDS.findall(text) if self._pieces_stay_in_words else [text]

    def _encode_word(self, word: str) -> list[int]:
        tokens = self._known_words.get(word)
        if tokens is None:
            tokens = []
            for character in word:
                piece = character.encode("utf-8", errors="replace")
                token = self._ids.get(piece)
                tokens += [token] if token is not None else [FIRST_BYTE_ID + byte for byte in piece]
            tokens = self._merge(tokens)
            if len(self._known_words) < _MAX_KNOWN_WORDS:
                self._known_words[word] = tokens
        return tokens

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without special tokens and without the space that encoding puts before a text."""
        data = b""
        for token in ids:
            if not 0 <= token < len(self.pieces):
                raise FtcError(f"token {token} is outside the vocabulary of {len(self.pieces)}")
            if token >= FIRST_BYTE_ID:
                byte = _BYTE_PIECE.fullmatch(self.pieces[token])
                data += bytes([int(byte[1], 16)]) if byte else self.pieces[token]
        return data.removeprefix(b" ").decode("utf-8", errors="replace")

    def _merge(self, tokens: list[int]) -> list[int]:
        """Greedy merging with a heap of candidate pairs over a linked list: O(n log n), same result as rescanning."""
        end = len(tokens)
        following, previous = list(range(1, end + 1)), list(range(-1, end - 1))
        alive = [True] * end
        candidates: list[tuple[float, int, int, int, int]] = []

        def propose(left: int) -> None:
            right = following[left]
            if left >= 0 and right < end:
                merged = self._ids.get(self.pieces[tokens[left]] + self.pieces[tokens[right]])
                if merged is not None:
                    heapq.heappush(candidates, (-self.scores[merged], left, right, merged, tokens[left]))

        for position in range(end):
            propose(position)
        while candidates:
            _, left, right, merged, left_token = heapq.heappop(candidates)
            is_current = alive[left] and following[left] == right and tokens[left] == left_token
            if not (is_current and self._ids.get(self.pieces[left_token] + self.pieces[tokens[right]]) == merged):
                continue  # one of the two has been merged with another neighbour since
            tokens[left] = merged
            alive[right] = False
            following[left] = following[right]
            if following[right] < end:
                previous[following[right]] = left
            if previous[left] >= 0:
                propose(previous[left])
            propose(left)
        return [token for token, kept in zip(tokens, alive, strict=True) if kept]
