"""The command that changes a model: rewrite."""

from pathlib import Path

import typer

from ftc.commands.output import console, print_json
from ftc.commands.shared import JSON, MODEL, SEED, TOKENIZER


def register(app: typer.Typer) -> None:
    app.command("rewrite")(rewrite)


def rewrite(
    model: str = MODEL,
    passes: str = typer.Option(
        ..., "--passes", help='Names in order, options in braces: "raise,gqa-to-mla{rank=448}".'
    ),
    out: Path = typer.Option(..., "--out", help="Folder for weights, graphs and certificates."),
    calibration: list[str] = typer.Option(
        None, "--calibration", help="Text for passes that calibrate, or self: drawn from the model; repeatable."
    ),
    tokenizer: Path = TOKENIZER,
    seed: int = SEED,
    check: bool = typer.Option(True, "--check/--no-check", help="Measure each pass against its contract."),
    as_json: bool = JSON,
) -> None:
    """Rewrite a model's graphs and weights with passes, prove each one, and save the result.

    [bold]Examples[/bold]

      ftc rewrite ./model --passes raise,fuse-qkv,fuse-gate-up --out out

      ftc rewrite preset:tiny --passes fuse-qkv --out out --json

      ftc rewrite ./model --passes 'gqa-to-mla{cache=0.5}' --calibration text.jsonl --out mla
    """
    from ftc.rewrite_folder import rewrite_folder

    report = rewrite_folder(
        model, passes, out, data=calibration or (), tokenizer=tokenizer, seed=seed, check=check, progress=not as_json
    )
    if as_json:
        print_json(report | {"folder": str(out)})
        return
    from ftc.rewrite.report import Report

    console().print(str(Report(report)), markup=False)
    console().print(f"saved in {out}; check it again with: ftc verify {out}", markup=False)
