"""From a model on disk to a rewritten model on disk: what `ftc rewrite` and the recipe stage `rewrite` both do."""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftc.commands.output import working
from ftc.errors import FtcError
from ftc.files import atomic_folder, check_replaceable
from ftc.open_model import check_model, example_inputs, find_tokenizer, open_model

# A graph with symbolic sizes holds for two and more; one row and one token are structures of their own. A saved program
# captures nothing new, so each of them runs once before it is saved: evaluating and generating need them all.
USUAL_SHAPES = ((2, 12), (1, 12), (2, 1), (1, 1))  # batch and tokens
SELF = "self"  # as calibration text: drawn from the model
CALIBRATION_SHAPE = (8, 4, 128)  # batches, windows in a batch, tokens in a window
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.bin", "tokenizer_config.json", "special_tokens_map.json")


def rewrite_folder(
    model: str | Path,
    passes: str | Sequence[Any],
    out: str | Path,
    *,
    data: Sequence[str | Path] = (),
    tokenizer: str | Path | None = None,
    seed: int = 0,
    check: bool = True,
    progress: bool = False,
) -> dict[str, Any]:
    """Rewrite `model` with `passes`, save it and its tokenizer to `out` in one step, and return the report as JSON.

    `data`: text for passes that calibrate, or ["self"] for text drawn from the model; both need a tokenizer. Adds "seconds" and "described" (regions and graphs) to
    the report. `progress` says on a terminal what is being done. Raises FtcError for unknown passes, models and folders
    before any weight is read.
    """
    import ftc
    from ftc.quantize.picture import write_beside
    from ftc.rewrite.calibration import working_in
    from ftc.rewrite.registry import parse_passes

    check_replaceable(out, "program")
    check_model(model)
    if not passes:
        raise FtcError("no passes are named; ftc passes lists them")
    parsed = parse_passes(passes if isinstance(passes, str) else list(passes))
    tokenizer_path = _tokenizer_path(model, tokenizer)
    drawn, work = list(data) == [SELF], Path(f"{out}.work")
    batches = calibration_batches(tokenizer_path, data) if data and not drawn else None
    with working(progress) as tell:
        tell(f"reading {model}")
        program = open_model(model, seed=seed)
        if drawn:
            batches = drawn_batches(program, tokenizer_path, seed, tell)
        started = time.perf_counter()
        if not hasattr(program, "describe"):
            tell("capturing the model")
            program = ftc.capture(program, example_inputs(program, seed=seed), inplace=True)
        for number, request in enumerate(parsed, 1):
            tell(f"pass {number} of {len(parsed)}: {request.name}")
            with working_in(work):
                program = ftc.rewrite(program, [request], inplace=True, check=check, calibration=batches, tell=tell)
        seconds = time.perf_counter() - started
        tell("capturing other shapes of inputs")
        run_usual_shapes(program)
        report = program.report.as_dict() | {"seconds": seconds, "described": program.describe()}
        tell(f"writing {out}")
        with atomic_folder(out, "program") as folder:
            program.save(folder)
            write_beside(program, folder, f"Sensitivity of {model}")
            if tokenizer_path is not None:
                copy_tokenizer(tokenizer_path, folder)
    shutil.rmtree(work, ignore_errors=True)
    return report


def run_usual_shapes(program: Any) -> None:
    """Call `program` once with token ids of each usual shape, so that a saved copy of it has a graph for them; one that continues texts from a cache has
    one graph for all shapes."""
    import torch

    from ftc.cache import cached_by

    if cached_by(program) is not None:
        return
    device = next(program.parameters()).device
    with torch.no_grad():
        for shape in USUAL_SHAPES:
            program(input_ids=torch.zeros(shape, dtype=torch.long, device=device))


def calibration_batches(tokenizer_path: Path | None, data: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Batches {"input_ids": [4, 128] int64} from the beginning of the texts; fewer where the texts are short."""
    from ftc.data.tokenizer import load_tokenizer
    from ftc.texts import first_tokens

    if tokenizer_path is None:
        raise FtcError("calibration text needs the model's tokenizer, and none lies beside the model; add --tokenizer PATH")
    tokenizer = load_tokenizer(tokenizer_path)
    num_batches, num_windows, length = CALIBRATION_SHAPE
    ids = first_tokens(data, tokenizer, num_batches * num_windows * length)
    windows = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    windows = windows[: num_batches * num_windows]
    if not windows:
        raise FtcError(f"the data holds {len(ids)} tokens; calibration needs at least {length}")
    return [
        example_inputs(None, ids=windows[start : start + num_windows]) for start in range(0, len(windows), num_windows)
    ]


def drawn_batches(model: Any, tokenizer_path: Path | None, seed: int, tell: Any) -> list[dict[str, Any]]:
    """As many batches of the same shape, drawn from the model itself."""
    from ftc.data.tokenizer import load_tokenizer
    from ftc.data.tokens import start_id
    from ftc.heal.sampling import sample

    start = None if tokenizer_path is None else start_id(load_tokenizer(tokenizer_path))
    if start is None:
        raise FtcError("no tokenizer says what a text begins with, so none can be drawn from the model; name calibration text")
    num_batches, num_windows, length = CALIBRATION_SHAPE
    rows = sample(model, start, num_batches * num_windows, length, seed=seed, tell=tell)
    return [{"input_ids": part} for part in rows.split(num_windows)]


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer at `source`, a file or a folder, and the settings beside it, into `folder`."""
    beside = source if source.is_dir() else source.parent
    for name in _TOKENIZER_FILES:
        wanted = source.is_dir() or name == source.name or name.endswith(("config.json", "map.json"))
        if wanted and (beside / name).is_file():
            shutil.copyfile(beside / name, folder / name)


def _tokenizer_path(model: str | Path, given: str | Path | None) -> Path | None:
    try:
        return find_tokenizer(model, given)
    except FtcError:
        if given is not None:
            raise
        return None
