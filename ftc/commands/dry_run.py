"""What `ftc train --dry-run` prints."""

import re
from pathlib import Path
from typing import Any

from ftc.commands.output import bytes_text, console, print_json, table
from ftc.errors import FtcError, FtcFailure

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def show_dry_run(
    config: str, changes: dict[str, Any], out: Path | None, nproc: int | None, device_memory: str | None, as_json: bool
) -> None:
    """Print what a run needs. FtcError for what the run would refuse; FtcFailure where it does not fit `device_memory`."""
    from ftc.files import check_replaceable
    from ftc.train.dry_run import dry_run

    available = None if device_memory is None else parse_bytes(device_memory)
    if out is not None:
        check_replaceable(out, "train")
    found = dry_run(config, changes, num_ranks=nproc)
    fits = None if available is None else found.fits(available)
    if as_json:
        print_json(found.as_dict() | {"device_bytes": available, "fits": fits})
    else:
        _print(found)
    if fits is False:
        said = f"the peak of {bytes_text(found.peak_bytes)} a rank does not fit into {bytes_text(available)}"
        raise FtcFailure(f"{said}; use more ranks, a smaller local_batch_size, or activation_checkpoint.mode = 'full'")
    if fits and not as_json:
        console().print(f"fits: {bytes_text(found.peak_bytes)} of {bytes_text(available)}, {found.peak_bytes / available:.0%}")


def parse_bytes(text: str) -> int:
    """ "80GiB", "24 GB", "512MiB" or a number of bytes. FtcError for anything else, and for nothing."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    size = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if size <= 0:
        raise FtcError(f"--device-memory {text!r} is not a size; write it like 80GiB, 24GB or 512MiB")
    return size


def _print(found: Any) -> None:
    again = found.rank_flops - found.model_flops
    rows = [
        ("ranks", f"{found.ranks}, of which {found.batch_degree} read different data"),
        ("parameters of the model", f"{found.num_parameters:,}"),
        ("tokens of a step, all ranks", f"{found.tokens:,}"),
        (f"memory of {f'rank {found.rank}' if found.rank else 'a rank'}: parameters", bytes_text(found.parameter_bytes)),
        ("gradients", bytes_text(found.gradient_bytes)),
        ("optimizer state", bytes_text(found.optimizer_bytes)),
        ("activations", bytes_text(found.activation_bytes)),
        ("peak", f"{bytes_text(found.peak_bytes)}, in the {found.peak_phase}"),
        ("FLOPs of a step, a rank: model", f"{found.model_flops:.4g}"),
        ("recomputed, and the optimizer's", f"{again:.4g} ({again / max(found.model_flops, 1):.0%} more)"),
        ("all ranks", f"{found.global_flops:.4g}"),
        ("model FLOPs of a token", f"{found.flops_per_token:.4g}"),
    ]
    table(("a step", ""), rows, right=(1,))
    for note in found.notes:
        console().print(f"note: {note}", markup=False)
    for said in found.missing:
        console().print(f"missing before the run: {said}", markup=False)
