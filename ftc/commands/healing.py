"""The command that heals a converted model: heal."""

from pathlib import Path

import typer

from ftc.commands.output import console, print_json, table
from ftc.commands.shared import JSON


def register(app: typer.Typer) -> None:
    app.command("heal")(heal)


def heal(
    model: Path = typer.Argument(..., metavar="PROGRAM", help="The converted model: a folder that ftc rewrite wrote."),
    original: str = typer.Option(..., "--original", help="What it was converted from."),
    out: Path = typer.Option(..., "--out", help="Folder of the run; an interrupted one in it continues."),
    data: str = typer.Option("self", "--data", help="Text to distil on, or self: drawn from the original."),
    tokens: int = typer.Option(1_000_000, "--tokens", help="How many tokens to distil on."),
    seq_len: int = typer.Option(256, "--seq-len", help="Tokens of a window."),
    batch: int = typer.Option(16, "--batch", help="Windows a step."),
    parameters: str = typer.Option("all", "--parameters", help="all, or converted: those of the converted attentions alone."),
    stop_below: float = typer.Option(0.0, "--stop-below", help="End early when the KL, nats a token, is below this."),
    store: int = typer.Option(0, "--store", metavar="K", help="Run the original once and store its K likeliest tokens; 0: beside the training."),
    closed_form: bool = typer.Option(True, "--closed-form/--no-closed-form", help="Fit each converted layer's output first."),
    nproc: int = typer.Option(1, "--nproc", help="Processes on this machine; they share the model (FSDP2)."),
    change: list[str] = typer.Option(None, "--set", help="Change a key of the run: --set optimizer.lr=3e-4; repeatable."),
    seed: int = typer.Option(0, "--seed"),
    as_json: bool = JSON,
) -> None:
    """Bring a converted model back to what the original computes: a closed form, then distillation.

    [bold]Examples[/bold]

      ftc heal mla --original ./model --out healed

      ftc heal mla --original ./model --data text.jsonl --tokens 20000000 --store 32 --nproc 2 --out healed
    """
    from ftc.commands.pipeline import parse_changes
    from ftc.heal.heal import heal as run
    from ftc.heal.settings import HealSettings

    settings = HealSettings(tokens, seq_len, batch, parameters, closed_form=closed_form, stop_below=stop_below, store=store, nproc=nproc, seed=seed)
    found = run(model, original, out, settings, data=data, quiet=as_json, changes=parse_changes(change or []))
    if as_json:
        print_json(found)
        return
    rows = [(word, f"{found[word]:.4f}") for word in ("converted", "fitted", "healed") if word in found]
    table(("model", "KL(original || model), nats a token"), rows)
    console().print(f"{found['tokens']:,} tokens in {found['seconds']} s; the healed model is {found['program']}", markup=False)
