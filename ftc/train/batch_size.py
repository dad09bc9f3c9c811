"""Whether the windows of a step can be shared out among the data-parallel ranks."""

from typing import Any

from ftc.errors import FtcError


def check_batch(training: Any, degree: int) -> None:
    """Raise FtcError where the section [training] has no batch, or one that `degree` data-parallel ranks cannot share."""
    for name in ("local_batch_size", "seq_len"):
        value = getattr(training, name)
        if value < 1:
            raise FtcError(f"training.{name} = {value}; use a whole number of 1 or more")
    whole, step = training.global_batch_size, training.local_batch_size * degree
    if whole == 0 or (whole > 0 and whole % step):
        near = max(step, round(whole / step) * step)
        raise FtcError(
            f"training.global_batch_size = {whole} cannot be shared out: it must be a multiple of {step}, which is "
            f"training.local_batch_size = {training.local_batch_size} times {degree} data-parallel rank(s), such as {near}"
        )
