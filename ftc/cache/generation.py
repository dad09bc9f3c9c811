"""Text from a cached program: prompts in chunks, then a token at a time, for one sequence or many of different lengths.

Legend: B sequences of a call, V vocabulary.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ftc.cache.paged import PagedCache, cached_by
from ftc.cache.step import CompiledStep
from ftc.capture.program import Program, capture
from ftc.errors import FtcError

CHUNK = 512  # prompt tokens a call
PASSES = ("insert-kv-cache", ("absorb-mla", {"expect": "any"}))
FUSIONS = (("fuse-qkv", {"expect": "any"}), ("fuse-gate-up", {"expect": "any"}))  # fewer products of one row each, for a compiled step


def with_cache(model, passes: Sequence = PASSES, fused: bool = False) -> Program:
    """The model as a program that continues texts from a cache, each rewrite proved; a program that does so already is returned as it is.

    `fused` stacks projections of one input first, which takes memory for the stacked weights beside the model's own. Raises FtcError (FtcFailure) for a model that no cache can continue, with the place that cannot follow."""
    from ftc.rewrite.pipeline import rewrite

    if cached_by(model) is not None:
        return model
    training = model.training
    model.eval()
    try:
        program = model if isinstance(model, Program) else capture(model, {"input_ids": torch.ones(2, 12, dtype=torch.int64, device=device_of(model))})
        program = rewrite(program, [*(FUSIONS if fused else ()), *passes])
    finally:
        model.train(training)
    return program.eval()


def device_of(model: torch.nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@torch.no_grad()
def continue_text(program: Program, prompt: Sequence[int], max_new_tokens: int, choose, compiled: bool = False) -> Iterator[int]:
    """The tokens that `choose(logits [V])` picks one after the other (None: the likeliest); the caller stops when it has enough.

    Memory is taken for the prompt and `max_new_tokens` at once. With `compiled` the prompt runs through compiled regions and each token through one
    compiled graph. Raises FtcError where the model has fewer positions than the text would take.
    """
    size = int(cached_by(program)["options"].get("block_size", 16))
    columns = -(-(len(prompt) + max_new_tokens) // size)
    cache = PagedCache(program, columns + 1)
    sequence = cache.add()
    cache.reserve({sequence: len(prompt) + max(max_new_tokens - 1, 0)})
    if compiled:
        program.compile(dynamic=True)
    logits = cache.prefill({sequence: list(prompt)}, CHUNK)[sequence]
    step, follow = None, choose is None
    choose = choose or greedy
    token = choose(logits)
    for left in reversed(range(max_new_tokens)):
        yield token
        if left == 0:
            return
        if compiled and step is None:
            step = _joined(cache, [sequence], columns)
            token = choose(step.forward([token])[0])
        elif compiled and follow:
            token = step.follow()[0]
        else:
            token = choose(step.forward([token])[0] if compiled else cache.forward({sequence: [token]})[sequence][-1])


@torch.no_grad()
def generate_batch(
    program: Program, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, end: int | None = None, compiled: bool = False, chunk: int = CHUNK
) -> list[list[int]]:
    """Greedy continuations of prompts of any lengths, all at once: each ends at the token `end` (left out) or after `max_new_tokens`.

    Memory is taken for the longest case. Raises FtcError for an empty prompt and for more tokens than the model has positions.
    """
    if max_new_tokens < 0:
        raise FtcError(f"max_new_tokens {max_new_tokens} must not be negative")
    if not prompts or max_new_tokens == 0:
        return [[] for _ in prompts]
    size = int(cached_by(program)["options"].get("block_size", 16))
    columns = max(-(-(len(p) + max_new_tokens) // size) for p in prompts)
    cache = PagedCache(program, sum(-(-(len(p) + max_new_tokens) // size) for p in prompts) + 1)
    sequences = [cache.add() for _ in prompts]
    cache.reserve({s: len(p) + max_new_tokens - 1 for s, p in zip(sequences, prompts, strict=True)})
    logits = cache.prefill({s: list(p) for s, p in zip(sequences, prompts, strict=True)}, chunk)
    made: dict[int, list[int]] = {s: [] for s in sequences}
    live = {s: int(logits[s].argmax()) for s in sequences}
    step = _joined(cache, sequences, columns) if compiled else None
    while True:
        live = {s: token for s, token in live.items() if token != end}
        for s, token in live.items():
            made[s].append(token)
        live = {s: token for s, token in live.items() if len(made[s]) < max_new_tokens}
        if not live:
            return [made[s] for s in sequences]
        if step is None:
            logits = {s: rows[-1] for s, rows in cache.forward({s: [token] for s, token in live.items()}).items()}
        else:
            for row, s in enumerate(sequences):
                if s not in live:
                    step.leave(row)
            rows = step.forward([live.get(s, 0) for s in sequences])
            logits = dict(zip(sequences, rows, strict=True))
        best = torch.stack([logits[s] for s in live]).argmax(-1).tolist()
        live = dict(zip(live, best, strict=True))


def _joined(cache: PagedCache, sequences: list[int], columns: int) -> CompiledStep:
    step = CompiledStep(cache, len(sequences), 1, columns)
    for row, sequence in enumerate(sequences):
        step.join(row, sequence)
    return step


def greedy(logits: Tensor) -> int:
    """The likeliest token."""
    return int(logits.argmax())
