"""What `ftc evaluate --task mtp` and `ftc generate --speculative` print."""

from collections.abc import Mapping, Sequence
from typing import Any

from ftc.commands.output import print_json, say, table


def show_acceptance(
    model: str, loaded: Any, tokenizer: Any, sources: Mapping[str, Sequence[str]], context: int, batch: int, as_json: bool
) -> None:
    """Acceptance per depth and source, the measured costs, and the speed-up of each chain of drafts."""
    from ftc.acceptance import acceptance, costs, speed_up

    measured = acceptance(loaded, tokenizer, sources, context=context, batch=batch)
    cost = costs(loaded, context=context)
    gains = {name: speed_up(row, cost) for name, row in measured.items()}
    if as_json:
        rows = {name: row | {"speed_up": gains[name]} for name, row in measured.items()}
        print_json({"model": model, "task": "mtp", "context": context, "sources": rows, "costs": cost})
        return
    depths = range(1, len(cost["verify"]) + 1)
    columns = ("source", "depth", "accepted", "all up to it", "right", "places", "v", "d", "(1 + a) / (v + d)")
    rows = (
        (
            name,
            n,
            f"{row['acceptance'][n - 1]:.1%}",
            f"{row['chain'][n - 1]:.1%}",
            f"{row['accuracy'][n - 1]:.1%}",
            row["places"],
            f"{cost['verify'][n - 1]:.2f}",
            f"{cost['draft'][n - 1]:.2f}",
            f"{gains[name][n - 1]:.2f}x",
        )
        for name, row in measured.items()
        for n in depths
    )
    table(columns, rows, right=tuple(range(1, 9)))
    best = {name: max(depths, key=lambda n, g=gain: g[n - 1]) for name, gain in gains.items()}
    for name, n in best.items():
        gain = gains[name][n - 1]
        verdict = f"pays: {n} drafts at a time, {gain:.2f}x" if gain > 1 else f"does not pay: at best {gain:.2f}x"
        say(f"{name}: {verdict} (steps of {cost['step_s'] * 1e3:.1f} ms over {cost['context']} tokens, without a key-value cache)")


def speculate(model: str, loaded: Any, tokenizer: Any, prompt: str, max_tokens: int, depth: int | None, show, as_json: bool) -> None:
    """Greedy text with drafts, and how many of them were accepted."""
    from ftc.speculative import generate_speculatively

    text, counts = generate_speculatively(
        loaded, tokenizer, prompt, max_tokens, depth=depth, on_text=None if as_json else show
    )
    if as_json:
        print_json({"model": model, "prompt": prompt, "text": text, "temperature": 0.0, "speculation": counts.as_dict()})
        return
    show("\n")
    row = counts.as_dict()
    say(
        f"{row['accepted']} of {row['drafted']} drafts accepted ({row['acceptance']:.0%}), {row['tokens']} tokens in {row['runs']} "
        f"runs of the model: {row['tokens_per_run']:.2f} a run"
    )
