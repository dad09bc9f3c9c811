"""The kinds of error a user meets: the input is wrong (exit code 2), the work failed (1), or was interrupted (130)."""

import difflib
from collections.abc import Iterable


class FtcError(ValueError):
    """Something the user gave is wrong; the message names the value and what would be valid. Exit code 2."""


class FtcFailure(RuntimeError):
    """The work itself failed: a proof did not hold, a run broke, the disk is full. Exit code 1."""


class Interrupted(FtcFailure):
    """The user stopped the work; the message says how to continue. Exit code 130."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """A sentence that names the closest valid spelling of `name` and lists the valid ones."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}valid: {', '.join(valid) if valid else '(none)'}"
