"""What `ftc evaluate` does for the tasks passkey, needle and perplexity."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ftc.commands.output import print_json, table
from ftc.errors import FtcError

GRIDS = ("passkey", "needle")
_TOKENS_AT_A_TIME = 1 << 14  # of prompts that run together


def numbers(option: str, text: str, kind: type, low: float, high: float) -> list[Any]:
    """`text`, numbers with commas between, in order. FtcError for what is no number of `kind` from `low` to `high`, or stands twice."""
    found = []
    for part in text.split(","):
        try:
            value = kind(part.strip())
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            valid = f"from {low:g} to {high:g}" if high < float("inf") else f"of at least {low:g}"
            raise FtcError(f"{option} {text!r}: {part.strip()!r} is no {'whole number' if kind is int else 'number'} {valid}; write them with commas between")
        if value in found:
            raise FtcError(f"{option} {text!r}: {part.strip()} stands there twice")
        found.append(value)
    return found


def check_grid(lengths: str, depths: str, out: Path | None) -> tuple[list[int], list[float]]:
    """The lengths and depths that were written. FtcError where they, or the picture's name, are wrong."""
    from ftc.tasks.picture import check_picture

    if out is not None:
        check_picture(out)
    return numbers("--lengths", lengths, int, 2, float("inf")), numbers("--depths", depths, float, 0, 1)


def show_grid(
    task: str, model: str, loaded: Any, tokenizer: Any, sources: Mapping[str, Sequence[str]], lengths: list[int], depths: list[float],
    seeds: int, seed: int, batch: int, out: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Measure a grid, print it as a table or JSON, and write the picture where one is asked for."""
    from ftc.tasks.grid import measure_grid

    if task == "passkey":
        from ftc.tasks.passkey import passkey

        def make(length: int, depth: float, number: int):
            return passkey(tokenizer, length, depth, number)
    else:
        from ftc.tasks.needle import Haystack, needle

        haystack = Haystack(tokenizer, [text for texts in sources.values() for text in texts])

        def make(length: int, depth: float, number: int):
            return needle(tokenizer, haystack, length, depth, number)

    at_once = max(1, min(batch, _TOKENS_AT_A_TIME // max(lengths)))
    drawn = range(seed, seed + seeds)
    shown = sys.stderr.isatty() and not as_json
    grid = measure_grid(loaded, make, task=task, lengths=lengths, depths=depths, seeds=drawn, batch=at_once, progress=shown)
    if out is not None:
        from ftc.tasks.picture import write_picture

        write_picture(out, grid, model)
    if as_json:
        print_json({"model": model, **grid.as_dict(), "seeds": list(drawn), "picture": None if out is None else str(out)})
        return
    rows = [(f"{depth:.0%}", *(f"{a:.0%}" for a in row)) for depth, row in zip(grid.depths, grid.accuracies, strict=True)]
    title = f"{task}: {grid.accuracy:.1%} found, {seeds} prompts a cell"
    table(("depth", *(f"{length:,} tokens" for length in grid.lengths)), rows, title=title, right=range(1, len(lengths) + 1))
    if out is not None:
        print(f"written: {out}")


def show_perplexity(
    model: str, loaded: Any, tokenizer: Any, sources: Mapping[str, Sequence[str]], context: int, stride: int | None, batch: int, as_json: bool
) -> None:
    """Measure perplexity over sliding windows and print it as a table or JSON."""
    from ftc.tasks.perplexity import sliding_perplexity

    stride = stride or max(1, context // 2)
    shown = sys.stderr.isatty() and not as_json
    results = sliding_perplexity(loaded, tokenizer, sources, context=context, stride=stride, batch=batch, progress=shown)
    if as_json:
        print_json({"model": model, "context": context, "stride": stride, "sources": results})
        return
    rows = (
        (name, f"{r['nats_per_token']:.4f}", f"{r['perplexity']:.4g}", f"{r['bits_per_byte']:.4f}", r["tokens"], r["bytes"])
        for name, r in results.items()
    )
    title = f"windows of {context} tokens, each {stride} on: every token after at least {context - stride} others, where they exist"
    table(("source", "nats per token", "perplexity", "bits per byte", "tokens", "bytes"), rows, title=title, right=(1, 2, 3, 4, 5))
