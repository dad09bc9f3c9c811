"""Continue a prompt with any model that maps input_ids to logits, by recomputing the whole text for each token, or from its cache."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ftc.data.tokens import start_id, text_ids
from ftc.errors import FtcError
from ftc.evaluate import logits_of

# Shapes: T tokens, V vocabulary.


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str = "",
    max_new_tokens: int = 128,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
    context: int | None = None,
    compiled: bool = False,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """The model's continuation of `prompt`, without the prompt itself.

    Greedy at temperature 0, else sampled with `seed`, from the `top_k` likeliest tokens when given. Stops at the
    tokenizer's end-of-text or after `max_new_tokens`. `context` bounds how many of the last tokens the model is given.
    A program that has been through insert-kv-cache continues from its cache, with `compiled` by compiled graphs; it keeps the whole text, so `context` is
    not for it. `on_text` receives the text piece by piece as it comes; the pieces join to the returned text. The model's train or
    eval mode is restored. Raises FtcError for bad settings, and for an empty prompt with a tokenizer without a start.
    """
    if (
        max_new_tokens < 0
        or temperature < 0
        or (top_k is not None and top_k < 1)
        or (context is not None and context < 1)
    ):
        raise FtcError(
            f"max_new_tokens {max_new_tokens}, temperature {temperature}, top_k {top_k}, context {context}: "
            "counts and temperature must not be negative, top_k and context at least 1"
        )
    from ftc.cache import cached_by

    ids = _prompt_ids(tokenizer, prompt)
    cached = cached_by(model) is not None
    if cached and context is not None:
        raise FtcError(f"context {context} bounds a text that is recomputed; this program continues from its cache, so leave it out")
    if compiled and not cached:
        raise FtcError("compiled generation needs a program with a cache: ftc.cache.with_cache(model)")
    stream = _TextStream(tokenizer, ids, on_text)
    training = model.training
    model.eval()
    try:
        how = (max_new_tokens, temperature, top_k, seed)
        end = tokenizer.eos_id
        for token in _from_cache(model, ids, *how, end, compiled) if cached else _continue(model, ids, *how, context, end):
            stream.push(token)
    finally:
        model.train(training)
    return stream.close()


def _prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    start = start_id(tokenizer)
    ids = ([] if start is None else [start]) + text_ids(tokenizer, prompt)
    if not ids:
        raise FtcError("the prompt is empty and the tokenizer has no start token; give a prompt")
    return ids


@torch.no_grad()
def _continue(
    model: nn.Module,
    prompt_ids: list[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    seed: int,
    context: int | None,
    eos_id: int | None,
) -> Iterator[int]:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt_ids)
    for _ in range(max_new_tokens):
        inputs_BT = torch.tensor([ids if context is None else ids[-context:]], device=device)
        token = _choose(logits_of(model(input_ids=inputs_BT))[0, -1].float().cpu(), temperature, top_k, generator)
        if token == eos_id:
            return
        ids.append(token)
        yield token


def _from_cache(
    program: nn.Module, ids: list[int], max_new_tokens: int, temperature: float, top_k: int | None, seed: int, end: int | None, compiled: bool
) -> Iterator[int]:
    from ftc.cache import continue_text

    generator = torch.Generator().manual_seed(seed)
    if max_new_tokens == 0:
        return
    drawn = None if temperature == 0 else lambda logits: _choose(logits.float().cpu(), temperature, top_k, generator)
    for token in continue_text(program, ids, max_new_tokens, drawn, compiled):
        if token == end:
            return
        yield token


def _choose(logits_V: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    """The next token id: the likeliest at temperature 0, else one draw from softmax(logits / temperature)."""
    if temperature == 0:
        return int(logits_V.argmax())
    if top_k is not None and top_k < len(logits_V):
        floor = logits_V.topk(top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < floor, float("-inf"))
    probabilities_V = torch.softmax(logits_V / temperature, dim=-1)
    return int(torch.multinomial(probabilities_V, 1, generator=generator))


class _TextStream:
    """Decodes growing ids, giving out only text that later tokens cannot change (a token may end inside a character)."""

    def __init__(self, tokenizer: Any, prompt_ids: list[int], on_text: Callable[[str], None] | None):
        self._tokenizer, self._ids, self._on_text = tokenizer, list(prompt_ids), on_text
        # The prompt's last tokens are decoded with each piece: some tokenizers drop a space at the start of a text.
        self._prompt_length = len(tokenizer.decode(self._ids))
        self._given = ""

    def push(self, token: int) -> None:
        self._ids.append(token)
        text = self._text()
        if not text.endswith("\ufffd"):
            self._give(text)

    def close(self) -> str:
        self._give(self._text())
        return self._given

    def _text(self) -> str:
        return self._tokenizer.decode(self._ids)[self._prompt_length :]

    def _give(self, text: str) -> None:
        piece = text[len(self._given) :]
        if piece and self._on_text is not None:
            self._on_text(piece)
        self._given = text
