"""Prompts that end in an answer which stands somewhere in the text before it, as token ids of an exact length.

All parts are tokenized by themselves and joined as ids, so that the answer has the same ids in the text and at the end, and a prompt
has the length that was asked for to the token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ftc.data.tokens import start_id, text_ids
from ftc.errors import FtcError


@dataclass(frozen=True)
class Prompt:
    """Ids [T] of a text whose last `num_answer` tokens are the answer; `place` is where the hidden sentence begins."""

    ids: tuple[int, ...]
    num_answer: int
    place: int


@dataclass(frozen=True)
class Parts:
    """What a prompt is made of beside its filler: `opening`, the hidden sentence before and after its answer, and the `question`."""

    opening: str
    hidden: tuple[str, str]
    question: str
    answer: str


def tokens(tokenizer: Any, text: str) -> list[int]:
    """The ids of a piece of text inside a longer one, none for an empty one.

    Some tokenizers put a space before every text themselves; a space that the piece begins with is then left to them.
    """
    if text.startswith(" ") and text_ids(tokenizer, "b a") == [*text_ids(tokenizer, "b"), *text_ids(tokenizer, "a")]:
        text = text[1:]
    return text_ids(tokenizer, text) if text else []


def frame(tokenizer: Any, parts: Parts) -> tuple[list[int], list[int], list[int], list[int]]:
    """Ids of (start of text and opening, hidden sentence, question, answer)."""
    answer = tokens(tokenizer, parts.answer)
    if not answer:
        raise FtcError(f"the tokenizer has no token for the answer {parts.answer!r}")
    begin, end = parts.hidden
    start = start_id(tokenizer)
    opening = ([] if start is None else [start]) + tokens(tokenizer, parts.opening)
    return opening, tokens(tokenizer, begin) + answer + tokens(tokenizer, end), tokens(tokenizer, parts.question), answer


def room(tokenizer: Any, parts: Parts, length: int) -> int:
    """How many tokens of filler a prompt of `length` tokens holds. FtcError where there is no room."""
    taken = sum(map(len, frame(tokenizer, parts)))
    if length < taken:
        raise FtcError(f"a prompt of {length} tokens is too short: the question and the hidden sentence alone take {taken} tokens of this tokenizer")
    return length - taken


def assembled(tokenizer: Any, parts: Parts, before: Sequence[int], after: Sequence[int]) -> Prompt:
    """The prompt with filler `before` and `after` the hidden sentence."""
    opening, hidden, question, answer = frame(tokenizer, parts)
    ids = (*opening, *before, *hidden, *after, *question, *answer)
    return Prompt(tuple(map(int, ids)), len(answer), len(opening) + len(before))


def check_depth(depth: float) -> None:
    """FtcError unless 0 <= depth <= 1: at the beginning, at the end."""
    if not 0 <= depth <= 1:
        raise FtcError(f"depth {depth} is not between 0 (the beginning of the text) and 1 (its end)")
