"""Arguments that several commands take, and opening a model for a command."""

import typer

MODEL = typer.Argument(
    ..., metavar="MODEL", help="A folder ftc saved, a Hugging Face folder, a llama2.c file, or preset:NAME."
)
JSON = typer.Option(False, "--json", help="Print JSON on stdout, for scripts.")
SEED = typer.Option(0, "--seed", help="For random weights (preset:NAME), example tokens and sampling.")
TOKENIZER = typer.Option(
    None, "--tokenizer", help="A tokenizer.json, tokenizer.bin or their folder; default: beside MODEL."
)


def opened(model: str, seed: int = 0):
    """`open_model` after a look at the name alone, so that a typing error costs no import of torch."""
    from ftc.open_model import is_preset, model_path, open_model

    if not is_preset(model):
        model_path(model)
    return open_model(model, seed=seed)


def at_least(minimum: int, **options: float | None) -> None:
    """Raise FtcError for the first option that is below `minimum`; None is an option that was not given."""
    from ftc.errors import FtcError

    for name, value in options.items():
        if value is not None and value < minimum:
            raise FtcError(f"--{name.replace('_', '-')} is {value}; it must be at least {minimum}")
