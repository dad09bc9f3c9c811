"""Passkey: a number hidden in a text that says nothing, asked for at its end (after Mohtashami and Jaggi, 2023)."""

import random
from typing import Any

from ftc.tasks.prompts import Parts, Prompt, assembled, check_depth, room, tokens

FILLER = (" The river runs to the sea.", " Clouds pass over the hills.", " Day follows night.", " A road leads on, and another leads back.")
DIGITS = 5


def passkey(tokenizer: Any, length: int, depth: float, seed: int) -> Prompt:
    """A prompt of exactly `length` tokens, answer included, with a five-digit key at `depth` (0: first, 1: last) of the filler.

    The same arguments give the same prompt. FtcError where `length` has no room for the key and the question.
    """
    check_depth(depth)
    draw = random.Random(f"passkey {seed} {length} {depth:.6f}")
    key = str(draw.randrange(10 ** (DIGITS - 1), 10**DIGITS))
    parts = Parts(
        "A number is hidden in this text. Keep it in mind.", (" The pass key is", ". Keep it in mind."), " What is the pass key? The pass key is", f" {key}"
    )
    total = room(tokenizer, parts, length)
    sentences = [tokens(tokenizer, sentence) for sentence in FILLER]
    before = round(depth * total)
    return assembled(tokenizer, parts, _filler(sentences, before, draw), _filler(sentences, total - before, draw))


def _filler(sentences: list[list[int]], count: int, draw: random.Random) -> list[int]:
    """The last `count` tokens of the sentences in a row, over and over, from one that is drawn."""
    ids: list[int] = []
    number = draw.randrange(len(sentences))
    while len(ids) < count:
        ids += sentences[number % len(sentences)]
        number += 1
    return ids[len(ids) - count :]
