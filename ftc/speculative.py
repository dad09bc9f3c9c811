"""Greedy decoding with drafts (Leviathan et al., 2023): the model's own modules guess ahead, one run of the model checks all guesses.

Each token is the model's own likeliest next one, given all before it, exactly as in plain greedy decoding: a guess is kept only where
it is that token. What changes is how many runs of the model it takes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ftc.draft import Drafter
from ftc.errors import FtcError
from ftc.generate import _prompt_ids, _TextStream


@dataclass
class Accepted:
    """What speculation did: `runs` of the model, tokens `drafted` and of those `accepted`, `tokens` given out."""

    runs: int = 0
    drafted: int = 0
    accepted: int = 0
    tokens: int = 0

    def as_dict(self) -> dict[str, float | int]:
        """JSON-ready, with the share of drafts that were accepted and the tokens a run of the model."""
        share = self.accepted / self.drafted if self.drafted else 0.0
        return {**vars(self), "acceptance": share, "tokens_per_run": self.tokens / self.runs if self.runs else 0.0}


def generate_speculatively(
    model: nn.Module,
    tokenizer: Any,
    prompt: str = "",
    max_new_tokens: int = 128,
    *,
    depth: int | None = None,
    on_text: Callable[[str], None] | None = None,
) -> tuple[str, Accepted]:
    """The model's greedy continuation of `prompt`, as `ftc.generate.generate` gives it, and what speculation did.

    `depth`: tokens to guess ahead, at most as many as there are modules. The model's train or eval mode is restored. Raises
    FtcError for a model without modules, bad settings, and an empty prompt with a tokenizer without a start.
    """
    if max_new_tokens < 0 or (depth is not None and depth < 1):
        raise FtcError(f"max_new_tokens {max_new_tokens}, depth {depth}: need 0 or more tokens, and a depth of at least 1")
    ids = _prompt_ids(tokenizer, prompt)
    stream, counts = _TextStream(tokenizer, ids, on_text), Accepted()
    training = model.training
    model.eval()
    try:
        for token in _continue(Drafter(model), ids, max_new_tokens, depth, tokenizer.eos_id, counts):
            stream.push(token)
    finally:
        model.train(training)
    return stream.close(), counts


def _continue(
    drafter: Drafter, ids: list[int], max_new_tokens: int, depth: int | None, eos_id: int | None, counts: Accepted
) -> Iterator[int]:
    if max_new_tokens == 0:
        return
    ids, look = list(ids), drafter.look(ids)
    chosen, counts.runs = [int(look.logits[-1].argmax())], 1
    while True:
        for token in chosen:
            if token == eos_id:
                return
            ids.append(token)
            counts.tokens += 1
            yield token
            if counts.tokens == max_new_tokens:
                return
        count = min(depth or drafter.depth, max_new_tokens - counts.tokens - 1)
        guesses = drafter.propose(look, ids, count) if count > 0 else []
        look = drafter.look([*ids, *guesses])
        own = look.logits[len(ids) - 1 :].argmax(-1).tolist()  # after the last token, after each guess
        kept = next((n for n, guess in enumerate(guesses) if guess != own[n]), len(guesses))
        chosen = own[: kept + 1]
        counts.runs, counts.drafted, counts.accepted = counts.runs + 1, counts.drafted + len(guesses), counts.accepted + kept
