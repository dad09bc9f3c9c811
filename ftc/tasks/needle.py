"""Needle: one sentence of another matter hidden in real text, asked about at its end (after Kamradt, 2023)."""

import random
import re
from collections.abc import Sequence
from typing import Any

from ftc.errors import FtcError
from ftc.tasks.prompts import Parts, Prompt, assembled, check_depth, room, tokens

_NAMES = ("Mira", "Tomas", "Ilse", "Jonas", "Petra", "Anton")
_THINGS = ("lantern", "compass", "violin", "ladder", "kettle", "telescope")
_PLACES = ("cellar", "attic", "garden", "harbour", "library", "stable", "tower", "kitchen")
_PIECE = re.compile(r".*?(?:[.!?]\s+|\n+)|.+", re.DOTALL)


class Haystack:
    """Real text, tokenized piece by piece (sentences, lines), so that a needle goes between two of them."""

    def __init__(self, tokenizer: Any, texts: Sequence[str]):
        self.pieces = [ids for text in texts for piece in _PIECE.findall(text) if (ids := tokens(tokenizer, piece))]
        self.num_tokens = sum(map(len, self.pieces))

    def cut(self, count: int, depth: float, draw: random.Random) -> tuple[list[int], list[int]]:
        """`count` tokens of text in a row, from a piece that is drawn, in two parts: up to the border of pieces nearest to `depth`, and the rest."""
        if count > self.num_tokens:
            raise FtcError(f"the text holds {self.num_tokens} tokens; prompts of this length need {count}: give more text with --data")
        first = draw.randrange(len(self.pieces))
        ids: list[int] = []
        borders = [0]
        for piece in (*self.pieces[first:], *self.pieces[:first]):
            ids += piece
            borders.append(min(len(ids), count))
            if len(ids) >= count:
                break
        place = min(borders, key=lambda border: abs(border - depth * count))
        return ids[:place], ids[place:count]


def needle(tokenizer: Any, haystack: Haystack, length: int, depth: float, seed: int) -> Prompt:
    """A prompt of exactly `length` tokens, answer included, with a sentence hidden at about `depth` of the text.

    The same arguments give the same prompt. FtcError where `length` has no room, or the text is too short.
    """
    check_depth(depth)
    draw = random.Random(f"needle {seed} {length} {depth:.6f}")
    name, thing, place = (draw.choice(words) for words in (_NAMES, _THINGS, _PLACES))
    sentence = f" {name} keeps the {thing} in the"
    parts = Parts("", (sentence, ".\n"), f"\nQuestion: where does {name} keep the {thing}? Answer:{sentence}", f" {place}")
    return assembled(tokenizer, parts, *haystack.cut(room(tokenizer, parts, length), depth, draw))
