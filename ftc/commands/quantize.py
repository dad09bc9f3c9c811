"""Commands about quantisation: sensitivity (what each product loses alone), torchao (a folder for transformers)."""

from pathlib import Path

import typer

from ftc.commands.output import console, print_json, table, working
from ftc.commands.shared import JSON, MODEL, SEED, TOKENIZER


def register(app: typer.Typer) -> None:
    app.command("sensitivity")(sensitivity)
    app.command("torchao")(torchao)


def sensitivity(
    model: str = MODEL,
    calibration: list[str] = typer.Option([], "--calibration", help="Text, a quarter kept apart to measure on, or self: drawn from the model. Repeatable."),
    formats: str = typer.Option("fp8,int8,int4", "--formats", help="What to try, such as int4-g64 or fp8-block-dynamic; separated by commas."),
    by: str = typer.Option("product", "--by", help="product, or layer."),
    rounding: str = typer.Option("calibrated", "--rounding", help="calibrated on the text, or nearest."),
    out: Path = typer.Option(None, "--out", help="The picture, an .html file."),
    tokenizer: Path = TOKENIZER,
    seed: int = SEED,
    as_json: bool = JSON,
) -> None:
    """What is lost when one product (or layer) alone is quantised: KL to the original, measured, in each of several formats.

    MODEL may be a program that [bold]ftc rewrite[/bold] quantised with max_kl or sensitivity: then what was measured is shown again, and --calibration is not read.

    [bold]Examples[/bold]

      ftc sensitivity ./model --calibration text.jsonl --out sensitivity.html

      ftc sensitivity ./model --calibration self --formats int4,int4-g64,int8 --by layer --json
    """
    from ftc.errors import FtcError, nearest
    from ftc.open_model import open_model
    from ftc.quantize.formats import Format
    from ftc.quantize.picture import joined, rows_of, write_page

    if out is not None and out.suffix != ".html":
        raise FtcError(f"--out {out} is a page; name an .html file")
    for word, value, valid in (("--by", by, ("product", "layer")), ("--rounding", rounding, ("calibrated", "nearest"))):
        if value not in valid:
            raise FtcError(f"{word} {value!r} is not known; {nearest(value, valid)}")
    asked = [Format.named(name.strip()) for name in formats.split(",") if name.strip()]
    with working(not as_json) as tell:
        program = open_model(model, seed=seed)
        entry = next((e for e in getattr(program, "_applied", ()) if e["pass"] == "quantize" and e.get("plans")), None)
        found, chosen, budget = joined(entry["plans"]) if entry is not None else (None, None, None)
        if entry is not None and found is None:
            raise FtcError(f"{model} is quantised already, and nothing was measured by product; run this on the model that it was made from")
        if found is None and not calibration:
            raise FtcError("sensitivity is measured on text: --calibration FILE, or self to draw it from the model")
        found = found or _measured(program, model, calibration, asked, by, rounding, tokenizer, seed, tell)
    if out is not None:
        write_page(out, f"Sensitivity of {model}", found, chosen, budget)
    if as_json:
        print_json({"model": model, "picture": None if out is None else str(out), **found})
        return
    columns = ("unit", "bytes", *(f"{word} {f}" for f in found["formats"] for word in ("KL", "bytes")), "chosen")
    table(columns, rows_of(found, chosen), right=range(1, len(columns) - 1))
    if out is not None:
        console().print(f"written: {out}", markup=False)


def _measured(program, model, calibration, formats, by, rounding, tokenizer, seed, tell) -> dict:
    import ftc
    from ftc.errors import FtcError
    from ftc.open_model import example_inputs, find_tokenizer
    from ftc.quantize.sensitivity import find_units, measure
    from ftc.rewrite.calibration import held_out
    from ftc.rewrite_folder import SELF, calibration_batches, drawn_batches

    vocabulary = find_tokenizer(model, tokenizer)
    batches = drawn_batches(program, vocabulary, seed, tell) if list(calibration) == [SELF] else calibration_batches(vocabulary, calibration)
    if not hasattr(program, "describe"):
        program = ftc.capture(program, example_inputs(program, seed=seed), inplace=True)
    program = ftc.rewrite(program, [("raise-moe", {"expect": "any"})], inplace=True)
    units = find_units(program, by)
    if not units:
        raise FtcError(f"{model} has no repeated blocks with products over weights")
    text, apart = held_out(batches)
    found, _, _ = measure(program, units, formats, text, apart, rounding == "nearest", tell)
    return found.as_dict()


def torchao(
    program: Path = typer.Argument(..., help="Folder of a quantised program, rewritten from a transformers model."),
    out: Path = typer.Option(..., "--out", help="Folder that transformers with torchao loads."),
    as_json: bool = JSON,
) -> None:
    """Save a quantised program in the form that transformers loads with torchao: config.json and safetensors.

    Weights by row or tensor in FP8 and INT8, and INT4 in whole groups; the same codes and scales, nothing is rounded again.

    [bold]Example[/bold]

      ftc torchao ./quantised --out ./for-transformers
    """
    import ftc
    from ftc.quantize.torchao_folder import save_torchao

    loaded = ftc.load(program)
    saved = save_torchao(loaded, out)
    if as_json:
        print_json({"program": str(program), "folder": str(out), "weights": saved})
        return
    console().print(f"{saved} quantised weights saved in {out}; load them with transformers' AutoModelForCausalLM.from_pretrained", markup=False)
