"""`ftc explain --precision`: opening model and text, and printing the report."""

from collections.abc import Sequence
from typing import Any

from ftc.commands.output import console, print_json, working

MOST_BATCHES = 4  # of 4 x 128 tokens: shares of a thousandth are seen, and a report takes seconds


def report_precision(model: str, calibration: Sequence[str], tokenizer: str | None, recipe: str, seed: int, as_json: bool) -> None:
    """Print the precision report of a model on text (`ftc.float8.precision_report`). FtcError for what cannot be opened, or no text."""
    from ftc.errors import FtcError, nearest
    from ftc.float8.recipes import NAMES

    if recipe not in NAMES:
        raise FtcError(f"there is no float8 recipe {recipe!r}; {nearest(recipe, NAMES)}")
    if not calibration:
        raise FtcError("--precision looks at what the model computes on text; add --calibration text.jsonl, or --calibration self")
    from ftc.commands.shared import opened
    from ftc.float8.precision_report import precision_report

    with working(not as_json) as tell:
        tell(f"reading {model}")
        loaded = opened(model, seed)
        batches = _batches(loaded, model, calibration, tokenizer, seed, tell)[:MOST_BATCHES]
        tell("running the text, forward and backward")
        report = precision_report(loaded, batches, recipe=recipe)
    if as_json:
        print_json(report.as_dict())
    else:
        console().print(str(report), markup=False, soft_wrap=True)


def _batches(loaded: Any, model: str, calibration: Sequence[str], tokenizer: str | None, seed: int, tell: Any) -> list[dict]:
    from ftc import rewrite_folder as folder

    path = folder._tokenizer_path(model, tokenizer)
    if list(calibration) == [folder.SELF]:
        return folder.drawn_batches(loaded, path, seed, tell)
    return folder.calibration_batches(path, calibration)
