"""Perplexity over sliding windows: every token once, each after at least `context - stride` tokens where they exist."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ftc.errors import FtcError
from ftc.evaluate import evaluate
from ftc.tasks.grid import check_length


def sliding_perplexity(
    model: nn.Module,
    tokenizer: Any,
    sources: Mapping[str, Sequence[str]],
    *,
    context: int,
    stride: int,
    batch: int = 1,
    progress: bool = True,
) -> dict[str, dict[str, float | int]]:
    """`ftc.evaluate.evaluate` with windows of `context` tokens that move by `stride`; see there for what it returns.

    The smaller the stride, the more text before each token and the more work: 1 gives every token `context - 1` tokens.
    Raises FtcError for a context beyond the model's positions, and a stride that is not between 1 and the context.
    """
    if not 1 <= stride <= context:
        raise FtcError(f"stride {stride} is not between 1 and the context, {context}")
    check_length(model, context)
    return evaluate(model, tokenizer, sources, context=context, stride=stride, batch=batch, progress=progress)
