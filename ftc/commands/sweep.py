"""The command that runs a pass over a grid of its options: sweep."""

import sys
from pathlib import Path

import typer

from ftc.commands.output import console, print_json, say, table
from ftc.commands.shared import JSON, MODEL, SEED, TOKENIZER, at_least


def register(app: typer.Typer) -> None:
    app.command("sweep")(sweep)


def sweep(
    model: str = MODEL,
    pass_: str = typer.Option(..., "--pass", help='The pass, with options that all points share: "gqa-to-mla{rotation=real}".'),
    grid: list[str] = typer.Option(..., "--grid", help="An option and its values: cache=0.25,0.5; repeatable, all combinations are run."),
    calibration: list[str] = typer.Option(
        ..., "--calibration", help="Text to calibrate on, a quarter kept apart to measure on, or self: drawn from the model. Repeatable."
    ),
    out: Path = typer.Option(..., "--out", help="Folder for what is measured; the same command continues in it."),
    tokenizer: Path = TOKENIZER,
    tokens: int = typer.Option(128, "--tokens", help="Tokens of a timed forward, and before a timed decode step."),
    repeats: int = typer.Option(20, "--repeats", help="How often each is timed; 0 times nothing."),
    check: bool = typer.Option(False, "--check/--no-check", help="Prove every rewrite, as ftc rewrite does."),
    seed: int = SEED,
    as_json: bool = JSON,
) -> None:
    """Run a pass at every point of a grid and draw what is lost against cache bytes and time.

    Points that are done are kept in the folder, so that an interrupted sweep goes on where it stopped. Impossible points are listed with the reason.

    [bold]Examples[/bold]

      ftc sweep ./model --pass gqa-to-mla --grid cache=0.25,0.375,0.5,0.75 --grid rotation=complex,real --calibration text.jsonl --out sweep/

      ftc sweep ./model --pass mha-to-gqa --grid groups=1,2,4,8 --calibration text.jsonl --out sweep/
    """
    from ftc.sweep_grid import axes_of, pass_of, points_of

    at_least(1, tokens=tokens)
    at_least(0, repeats=repeats)
    (name, fixed), axes = pass_of(pass_), axes_of(grid)
    points = points_of(name, fixed, axes)

    import ftc
    from ftc.evaluate import progress_bar
    from ftc.files import check_replaceable
    from ftc.open_model import check_model, example_inputs, find_tokenizer, open_model
    from ftc.rewrite_folder import SELF, calibration_batches, drawn_batches
    from ftc.sweep import KIND, Timed, text_of
    from ftc.sweep import sweep as run
    from ftc.sweep_picture import COLUMNS, rows_of, write_page

    check_model(model)
    check_replaceable(out, KIND)
    vocabulary, drawn = find_tokenizer(model, tokenizer), list(calibration) == [SELF]
    batches = None if drawn else calibration_batches(vocabulary, calibration)
    with progress_bar(sys.stderr.isatty() and not as_json, "points") as bar:
        task = bar.add_task("reading the model", total=len(points) + 1)
        program = open_model(model, seed=seed)
        if drawn:
            batches = drawn_batches(program, vocabulary, seed, lambda text: bar.update(task, description=text))
        if not hasattr(program, "describe"):
            bar.update(task, description="capturing the model")
            program = ftc.capture(program, example_inputs(program, seed=seed), inplace=True)

        def tell(done: int, text: str) -> None:
            bar.update(task, completed=done, description=text)

        about = {"model": str(model), "seed": seed}
        found = run(program, name, fixed, points, batches, out, about=about, timed=Timed(tokens, repeats), check=check, tell=tell)
    page = out / "sweep.html"
    title = f"{pass_} on {model}"
    write_page(page, title, f"{len(points)} points; forwards of {tokens} tokens, a decode step after as many, not compiled.", found, axes)
    if as_json:
        from dataclasses import asdict

        print_json({"model": model, "pass": name, "options": fixed, "grid": axes, "points": [asdict(p) for p in found], "picture": str(page)})
        return
    table((*axes, *COLUMNS), rows_of(found, list(axes)), title=title, right=range(len(axes), len(axes) + len(COLUMNS)))
    for point in found:
        if point.skipped:
            say(f"skipped {text_of(point.options)}: {point.skipped}")
        elif point.decode_note:
            say(f"{text_of(point.options)}: no decode step was timed: {point.decode_note}")
    console().print(f"written: {page}", markup=False)
