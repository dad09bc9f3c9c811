"""Measure a model on text: nats per token, perplexity and bits per byte, per source."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ftc.data.tokens import start_id, text_ids
from ftc.errors import FtcError

# Shapes: B windows in a batch, T tokens of a window, V vocabulary.
IGNORED = -100  # PyTorch's default ignore_index


def logits_of(output: Any) -> Tensor:
    """The logits in a model's output: the tensor itself, its `.logits`, a mapping's "logits", or a tuple's first element."""
    if isinstance(output, Tensor):
        return output
    if getattr(output, "logits", None) is not None:
        return output.logits
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        return output[0]
    raise FtcError(f"the model returned a {type(output).__name__} without logits; return a tensor, .logits, or a tuple")


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    sources: Mapping[str, Sequence[str]],
    *,
    context: int = 256,
    batch: int = 16,
    stride: int | None = None,
    progress: bool = True,
) -> dict[str, dict[str, float | int]]:
    """Score every token of every text exactly once, each with at most `context` tokens before it.

    A text is scored after the tokenizer's beginning-of-text token (end-of-text where there is none); windows of `context`
    tokens move by `stride` (default: half), so a scored token sees at least `context - stride` tokens where they exist.
    Works on any module that takes `input_ids` [B, T] int64 and returns logits; windows are padded on the right, which a
    causal model cannot see. The model's train or eval mode is restored; nothing else is changed.

    Returns {source: {"nats_per_token", "perplexity", "bits_per_byte", "nats", "tokens", "bytes"}}; bytes are UTF-8.
    Raises FtcError for a source without text, or a token id outside the model's vocabulary.
    """
    tokenized = {
        name: ([text_ids(tokenizer, text) for text in texts], sum(len(text.encode()) for text in texts))
        for name, texts in sources.items()
    }
    return _evaluate(model, tokenizer, tokenized, context, batch, stride, progress)


def evaluate_ids(
    model: nn.Module,
    tokenizer: Any,
    documents: Sequence[Sequence[int]],
    num_bytes: int,
    *,
    name: str = "validation",
    context: int = 256,
    batch: int = 16,
    stride: int | None = None,
    progress: bool = True,
) -> dict[str, float | int]:
    """`evaluate` for one source that is tokenized already: ids of each document, and the size of their text in bytes."""
    return _evaluate(model, tokenizer, {name: (documents, num_bytes)}, context, batch, stride, progress)[name]


def _evaluate(
    model: nn.Module,
    tokenizer: Any,
    sources: Mapping[str, tuple[Sequence[Sequence[int]], int]],
    context: int,
    batch: int,
    stride: int | None,
    progress: bool,
) -> dict[str, dict[str, float | int]]:
    stride = stride or max(1, context // 2)
    if context < 1 or batch < 1 or not 1 <= stride <= context:
        raise FtcError(f"context {context}, batch {batch}, stride {stride}: need 1 <= stride <= context and batch >= 1")
    start = start_id(tokenizer)
    opening = [] if start is None else [start]
    plans = {}
    for name, (documents, _) in sources.items():
        plans[name] = [w for ids in documents for w in _windows([*opening, *map(int, ids)], context, stride)]
        if not plans[name]:
            raise FtcError(f"the source {name!r} holds no text to evaluate")
    results = {}
    training = model.training
    model.eval()
    try:
        with progress_bar(progress) as bar:
            for name, windows in plans.items():
                task = bar.add_task(f"evaluate {name}", total=sum(w.num_scored for w in windows))
                nats, tokens = 0.0, 0
                for part in _batches(windows, batch):
                    part_nats, part_tokens = _score(model, part)
                    nats, tokens = nats + part_nats, tokens + part_tokens
                    bar.update(task, completed=tokens)
                results[name] = summary(nats, tokens, sources[name][1])
    finally:
        model.train(training)
    return results


@dataclass(frozen=True)
class _Window:
    ids: list[int]  # inputs and the last target: one more than the inputs
    num_scored: int  # how many of the last targets count


def _windows(ids: list[int], context: int, stride: int) -> Iterator[_Window]:
    """Windows of at most `context` inputs over `ids`, whose scored ends partition the targets ids[1:]."""
    num_targets, scored = len(ids) - 1, 0
    while scored < num_targets:
        end = min(scored + (stride if scored else context), num_targets)
        start = max(0, end - context)
        yield _Window(ids[start : end + 1], end - scored)
        scored = end


def _batches(windows: list[_Window], batch: int) -> Iterator[list[_Window]]:
    """Batches of windows of like length, longest first, so that padding is small."""
    ordered = sorted(windows, key=lambda window: -len(window.ids))
    for start in range(0, len(ordered), batch):
        yield ordered[start : start + batch]


@torch.no_grad()
def _score(model: nn.Module, windows: list[_Window]) -> tuple[float, int]:
    """Total nats and number of the scored tokens of one batch."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    length = max(len(window.ids) for window in windows) - 1
    inputs_BT = torch.zeros(len(windows), length, dtype=torch.long)
    targets_BT = torch.full((len(windows), length), IGNORED)
    for row, window in enumerate(windows):
        ids = torch.tensor(window.ids)
        size = len(ids) - 1
        inputs_BT[row, :size] = ids[:-1]
        targets_BT[row, size - window.num_scored : size] = ids[-window.num_scored :]
    logits_BTV = logits_of(model(input_ids=inputs_BT.to(device)))
    targets_BT = targets_BT.to(logits_BTV.device)
    scored = targets_BT != IGNORED
    wanted = targets_BT[scored]
    if int(wanted.max()) >= logits_BTV.shape[-1]:
        raise FtcError(
            f"the tokenizer gave id {int(wanted.max())}, but the model's vocabulary has {logits_BTV.shape[-1]}; "
            "use the tokenizer that the model was trained with"
        )
    nats = nn.functional.cross_entropy(logits_BTV[scored].float(), wanted, reduction="none")
    return float(nats.double().sum()), len(wanted)


def summary(nats: float, tokens: int, num_bytes: int) -> dict[str, float | int]:
    """What `evaluate` returns for a source, from its total in nats, its tokens, and its size in bytes."""
    per_token = nats / tokens
    return {
        "nats_per_token": per_token,
        "perplexity": math.exp(per_token) if per_token < 700 else math.inf,
        "bits_per_byte": nats / math.log(2) / num_bytes,
        "nats": nats,
        "tokens": tokens,
        "bytes": num_bytes,
    }


def progress_bar(enabled: bool, unit: str = "tokens"):
    """rich's progress bar on stderr, counting `unit`; silent where it is not `enabled`."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), disable=not enabled)
